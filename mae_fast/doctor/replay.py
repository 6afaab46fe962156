"""A step that training left out, run again: which of its images, layers and weights are not finite."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..data.check import known_bad
from ..data.loader import Batch, LoaderConfig
from ..errors import UserError, warn
from ..models.mae import MaskedAutoencoderViT
from ..training.config import PretrainConfig
from ..training.distributed import DistContext
from ..training.nonfinite import gradient_norm
from ..training.run_dir import read_config
from ..training.task import Plan, use_bf16
from ..training.tasks.pretrain import Pretraining
from ..weights.files import load_weights
from ..weights.run_reader import newest_checkpoint

AT_ONCE = 32  # images


def replay(dump: Path, device: str = "auto") -> bool:
    """Compute loss and gradient of the step in ``dump``, ``RUN/not_finite/step-*.json``, and print what is not finite.

    Returns:
        Whether something is not finite here, too.

    Raises:
        UserError: if the dump, its run or the images are not what they were.
    """
    about = _read(dump)
    run = dump.resolve().parent.parent
    config = read_config(run)
    if "mask_ratio" not in config:
        raise UserError(
            f"{run} is no run of pre-training, of which alone a step can be taken again",
            f"{dump} has its images",
        )
    where = torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")
    if device == "cuda" and where.type == "cpu":
        raise UserError("--device cuda: torch finds no CUDA device here", "use --device cpu")
    task = _task(config, run, where)
    model = task.model
    weights = _load(model, dump, about, run)
    batch = _batch(config, about, task)
    bf16 = use_bf16(config["dtype"], where)
    print(
        f"step {about['step']} of {run}: {len(batch.ids)} images, {'bf16' if bf16 else 'fp32'} on {where.type}, "
        f"with the weights of {weights}"
    )

    def losses(part: slice) -> Tensor:
        images, noise = batch.images[part].to(where), batch.noise[part].to(where)
        with torch.autocast(where.type, torch.bfloat16, enabled=bf16):
            return task.loss(model, images, noise)

    bad_weights = _tell("weight", dict(model.named_parameters()))
    wrong = []
    for start in range(0, len(batch.ids), AT_ONCE):
        part = slice(start, min(start + AT_ONCE, len(batch.ids)))
        loss = losses(part)
        (loss * (part.stop - start) / len(batch.ids)).backward()  # type: ignore[no-untyped-call]
        if not loss.isfinite():
            with torch.no_grad():
                wrong += [i for i in range(start, part.stop) if not losses(slice(i, i + 1)).isfinite()]
    names = task.source.names
    for i in wrong[:10]:
        print(f"the loss of {names[int(batch.ids[i])]!r} is not finite")
    if len(wrong) > 10:
        print(f"and of {len(wrong) - 10} more images")
    if wrong:
        one = slice(wrong[0], wrong[0] + 1)
        print(f"the first layer whose output is not finite: {_first_layer(model, lambda: losses(one))}")
    bad_gradients = _tell("gradient", {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    norm = gradient_norm(model)
    print(f"norm of the gradient: {float(norm)}")
    same = bool(wrong) or bad_weights or bad_gradients or not norm.isfinite()
    print("reproduced" if same else "not reproduced: here, all of it is finite")
    return same


@torch.no_grad()
def _first_layer(model: nn.Module, run: Callable[[], Any]) -> str:
    found: list[str] = []

    def watch(name: str) -> Any:
        def look(module: nn.Module, _: Any, output: Any) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"{name} ({type(module).__name__})")

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    run()
    for hook in hooks:
        hook.remove()
    return found[0] if found else "none"


def _read(dump: Path) -> dict[str, Any]:
    try:
        about = json.loads(dump.read_text())
        if type(about["step"]) is int and all(type(i) is int for i in about["ids"]) and "weights" in about:
            return dict(about)
    except OSError as error:
        raise UserError(
            f"{dump} cannot be read ({error.strerror})", "give RUN/not_finite/step-00001234.json"
        ) from error
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise UserError(
        f"{dump} is not what training writes of a step that it left out",
        "give RUN/not_finite/step-*.json",
    )


def _load(model: MaskedAutoencoderViT, dump: Path, about: dict[str, Any], run: Path) -> str:
    """Of the step, or of the newest good checkpoint where they were not kept; says which."""
    if about["weights"]:
        path = dump.parent / Path(about["weights"]).name
        try:
            model.load_state_dict(load_weights(path))
        except RuntimeError as error:
            raise UserError(f"{path} does not fit the run's model: {error}") from error
        return path.name
    bad_steps = {int(path.stem.removeprefix("step-")) for path in dump.parent.glob("step-" + "[0-9]" * 8 + ".json")}
    found = newest_checkpoint(run / "checkpoints", bad_steps)
    if found is None:
        raise UserError(f"the weights of the step were not kept, and {run} has no good checkpoint to use instead")
    found.load_model(model)
    return f"checkpoint {found.path.name}, for the step's own were not kept"


def _task(config: dict[str, Any], run: Path, device: torch.device) -> Pretraining:
    """The run's, as its folder tells; what its weights were at first does not matter."""
    known = {name: value for name, value in config.items() if name in PretrainConfig.model_fields and name != "init"}
    flags = {**known, "output_dir": run, "batch_size": config["images_per_step"]}
    return Pretraining(PretrainConfig(**flags), DistContext(device))


def _batch(config: dict[str, Any], about: dict[str, Any], task: Pretraining) -> Batch:
    """The step's images and masks, which depend on its number, the seed and the images alone."""
    source = task.source
    if source.fingerprint[:16] != config["images"]:
        raise UserError(f"the images in {source.root} are no longer those of the run")
    per_step = config["images_per_step"]
    plan = Plan.of(per_step, source, config["crops_per_image"], config["epochs"])
    loader = LoaderConfig(
        size=task.size,
        channels=task.channels,
        batch_size=per_step,
        batches_per_epoch=plan.steps_per_epoch,
        epochs=config["epochs"],
        seed=config["seed"],
        first=about["step"] - 1,
        decoder=config["image_decoder"],
        repeats=config["crops_per_image"],
        exif=config["exif"],
        bad=known_bad(source, task.channels, None),
    )
    batch = next(task.batches(source, loader))
    if sorted(batch.ids.tolist()) != sorted(about["ids"]):
        warn("the step had other images: some could not be used then, or cannot now")
    return batch


def _tell(what: str, tensors: dict[str, Tensor]) -> bool:
    """Print the first few of what is not finite; whether there is any."""
    wrong = {name: int((~x.isfinite()).sum()) for name, x in tensors.items() if not x.isfinite().all()}
    for name, count in list(wrong.items())[:5]:
        print(f"{what} {name}: {count} of {tensors[name].numel()} values are not finite")
    if len(wrong) > 5:
        print(f"and {len(wrong) - 5} more {what}s")
    return bool(wrong)
