"""Recomputes a step that training skipped, to find the images, layers and weights that are not finite."""

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.check import known_bad
from ..data.loader import Batch, LoaderConfig
from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from ..training.config import PretrainConfig
from ..training.distributed import DistContext
from ..training.nonfinite import gradient_norm
from ..training.plan import Plan
from ..training.task import use_bf16
from ..training.tasks.pretrain import Pretraining
from ..weights.files import load_weights
from ..weights.run_reader import newest_checkpoint, read_config

logger = logging.getLogger(__name__)

CHUNK = 32  # images per forward pass


def debug_step(dump: Path, device: str = "auto") -> bool:
    """Compute loss and gradient of a skipped step, and log which values are not finite.

    Args:
        dump: ``RUN/not_finite/step-*.json``.

    Returns:
        Whether any value was not finite this time, too.

    Raises:
        UserError: if the dump is not valid, or the run or its images have changed.
    """
    step = _read(dump)
    run = dump.resolve().parent.parent
    config = read_config(run)
    if "mask_ratio" not in config:
        raise UserError(
            f"{run} is not a pre-training run; its steps cannot be recomputed", f"{dump} lists the images of the step"
        )
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if device == "cuda" and where.type == "cpu":
        raise UserError("--device cuda: torch finds no CUDA device", "use --device cpu")
    task = _task(config, run, where)
    weights = _load(task.model, dump, step, run)
    batch = _batch(config, step, task)
    bf16 = use_bf16(config["dtype"], where)
    logger.info(
        "step %d of %s: %d images, %s on %s, weights of %s",
        step["step"], run, len(batch.ids), "bf16" if bf16 else "fp32", where.type, weights,
    )  # fmt: skip

    def loss_of(part: slice) -> Tensor:
        images, noise = batch.images[part].to(where), batch.noise[part].to(where)
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            return task.loss(task.model, images, noise)

    bad_weights = _log_non_finite("weight", dict(task.model.named_parameters()))
    bad_images = _backward(loss_of, len(batch.ids))
    for i in bad_images[:10]:
        logger.info("the loss of %r is not finite", task.source.names[int(batch.ids[i])])
    if len(bad_images) > 10:
        logger.info("and of %d more images", len(bad_images) - 10)
    if bad_images:
        first = slice(bad_images[0], bad_images[0] + 1)
        layer = _first_bad_layer(task.model, lambda: loss_of(first))
        logger.info("first layer whose output is not finite: %s", layer)
    gradients = {name: p.grad for name, p in task.model.named_parameters() if p.grad is not None}
    bad_gradients = _log_non_finite("gradient", gradients)
    norm = gradient_norm(task.model)
    logger.info("gradient norm: %s", float(norm))
    reproduced = bool(bad_images) or bad_weights or bad_gradients or not norm.isfinite()
    logger.info("reproduced" if reproduced else "not reproduced: all values are finite here")
    return reproduced


def _backward(loss_of: Callable[[slice], Tensor], count: int) -> list[int]:
    """Compute the gradient of the mean loss of ``count`` images. Returns the images whose loss is not finite."""
    bad = []
    for start in range(0, count, CHUNK):
        part = slice(start, min(start + CHUNK, count))
        loss = loss_of(part)
        (loss * (part.stop - start) / count).backward()  # type: ignore[no-untyped-call]
        if not loss.isfinite():
            with torch.no_grad():
                bad += [i for i in range(start, part.stop) if not loss_of(slice(i, i + 1)).isfinite()]
    return bad


@torch.no_grad()
def _first_bad_layer(model: nn.Module, run: Callable[[], Any]) -> str:
    found: list[str] = []

    def check(name: str, module: nn.Module, _: Any, output: Any) -> None:
        if not found and isinstance(output, Tensor) and not output.isfinite().all():
            found.append(f"{name} ({type(module).__name__})")

    hooks = [module.register_forward_hook(partial(check, name)) for name, module in model.named_modules() if name]
    run()
    for hook in hooks:
        hook.remove()
    return found[0] if found else "none"


def _read(dump: Path) -> dict[str, Any]:
    try:
        step = json.loads(dump.read_text())
        if type(step["step"]) is int and all(type(i) is int for i in step["ids"]) and "weights" in step:
            return dict(step)
    except OSError as error:
        raise UserError(
            f"{dump} cannot be read ({error.strerror})", "give RUN/not_finite/step-00001234.json"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(
        f"{dump} is not a dump of a skipped step",
        "give RUN/not_finite/step-*.json",
    )


def _load(model: MaskedAutoencoderViT, dump: Path, step: dict[str, Any], run: Path) -> str:
    """Load the weights of the step, or those of the newest good checkpoint if they were not saved.

    Returns:
        A description of the loaded weights, for the log.
    """
    if step["weights"]:
        path = dump.parent / Path(step["weights"]).name
        try:
            model.load_state_dict(load_weights(path, finite=False))
        except RuntimeError as error:
            raise UserError(f"{path} does not match the run: {error}", "restore the original file") from error
        return path.name
    bad_steps = {int(path.stem.removeprefix("step-")) for path in dump.parent.glob("step-" + "[0-9]" * 8 + ".json")}
    found = newest_checkpoint(run / "checkpoints", bad_steps)
    if found is None:
        raise UserError(
            f"the weights of the step were not saved, and {run} has no good checkpoint", f"{dump} lists the images"
        )
    found.load_model(model)
    return f"checkpoint {found.path.name}, because those of the step were not saved"


def _task(config: dict[str, Any], run: Path, device: torch.device) -> Pretraining:
    """The task of the run, with random weights."""
    known = {name: value for name, value in config.items() if name in PretrainConfig.model_fields and name != "init"}
    flags = {**known, "output_dir": run, "batch_size": config["images_per_step"]}
    return Pretraining(PretrainConfig(**flags), DistContext(device))


def _batch(config: dict[str, Any], step: dict[str, Any], task: Pretraining) -> Batch:
    """The images and masks of the step, which depend only on its number, the seed and the source."""
    source = task.source
    if source.fingerprint[:16] != config["images"]:
        raise UserError(f"the images in {source.root} have changed since the run", "restore the original images")
    done = step["step"] - 1  # number of earlier steps
    stage = Plan.of(task.config, task.size, source).stage(done)
    loader = LoaderConfig(
        size=stage.size,
        batch_size=stage.batch_size,
        batches_per_epoch=stage.steps_per_epoch,
        epochs=stage.epochs,
        first_epoch=stage.first_epoch,
        seed=config["seed"],
        first=done - stage.first_step,
        decoder=config["image_decoder"],
        repeats=config["crops_per_image"],
        pixels=task.pixels,
        bad=known_bad(source, task.pixels, None),
    )
    batch = next(task.batches(source, loader))
    if sorted(batch.ids.tolist()) != sorted(step["ids"]):
        logger.warning("the images differ from those of the step: some could not be read then, or cannot be read now")
    return batch


def _log_non_finite(kind: str, tensors: dict[str, Tensor]) -> bool:
    """Log the first tensors with values that are not finite. Returns whether there are any."""
    wrong = {name: int((~x.isfinite()).sum()) for name, x in tensors.items() if not x.isfinite().all()}
    for name, count in list(wrong.items())[:5]:
        logger.info("%s %s: %d of %d values are not finite", kind, name, count, tensors[name].numel())
    if len(wrong) > 5:
        logger.info("and %d more %ss", len(wrong) - 5, kind)
    return bool(wrong)
