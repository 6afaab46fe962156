"""The tasks of the command line as functions: its flags are their keywords, with the same checks and the same loop.

In a notebook, Ctrl-C (or "interrupt") saves the run and raises ``KeyboardInterrupt``; the same call resumes it.
Messages are shown unless the program has set up ``logging``.
"""

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from .console import shown_messages
from .errors import train_packages
from .training.config import (
    DetectConfig,
    DvaeConfig,
    FinetuneConfig,
    LinprobeConfig,
    PretrainConfig,
    RunConfig,
    SegmentConfig,
)

if TYPE_CHECKING:
    from .training.trainer import RunResult

Function = TypeVar("Function", bound=Callable[..., Any])

# Each configuration's function: its module among the tasks, and the module that evaluates its runs.
_MODULES: dict[type[RunConfig], tuple[str, str, str]] = {
    PretrainConfig: ("pretrain", "pretrain", ""),
    FinetuneConfig: ("finetune", "classify", "classifier"),
    LinprobeConfig: ("linprobe", "classify", "classifier"),
    SegmentConfig: ("segment", "segment", "segment"),
    DetectConfig: ("detect", "detect", "detect"),
    DvaeConfig: ("train_dvae", "dvae", ""),
}


def run(config: RunConfig) -> "RunResult":
    """Train, or with ``eval_only`` evaluate, as ``config`` says.

    Raises:
        UserError: on anything that the user has to change.
        KeyboardInterrupt: after Ctrl-C. The run is saved.
        SystemExit: after another signal that asks for the end. The run is saved.
    """
    function, module, evaluation = _MODULES[type(config)]
    with train_packages():
        from .training.trainer import RunResult
        from .weights.run_reader import checkpoints_in

        if not getattr(config, "eval_only", False):
            result: RunResult = getattr(import_module(f"mae_fast.training.tasks.{module}"), function)(config)
            return result
        metrics = import_module(f"mae_fast.training.tasks.{evaluation}").evaluate(config)
        steps = [int(path.name.removeprefix("step-")) for path in checkpoints_in(config.output_dir / "checkpoints")]
        return RunResult(config.output_dir, metrics, max(steps, default=0))


def _with_flags_of(kind: type[RunConfig]) -> Callable[[Function], Function]:
    """Give a function the signature and the documentation of a configuration's flags."""

    def decorate(function: Function) -> Function:
        keyword, fields = inspect.Parameter.KEYWORD_ONLY, kind.model_fields
        parameters = [
            inspect.Parameter(name, keyword, annotation=info.annotation)
            if info.is_required()
            else inspect.Parameter(name, keyword, annotation=info.annotation, default=info.default)
            for name, info in fields.items()
        ]
        preset = inspect.Parameter("preset", keyword, annotation=str | None, default=None)
        parameters.sort(key=lambda parameter: parameter.default is not parameter.empty)
        signature = inspect.Signature([preset, *parameters], return_annotation="RunResult")
        lines = [f"{kind.__doc__}".replace("Run the same line again", "Make the same call again"), "", "Args:"]
        lines.append(f"    preset: {', '.join(kind.presets)}: other defaults of the flags below.")
        lines += [f"    {name}: {' '.join((fields[name].description or '').split())}" for name in fields]
        lines += ["", "Raises:", "    UserError: if a flag is wrong, or on anything else that the user has to change."]
        function.__doc__ = "\n".join(lines)
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


@_with_flags_of(PretrainConfig)
def pretrain(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(PretrainConfig, preset, flags)


@_with_flags_of(FinetuneConfig)
def finetune(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(FinetuneConfig, preset, flags)


@_with_flags_of(LinprobeConfig)
def linprobe(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(LinprobeConfig, preset, flags)


@_with_flags_of(SegmentConfig)
def segment(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(SegmentConfig, preset, flags)


@_with_flags_of(DetectConfig)
def detect(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(DetectConfig, preset, flags)


@_with_flags_of(DvaeConfig)
def train_dvae(*, preset: str | None = None, **flags: Any) -> "RunResult":
    return _run(DvaeConfig, preset, flags)


def reconstruct(
    run: str | Path,
    images: str | Path | Sequence[str | Path],
    output: str | Path = "reconstruction.png",
    *,
    mask_ratio: float | Sequence[float] = (),
    mask_sampling: Literal["random", "block", "grid"] | None = None,
    masks: str | Path | None = None,
    whole: bool = False,
    paste_visible: bool = False,
    show: int = 12,
    seed: int = 0,
    ema: bool = False,
) -> dict[float, tuple[float, float]]:
    """Write a picture or a page of masked images, their reconstructions and originals.

    The arguments are the flags of ``mae-fast reconstruct``, whose help describes them.

    Returns:
        For each mask ratio, the PSNR in dB on the removed patches: of the model, and of a fill with the mean visible
        colour.

    Raises:
        UserError: on anything that the user has to change.
    """
    with _session():
        from .evaluation.reconstruct import Masking, ReconstructOptions, reconstruct_files

        files = [images] if isinstance(images, str | Path) else images
        ratios = (mask_ratio,) if isinstance(mask_ratio, int | float) else tuple(mask_ratio)
        masking = Masking(ratios, mask_sampling, Path(masks) if masks else None, seed)
        options = ReconstructOptions(whole, paste_visible, show, ema)
        return reconstruct_files(Path(run), [Path(file) for file in files], Path(output), masking, options)


def knn(
    weights: str | Path,
    data_path: str | Path,
    *,
    model: str | None = None,
    k: int = 20,
    temperature: float = 0.07,
    pool: Literal["cls", "mean"] = "mean",
    batch_size: int = 64,
    num_workers: int = 0,
    ema: bool = False,
) -> tuple[float, float]:
    """Score frozen features with their nearest neighbours.

    The arguments are the flags of ``mae-fast knn``, whose help describes them.

    Returns:
        Top-1 and top-5 accuracy on ``data_path/val``, as shares.

    Raises:
        UserError: on anything that the user has to change.
    """
    with _session():
        from .evaluation.knn import KnnOptions, knn

        options = KnnOptions(k, temperature, pool, batch_size, num_workers)
        found = knn(str(weights), Path(data_path), model, options, ema)
        return found.top1, found.top5


def _run(kind: type[RunConfig], preset: str | None, flags: dict[str, Any]) -> "RunResult":
    with _session():
        return run(kind.with_preset(preset, **flags))


@contextmanager
def _session() -> Iterator[None]:
    """Show messages within this, and leave the random generators as they were."""
    import torch

    in_use = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    devices = range(torch.cuda.device_count()) if in_use else ()
    with shown_messages(), train_packages(), torch.random.fork_rng(devices):
        yield
