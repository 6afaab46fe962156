"""The command line, ``mae-fast VERB``. Each verb is a function that imports heavy packages only when it runs."""

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
from .torchrun import is_reported_by_rank_0
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

    The exit status is 2 after an error that the user can fix, 1 after a negative result, such as a failed row of an
    ablation, and 130 after Ctrl-C.
    """
    # torch reads this when it is imported: threads that wait at a barrier then sleep instead of spinning. On idle cores
    # both are equally fast. When other processes shared the cores, spinning threads slowed training down tenfold.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    raise_mmap_threshold()
    for stream in (sys.stdout, sys.stderr):  # file names may contain bytes that are not valid UTF-8
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
            raise UserError(f"unknown verb {verb!r}", f"{_nearest([verb], VERBS)}known verbs: {', '.join(VERBS)}")
        where += f" {verb}"
        for flag, word in pairwise(words):
            if not word and _hyphened(flag) in ("--data-path", "--output-dir", "--job-dir", "--output"):
                raise UserError(f"{flag} is empty", "give a path; check that the shell variable is set")
        with _errors_of_tyro(), train_packages():
            VERBS[verb](words)
    except UserError as error:
        if not is_reported_by_rank_0(error):
            print(block(error, where), file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if isinstance(error, BrokenPipeError) and output_is_closed():
            raise
        message = f"{error.strerror or error}: {error.filename or 'unknown file'}"
        wrong_path = isinstance(error, FileNotFoundError | FileExistsError | IsADirectoryError | NotADirectoryError)
        hint = "give another path" if wrong_path else "check that the disk is mounted, writable and not full"
        print(block(UserError(message, hint), where), file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # torch raises RuntimeError on a CPU
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        hint = "use a smaller batch, image or model size"
        print(block(UserError(f"not enough memory ({error})", hint), where), file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        if type(interrupt) is KeyboardInterrupt:
            print("mae-fast: interrupted", file=sys.stderr)
        else:  # training has printed its message; a second, forwarded signal must not interrupt the exit
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        sys.exit(130)


def _print_verbs() -> None:
    print("usage: mae-fast VERB [FLAGS]")
    print("\n'mae-fast VERB --help' lists the flags of a verb.")
    for group, verbs in GROUPS.items():
        print(f"\n{group}:")
        for verb in verbs:
            print(f"  {verb.__name__.replace('_', '-'):14} {verb.__doc__}")


def _errors_of_tyro() -> Any:
    """Context manager: raise errors of tyro as ``UserError``. If its private hook is missing, tyro prints them."""
    try:
        from tyro._errors import on_parse_error
    except ImportError:
        return nullcontext()
    return on_parse_error(_raise_user_error)


def _raise_user_error(event: Any) -> None:
    """Raise ``UserError`` for a ``tyro._errors.ParseErrorEvent`` of a known kind."""
    kind, prog = type(event).__name__, event.prog
    argument: Any = getattr(event, "argument", None)
    tokens = getattr(event, "tokens", None) or getattr(event, "unrecognized_tokens", [])
    if kind == "BadValue" and not argument.display_name().startswith("-"):  # tyro read an unknown flag as the value
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
        raise UserError(f"{argument.display_name()} {event.value} is unknown", f"give one of {', '.join(choices)}")
    if kind == "BadValue":
        raise UserError(f"{argument.display_name()} has no value", f"see {prog} --help")
    if kind == "InstantiationFailure" and argument:
        given = re.search(r"'(.*)'", event.message)  # in the first line of Python's message
        value, expected = given[1] if given else "", argument.lowered.metavar.removeprefix("{None}|")
        raise UserError(f"{argument.display_name()} {value}: expected {expected}", f"see {prog} --help")


def _flags(prog: str) -> list[str]:
    """All flags in the output of ``PROG --help``."""
    _, verb, *rest = prog.split()
    with redirect_stdout(io.StringIO()) as text, suppress(SystemExit):
        VERBS[verb]([*rest, "--help"])
    lists = re.findall(r"^\W*?((?:, )?--\w[\w-]*(?:, --\w[\w-]*)*)", text.getvalue(), re.MULTILINE)
    return [flag for line in lists for flag in line.split(", ")]


def _nearest(words: list[str], known: Any) -> str:
    """ "did you mean ...? " with the known word that is closest to each of ``words``, or an empty string."""
    found = [difflib.get_close_matches(_hyphened(word), known, 1) for word in words]
    near = ", ".join(name for names in found for name in names)
    return f"did you mean {near}? " if near else ""


def _hyphened(flag: str) -> str:
    return flag.split("=")[0].replace("_", "-")
