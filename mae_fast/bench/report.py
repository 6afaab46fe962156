"""``mae-fast bench``: a grid measured, told and drawn."""

import time
from pathlib import Path

import torch

from ..errors import UserError, warn
from ..training.task import use_bf16
from .case import grid
from .engine import read, run
from .tables import draw, markdown


def report(
    tasks: tuple[str, ...],
    models: tuple[str, ...],
    dtypes: tuple[str, ...],
    batches: tuple[int, ...],
    image_sizes: tuple[int, ...],
    mask_ratios: tuple[float, ...],
    rivals: tuple[str, ...],
    rounds: int,
    minutes: float,
    device: str,
    folder: Path,
) -> None:
    """Measure each combination; print its table; write results.json, and table.md and pictures of all in there.

    Raises:
        UserError: if a combination cannot be, or there is no GPU where one is asked for.
    """
    where = chosen_device(device)
    dtypes = dtypes or ("bf16" if use_bf16("auto", torch.device(where)) else "fp32",)
    batches = batches or (16 if where == "cpu" else 64,)
    cases = grid(tasks, models, dtypes, batches, image_sizes, mask_ratios, where)
    start = time.monotonic()
    found = run(cases, rivals, rounds, minutes, folder, lambda line: print(line, flush=True))
    print(f"\n{markdown(found)}")
    every = read(folder / "results.json")
    (folder / "table.md").write_text(markdown(every))
    files = [folder / "results.json", folder / "table.md"]
    try:
        files += draw(every, folder)
    except UserError as error:
        warn(str(error))
    print(f"{(time.monotonic() - start) / 60:.0f} minutes; wrote {', '.join(map(str, files))}")


def chosen_device(device: str) -> str:
    """ "cpu" or "cuda"."""
    there = torch.cuda.is_available()
    if device == "cuda" and not there:
        raise UserError("--device cuda: torch finds no GPU", "use --device cpu")
    return device if device != "auto" else "cuda" if there else "cpu"
