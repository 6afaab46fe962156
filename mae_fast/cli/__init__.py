"""``mae-fast VERB``: every verb is a function of one of these modules; heavy imports happen inside it."""

import io
import os
import sys

from ..errors import UserError
from .ablate import ablate
from .demos import demo, demo_eval
from .export import export
from .images import data
from .interop import convert
from .report import bench, doctor, knn, probe, reconstruct
from .training import finetune, linprobe, partial, pretrain, replay, train_dvae

VERBS = {
    verb.__name__.replace("_", "-"): verb
    for verb in (
        pretrain, finetune, linprobe, partial, train_dvae, knn, probe, reconstruct, replay, data, export, convert, demo,
        demo_eval, ablate, bench, doctor,
    )
}  # fmt: skip


def main() -> None:
    """Entry point: run the verb, or say in one line what is wrong and exit with status 2."""
    # Read when torch loads: threads that wait at a barrier sleep instead of spinning. No slower on idle cores; where
    # another process wants the core too, spinning threads were seen to slow training down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):  # names of files may be no text
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print("usage: mae-fast VERB [FLAGS]; 'mae-fast VERB --help' for the flags\n")
        print("\n".join(f"  {name:12} {verb.__doc__}" for name, verb in VERBS.items()))
        return
    if args[0] == "--version":
        from .. import __version__

        print(f"mae_fast {__version__}")
        return
    try:
        if args[0] not in VERBS:
            raise UserError(f"unknown verb {args[0]!r}; known: {', '.join(VERBS)}")
        VERBS[args[0]](args[1:])
    except UserError as error:
        print(f"mae-fast: error: {error}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a disk or a right that went away
        print(f"mae-fast: error: {error.strerror or error}: {error.filename or 'no file'}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("mae-fast: interrupted", file=sys.stderr)
        sys.exit(130)
