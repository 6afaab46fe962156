"""Checks whether a training command can run on this machine: device, images, loader, memory and disk."""

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.check import known_bad
from ..data.decode import BadImage, decode, read_header
from ..data.loader import LoaderConfig, choose_decoder
from ..data.sources import Source
from ..errors import UserError, first_line
from ..memory import free_memory, resident
from ..ops.native import has_matrix_unit
from ..training.config import RunConfig
from ..training.distributed import DistContext, init_dist
from ..training.plan import Plan
from ..training.task import Task, use_bf16
from ..training.tasks import task_type
from ..training.trainer import TaskType, Trainer
from .findings import Finding, show_findings, tally
from .machine import cores
from .memory_estimate import Activations, PersistentMemory, activations, make_fake, persistent_memory, size

SAMPLE = 64  # images whose headers are read
DECODED = 8  # images of the sample that are decoded, to measure the speed
TRACED = 32  # images in the larger traced batch; the memory of larger batches is extrapolated
# Memory of a process for thread stacks, code that the first step loads and compiles, and buffers of oneDNN. Measured on
# 2 AVX512_BF16 cores with torch 2.14.1.
OVERHEAD = 64 << 20
PREFETCHED = 2  # batches that each worker process of a ``DataLoader`` prefetches
SAFE = 0.85  # an estimate up to this share of the available memory is reported as ok


def print_preflight(command: str, config: RunConfig) -> bool:
    """Print whether training with ``config`` can run on this machine.

    Returns:
        Whether there is a problem.
    """
    found = preflight(config, task_type(config))
    show_findings(f"Can this {command} run here?", found)
    print(f"{tally(found)}. Add --dry-run to the command to run a single step and measure its memory.")
    return any(f.bad for f in found)


def preflight(config: RunConfig, make: TaskType) -> list[Finding]:
    """The findings for the task ``make(config, ...)`` on this machine."""
    found: list[Finding] = []

    def add(what: str, check: Callable[[], Iterator[Finding]]) -> None:
        try:
            found.extend(check())
        except UserError as error:
            found.append(Finding.refused(what, error))

    try:
        with init_dist(config.device) as dist:
            device = dist.device
            found.append(_device(config, device))
            task = make(config, dist)
            config = task.config
            add("images", lambda: _images(config, task))
            add("validation", lambda: _validation(task))
            add("steps", lambda: _steps(config, task))
            add("loader", lambda: _loader(config, task, device))
            add("memory", lambda: _memory(config, task, device))
            add("run", lambda: _run(task, dist))
    except UserError as error:
        found.append(Finding.refused("command", error))
    return [*found, *_output(config)]


