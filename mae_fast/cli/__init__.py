"""``mae-fast VERB``: every verb is a function of one of these modules; heavy imports happen inside it."""

import difflib
import io
import os
import re
import signal
import sys
from contextlib import nullcontext, redirect_stdout, suppress
from itertools import pairwise
from typing import Any

from ..console import output_is_closed, show_messages, silence_other_libraries
from ..errors import UserError, block, train_packages
from ..memory import raise_mmap_threshold
from .ablate import ablate
from .demos import demo, demo_transfer, study
from .export import export
from .images import data
from .old_names import current_verb
from .report import attention, bench, doctor, features, knn, logreg_probe, predict, reconstruct
from .runs import plot, runs, slim
from .torchrun import is_said_by_first
from .training import debug_step, detect, finetune, linprobe, pretrain, segment, train_dvae
from .weights import convert

GROUPS = {
    "training": (pretrain, finetune, linprobe, segment, detect, train_dvae),
    "trained models": (
        predict,
        reconstruct,
        attention,
        features,
        knn,
        logreg_probe,
        export,
        convert,
        debug_step,
        plot,
        runs,
        slim,
    ),
    "images": (data,),
    "studies": (ablate, demo, demo_transfer, study),
    "this machine": (doctor, bench),
}
VERBS = {verb.__name__.replace("_", "-"): verb for verbs in GROUPS.values() for verb in verbs}


def main() -> None:
    """Run the verb of the command line.

    The exit status is 2 after an error that the user can fix, 1 after a bad result, such as a row that failed, and 130
    after Ctrl-C.
    """
    # Read when torch loads: threads that wait at a barrier sleep instead of spinning. No slower on idle cores; where
    # another process wants the core too, spinning threads were seen to slow training down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    raise_mmap_threshold()
    for stream in (sys.stdout, sys.stderr):  # file names may be undecodable
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    show_messages()
    silence_other_libraries()
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        _print_verbs()
        return
    if args[0] == "--version":
        from .. import __version__

        print(f"mae_fast {__version__}")
        return
    where = "mae-fast"
    try:
        verb, words = current_verb(args[0], args[1:])
        if verb not in VERBS:
            raise UserError(f"unknown verb {verb!r}", f"{_nearest([verb], VERBS)}known are {', '.join(VERBS)}")
        where += f" {verb}"
        for flag, word in pairwise(words):
            if not word and _hyphened(flag) in ("--data-path", "--output-dir", "--job-dir", "--output"):
                raise UserError(f"{flag} is given an empty word", "is a variable of the shell not set?")
        with _errors_of_tyro(), train_packages():
            VERBS[verb](words)
    except UserError as error:
        if not is_said_by_first(error):
            print(block(error, where), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            raise
        what = f"{error.strerror or error}: {error.filename or 'no file'}"
        wrong_path = isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError)
        fix = "give another path" if wrong_path else "see that the disk is there, yours and not full"
        print(block(UserError(what, fix), where), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # the second is what torch raises on a CPU
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        print(block(UserError(f"not enough memory ({error})", "give smaller sizes"), where), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if type(interrupt) is KeyboardInterrupt:
            print("mae-fast: interrupted", file=sys.stderr)
        else:  # training has said that it is saved; a forwarded copy of the signal must not disturb the exit
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(130)


def _print_verbs() -> None:
    print("usage: mae-fast VERB [FLAGS]; 'mae-fast VERB --help' for the flags")
    for group, verbs in GROUPS.items():
        print(f"\n{group}:")
        for verb in verbs:
            print(f"  {verb.__name__.replace('_', '-'):14} {verb.__doc__}")


def _errors_of_tyro() -> Any:
    """Within this, errors of tyro are raised as ``UserError``. The hook is not public: without it, tyro prints them."""
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        return nullcontext()
    return on_parse_error(_refuse)


def _refuse(event: Any) -> None:
    """Raise ``UserError`` for a ``tyro._errors.ParseErrorEvent`` of a known kind."""
    kind, prog = type(event).__name__, event.prog
    of: Any = getattr(event, "argument", None)
    tokens = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", [])
    if kind == "BadValue" and not of.display_name().startswith("-"):  # an unknown flag has taken the word
        known = _flags(prog)
        tokens = [word for word in sys.argv if word[:2] == "--" and _hyphened(word) not in known]
    if unknown := [token for token in tokens if re.match("--?[^-0-9.]", token)]:
        raise UserError(f"unknown flag {', '.join(unknown)}", f"{_nearest(unknown, _flags(prog))}see {prog} --help")
    if kind == "UnrecognizedArgs":
        raise UserError(f"unexpected argument {' '.join(map(repr, tokens))}", f"see {prog} --help")
    if kind == "MissingArgs":
        missing = ", ".join(each.arg.display_name() for each in event.missing_arguments)
        raise UserError(f"missing: {missing}", f"see {prog} --help")
    if kind == "InvalidChoice":
        choices = [choice for choice in event.choices if choice != "None"]
        raise UserError(f"{of.display_name()} {event.value} is unknown", f"give one of {', '.join(choices)}")
    if kind == "BadValue":
        raise UserError(f"{of.display_name()} has no value", f"see {prog} --help")
    if kind == "InstantiationFailure" and of:
        given = re.search(r"'(.*)'", event.message)  # in the first line of Python's message
        value, takes = given[1] if given else "", of.lowered.metavar.removeprefix("{None}|")
        raise UserError(f"{of.display_name()} {value} is no {takes}", f"see {prog} --help")


def _flags(prog: str) -> list[str]:
    """The flags that ``PROG --help`` lists."""
    _, verb, *rest = prog.split()
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        VERBS[verb]([*rest, "--help"])
    lists = re.findall(r"^\W*?((?:, )?--\w[\w-]*(?:, --\w[\w-]*)*)", text.getvalue(), re.MULTILINE)
    return [flag for line in lists for flag in line.split(", ")]


def _nearest(words: list[str], known: Any) -> str:
    """A question that names the known words closest to these; published flags are spelled with _."""
    found = [difflib.get_close_matches(_hyphened(word), known, 1) for word in words]
    near = ", ".join(name for names in found for name in names)
    return f"did you mean {near}? " if near else ""


def _hyphened(flag: str) -> str:
    return flag.split("=")[0].replace("_", "-")
