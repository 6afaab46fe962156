"""``python -m mae_fast``: the same as ``mae-fast``."""

from .cli import main

if __name__ == "__main__":
    main()