def _device(config: RunConfig, device: torch.device) -> Finding:
    bf16, can = use_bf16(config.dtype, device), use_bf16("auto", device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    instructions = "bf16 instructions" if device.type == "cuda" else "AMX or AVX512_BF16"
    found = f"{name} with{'' if can else 'out'} {instructions}: {'bf16' if bf16 else 'fp32'}"
    if config.dtype != "auto":
        found += f" (--dtype {config.dtype})"
    if bf16 and not can:
        return Finding("device", f"{found}, slower than fp32", "leave --dtype bf16 out", bad=True)
    if bf16 and device.type == "cpu" and not has_matrix_unit():
        return Finding("device", f"{found}, but our kernels cannot use it", "run 'mae-fast doctor' to see why")
    if config.execution == "cuda-graph" and device.type != "cuda":
        return Finding("device", f"{found}; without CUDA graphs, steps are eager", "leave --execution cuda-graph out")
    return Finding("device", found)


def _images(config: RunConfig, task: Task) -> Iterator[Finding]:
    """The number of images, the headers of a sample, and the decoding speed."""
    source = task.source
    classes = f" of {len(source.classes)} classes" if source.classes else ""
    yield Finding("images", f"{len(source)}{classes} in {source.root}")
    bad = known_bad(source, task.pixels, config.bad_list)
    if bad:
        yield Finding("bad images", f"{len(bad)} listed images are left out")
    indices = [i for i in np.unique(np.linspace(0, len(source) - 1, SAMPLE).astype(int)).tolist() if i not in bad]
    if not indices:
        return
    wrong: list[str] = []
    seconds: list[float] = []
    for i in indices:
        try:
            data = source.read(i)
            read_header(data)
            if len(seconds) < DECODED:
                start = time.perf_counter()
                decode(data, task.pixels)
                seconds.append(time.perf_counter() - start)
        except BadImage as error:
            wrong.append(f"{source.names[i]!r} ({error})")
    if not wrong:
        rate = 1 / statistics.median(seconds)
        yield Finding("sample", f"{len(indices)} headers are valid; Pillow decodes {rate:.0f} images/s per core")
        return
    found = f"{len(wrong)} of {len(indices)} images are unusable: {wrong[0]}{', ...' * (len(wrong) > 1)}"
    too_many = len(wrong) > config.max_bad_fraction * len(indices)
    fix = f"run 'mae-fast data check {source.root}'; training then skips the listed images"
    yield Finding("sample", found, fix, too_many)


def _validation(task: Task) -> Iterator[Finding]:
    val: Source | None = getattr(task, "val", None)
    task.evaluation()  # raises UserError for a missing package
    if val is not None:
        yield Finding("validation", f"{len(val)} images in {val.root}")


def _steps(config: RunConfig, task: Task) -> Iterator[Finding]:
    plan = Plan.of(config, task.size, task.source)
    if len(plan.stages) == 1:
        (stage,) = plan.stages
        found = f"{stage.steps_per_epoch} per epoch, {plan.total_steps} in total, of {stage.images_per_step} images"
    else:
        stages = "; ".join(f"{x.epochs} epochs of {x.steps_per_epoch} steps, {x}" for x in plan.stages)
        found = f"{plan.total_steps} in total: {stages}"
    yield Finding("steps", f"{found} per process")


def _loader(config: RunConfig, task: Task, device: torch.device) -> Iterator[Finding]:
    fastest, why = choose_decoder(task.pixels)
    decoder = fastest if config.image_decoder == "auto" else config.image_decoder
    found = f"{decoder}, {config.num_workers} worker{'s' * (config.num_workers != 1)} on {cores()} cores"
    if decoder == "dali" and fastest != "dali":
        leave = "leave --image-decoder dali out"
        fix = f"pip install 'mae_fast[dali]', or {leave}" if task.pixels.is_plain else leave
        yield Finding("loader", f"--image-decoder dali: {why}", fix, bad=task.pixels.is_plain)
    elif config.num_workers > cores():
        yield Finding("loader", f"{found}; there are more workers than cores", f"--num-workers {cores()}")
    elif config.num_workers == 0 and device.type == "cuda":
        yield Finding("loader", f"{found}; the GPU waits while images are loaded", f"--num-workers {cores()}")
    elif decoder == "pil" and config.image_decoder == "auto" and task.pixels.is_plain:
        yield Finding("loader", f"{found}; {why}", "to decode JPEG in half the time: pip install 'mae_fast[dali]'")
    else:
        yield Finding("loader", found)


def _memory(config: RunConfig, task: Task, device: torch.device) -> Iterator[Finding]:
    """The peak memory of a process in the largest stage, and the disk space for checkpoints."""
    stages = config.image_stages(task.size)
    stage = max(stages, key=lambda stage: (stage.batch_size * math.prod(stage.size), stage.size))
    config = config.model_copy(update={"batch_size": stage.batch_size})
    bf16, on_cpu = use_bf16(config.dtype, device), device.type == "cpu"
    model_size = size([*task.model.parameters(), *task.model.buffers()])
    gpu_available = 0 if on_cpu else torch.cuda.mem_get_info(device)[0] + model_size
    batches, why = _trace_inputs(config, task, stage.size, device)
    process, available = resident("VmRSS") - model_size * on_cpu + OVERHEAD, free_memory() + resident("VmRSS")
    mode = make_fake(task.model)
    persistent = persistent_memory(task, mode, bf16=bf16, averages=config.ema_decay is not None)
    yield _disk(config, persistent.saved)
    try:
        transient = activations(task, mode, batches, bf16=bf16) if batches else None
    except Exception as error:  # of any type
        why = f"tracing a step failed ({type(error).__name__}: {first_line(error)})"
        transient = None
    if transient is None:
        yield Finding("memory", f"unknown: {why}", "run the command with --dry-run to measure it")
        return
    host = {"process": process, "copy of a checkpoint": persistent.saved}
    if prefetched := _bytes_of_prefetched_batches(config, task, stage.size, device):
        host["prefetched batches"] = prefetched
    if on_cpu:
        yield fits("memory", config, persistent, transient, host, available)
    else:
        yield fits("GPU memory", config, persistent, transient, {}, gpu_available)
        need = sum(host.values())
        fix = "free some memory, or use fewer --num-workers" if need > SAFE * available else ""
        yield Finding("host memory", f"estimated {_gib(need)} of {_gib(available)}", fix, need > available)


def _bytes_of_prefetched_batches(config: RunConfig, task: Task, size: tuple[int, int], device: torch.device) -> int:
    """An upper bound. It does not include encoded images that wait for the decoder of a GPU, because they are small."""
    decoder = choose_decoder(task.pixels)[0] if config.image_decoder == "auto" else config.image_decoder
    if decoder == "dali" and device.type == "cuda":
        return 0
    height, width = size
    return config.num_workers * PREFETCHED * config.batch_size * height * width * task.pixels.channels


def _trace_inputs(
    config: RunConfig, task: Task, size: tuple[int, int], device: torch.device
) -> tuple[dict[int, Any], str]:
    """The outputs of ``task.inputs`` for two micro-batches, by number of images; or an empty dict and the reason."""
    if getattr(config, "cache_features", False):
        return {}, "there is no estimate with --cache-features"
    most = min(max(config.batch_size, 4 * config.crops_per_image), TRACED * config.crops_per_image)
    counts = [count - count % config.crops_per_image for count in (most // 2, most)]
    if len(task.source) * config.crops_per_image < counts[1]:
        return {}, f"{len(task.source)} images are too few for an estimate"
    decoder = "pil" if config.image_decoder == "pil" else choose_decoder(task.pixels)[0]
    found = {}
    for count in counts:
        loader = LoaderConfig(
            size=size,
            batch_size=count,
            batches_per_epoch=1,
            seed=config.seed,
            decoder=decoder,
            repeats=config.crops_per_image,
            pixels=task.pixels,
            bad=known_bad(task.source, task.pixels, config.bad_list),
            device=device,
        )
        found[count] = task.inputs(next(task.batches(task.source, loader)).to(device), 0)
    return found, ""


def fits(
    what: str,
    config: RunConfig,
    persistent: PersistentMemory,
    transient: Activations,
    also: dict[str, int],
    available: int,
) -> Finding:
    """Whether a training process fits into ``available`` bytes. The fix names flags that reduce the memory.

    Gradients and activations are added, although activations are freed while gradients are allocated: fragmentation
    prevents the reuse, and measured processes needed both. On 2 AVX512_BF16 cores, the sums were between 2 % below and
    9 % above the measured peak, for pre-training, fine-tuning and probing steps of ViT-B and the tiny model.

    Args:
        also: bytes of other parts of the process, by name.
    """
    parts = {**also, "weights": persistent.weights, "gradients": persistent.gradients, "optimizer": persistent.state}
    parts |= {"averages": persistent.averages} if persistent.averages else {}
    lasting = sum(parts.values())
    parts["activations"] = transient.of(config.batch_size)
    need = sum(parts.values())
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    found = f"estimated {_gib(need)} of {_gib(available)}: {listed}"
    if need <= SAFE * available:
        return Finding(what, found)
    most = (SAFE * available - lasting - transient.fixed) / max(1.0, transient.per_image)  # images
    images = config.batch_size * config.accum_iter
    whole = [
        n for n in range(1, config.batch_size) if images % n == 0 and n % config.crops_per_image == 0 and n <= most
    ]
    if getattr(config, "resolution_schedule", None) and most >= 1:
        fix = f"use a batch size of at most {int(most)} in the largest stage of --resolution-schedule"
    elif whole:
        fix = f"--batch-size {whole[-1]} --accum-iter {images // whole[-1]}"
        fix += "" if config.grad_checkpointing else ", or --grad-checkpointing"
    elif config.grad_checkpointing or lasting > SAFE * available:
        fix = "use a smaller model, more memory, or several processes with --strategy fsdp"
    else:
        fix = "--grad-checkpointing"
    return Finding(what, found, fix, need > available)


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB"


def _existing(path: Path) -> Path:
    """``path``, or its nearest parent folder that exists."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def _output(config: RunConfig) -> Iterator[Finding]:
    folder = _existing(config.output_dir)
    if not folder.is_dir():
        yield Finding("output", f"{folder} is a file", "choose another --output-dir", bad=True)
    elif not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("output", f"{folder} is not writable", "choose another --output-dir", bad=True)


def _run(task: Task, dist: DistContext) -> Iterator[Finding]:
    """Whether the run in the output folder, if there is one, can be resumed with these flags and images."""
    trainer = Trainer(task, dist, ExitStack())
    trainer.prepare()
    trainer.run_dir.check(trainer.settings)
    if (task.config.output_dir / "config.json").exists():
        yield Finding("run", f"the run in {task.config.output_dir} will be resumed")


def _disk(config: RunConfig, saved: int) -> Finding:
    """The disk space for checkpoints of ``saved`` bytes: all that are kept, and one that is being written."""
    here = [path.stat().st_size for path in (config.output_dir / "checkpoints").rglob("*") if path.is_file()]
    count = config.keep + 1 + (config.keep_best is not None) + config.epochs // (config.keep_every or config.epochs + 1)
    free, need = shutil.disk_usage(_existing(config.output_dir)).free + sum(here), count * saved
    found = f"{count} checkpoints of {_gib(saved)} need {_gib(need)}; {_gib(free)} are available"
    return Finding("disk", found, "free some space, or choose another --output-dir" if need > free else "", need > free)
