"""Former names of verbs and flags. They work for one release, with a warning, and are not in the help."""

import logging
from collections.abc import Mapping

logger = logging.getLogger(__name__)

VERBS = {"partial": "finetune", "probe": "logreg-probe", "replay": "debug-step"}
FLAGS = {"repeats": "crops-per-image", "step": "execution", "decoder": "image-decoder", "blocks": "train-blocks"}


def current_verb(verb: str, words: list[str]) -> tuple[str, list[str]]:
    """The verb under its current name, with its arguments."""
    if verb not in VERBS:
        return verb, words
    logger.warning(f"'mae-fast {verb}' is now called 'mae-fast {VERBS[verb]}'")
    if verb == "partial":  # it trained one block by default
        words = ["--train-blocks=1", *words]
    return VERBS[verb], words


def current_flags(words: list[str], names: Mapping[str, str] = FLAGS) -> list[str]:
    """The arguments of a verb, with flags under their current names.

    Args:
        names: current names by former names. Default: those of the training verbs.
    """
    found: list[str] = []
    for word in words:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and flag[2:] in names:
            word = f"--{names[flag[2:]]}{equals}{value}"
            logger.warning(f"{flag} is now called --{names[flag[2:]]}")
        if word == "--execution=graph" or (word == "graph" and found[-1:] == ["--execution"]):
            word = word.replace("graph", "cuda-graph")
        found.append(word)
    return found
