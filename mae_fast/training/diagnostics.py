"""Reports of ``--profile`` and ``--dry-run``: a trace of some steps, and the memory of one step."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .progress import peak_memory

logger = logging.getLogger(__name__)


@contextmanager
def profiler(path: Path | None) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each step. Writes a trace of steps 4 to 6 to ``path``, if it is given."""
    if path is None:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    def write(profiler: Any) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")  # raises an error if it cannot be written, which the profiler does not
            profiler.export_chrome_trace(str(path))
            if path.suffix != ".gz" and not path.read_bytes().rstrip().endswith(b"}"):
                raise OSError("the file is incomplete: is the disk full?")
        except OSError as error:
            logger.warning(f"--profile {path} cannot be written ({error.strerror or error}); training goes on")
        else:
            logger.info(f"wrote {path}")

    with profile(schedule=schedule(wait=2, warmup=1, active=3, repeat=1), on_trace_ready=write) as profiler:
        yield profiler.step


def memory_report(
    model: nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, Tensor], device: torch.device
) -> str:
    """A line about the peak memory of a step in this process."""

    def size(tensors: Iterable[Tensor]) -> int:
        local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
        return sum(x.numel() * x.element_size() for x in local)

    state = (x for of_one in optimizer.state.values() for x in of_one.values() if isinstance(x, Tensor))
    parts = {
        "weights": size(model.parameters()),
        "gradients": size(p for p in model.parameters() if p.requires_grad),
        "optimizer": size(state),
        **({"averages": size(averages.values())} if averages else {}),
    }
    peak = peak_memory()
    if device.type == "cuda":
        total, owner = torch.cuda.get_device_properties(device).total_memory, "the GPU's"
    else:
        total, owner = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's"
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    rest = (peak - sum(parts.values())) / 2**30
    return (
        f"dry run: one step done, nothing saved. Peak memory per process: {peak / 2**30:.2f} GiB of {owner} "
        f"{total / 2**30:.1f}: {listed}, activations and everything else {rest:.2f}"
    )
