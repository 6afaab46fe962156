"""``python -m mae_fast``, and the script ``mae-fast``."""

import sys

from .errors import UserError, block, train_packages


def main() -> None:
    """Run the command line, if its packages are installed."""
    try:
        with train_packages():
            from .cli import main as command_line
    except UserError as error:
        print(block(error, "mae-fast"), file=sys.stderr)
        sys.exit(2)
    command_line()


if __name__ == "__main__":
    main()
