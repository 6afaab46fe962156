"""``mae-fast bench``: measures a grid of cases, and writes tables and plots."""

import logging
import time
from dataclasses import replace
from pathlib import Path

import torch

from ..errors import UserError
from ..training.task import use_bf16
from .case import Grid
from .engine import read, run
from .tables import draw, markdown

logger = logging.getLogger(__name__)


def report(grid: Grid, baselines: tuple[str, ...], rounds: int, minutes: float, folder: Path) -> None:
    """Measure the cases of ``grid``, log a table, and write results.json, table.md and plots.

    Args:
        grid: a device of "auto" and missing dtypes and batch sizes are chosen for this machine.

    Raises:
        UserError: if a case is invalid, or a GPU is requested and there is none.
    """
    device = chosen_device(grid.device)
    grid = replace(
        grid,
        device=device,
        dtypes=grid.dtypes or ("bf16" if use_bf16("auto", torch.device(device)) else "fp32",),
        batches=grid.batches or (16 if device == "cpu" else 64,),
    )
    start = time.monotonic()
    found = run(grid.cases(), baselines, rounds, minutes, folder)
    logger.info("\n%s", markdown(found))
    every = read(folder / "results.json")
    (folder / "table.md").write_text(markdown(every))
    files = [folder / "results.json", folder / "table.md"]
    try:
        files += draw(every, folder)
    except UserError as error:
        logger.warning("%s", error)
    logger.info("%.0f minutes; wrote %s", (time.monotonic() - start) / 60, ", ".join(map(str, files)))


def chosen_device(device: str) -> str:
    """ "cpu" or "cuda"."""
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise UserError("--device cuda: torch finds no GPU", "use --device cpu")
    return device if device != "auto" else "cuda" if available else "cpu"
