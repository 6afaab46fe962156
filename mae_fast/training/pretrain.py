"""Pre-training: the paper's loop, resumable at any step."""

import math
import sys

import torch

from ..data.cache import Cached
from ..data.check import known_bad
from ..data.loader import Skipped, choose_decoder, training_batches
from ..data.sources import open_source
from ..errors import UserError
from ..models.mae import build
from . import checkpoint
from .config import PretrainConfig
from .heap import keep_freed_memory
from .optim import WarmupCosine, adamw
from .progress import Progress
from .run import RunFolder


def warn(message: str) -> None:
    """One line to standard error."""
    print(f"mae-fast: warning: {message}", file=sys.stderr)


def check_mask_ratio(num_patches: int, mask_ratio: float) -> None:
    """Raise ``UserError`` unless at least one patch stays visible and at least one is removed."""
    num_keep = int(num_patches * (1 - mask_ratio))
    if not 0 < num_keep < num_patches:
        what = "no visible" if num_keep <= 0 else "no removed"
        raise UserError(
            f"--mask-ratio {mask_ratio:g} leaves {what} patch of {num_patches}; "
            f"use {1 / num_patches:.3g} to {1 - 1 / num_patches:.3g}"
        )


def pick_device(name: str) -> torch.device:
    """The device for ``auto``, ``cpu`` or ``cuda``."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def wants_bf16(dtype: str, device: torch.device) -> bool:
    """Whether to autocast to bf16: asked for, or ``auto`` on a device with bf16 matrix instructions."""
    if dtype != "auto":
        return dtype == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def pretrain(config: PretrainConfig) -> None:
    """Train as ``config`` says, resuming from the newest good checkpoint in ``config.output_dir``.

    Raises:
        UserError: on anything that the user has to change.
    """
    device = pick_device(config.device)
    keep_freed_memory()
    source = open_source(config.data_path, "train")
    bad = known_bad(source)
    torch.manual_seed(config.seed)
    kwargs = {"img_size": config.input_size, "norm_pix_loss": config.norm_pix_loss}
    try:
        model = build(config.model, **kwargs).to(device)
    except ValueError as error:
        raise UserError(f"--model {config.model}: {error}") from error
    num_patches = model.patch_embed.num_patches
    check_mask_ratio(num_patches, config.mask_ratio)
    steps_per_epoch = len(source) * config.repeats // config.batch_size // config.accum_iter
    if steps_per_epoch == 0:
        wanted = config.batch_size * config.accum_iter
        raise UserError(
            f"{source.root} holds {len(source)} images, fewer than one step of {wanted}; "
            "lower --batch-size or --accum-iter"
        )
    total_steps = steps_per_epoch * config.epochs
    decoder, why = choose_decoder() if config.decoder == "auto" else (config.decoder, "")
    settings = config.model_dump(mode="json", exclude={"num_workers", "cache", "output_dir"})
    run = RunFolder(config.output_dir, settings | {"decoder": decoder, "images": source.fingerprint[:16]})

    lr = config.lr or config.blr * config.batch_size * config.accum_iter / 256
    bf16 = wants_bf16(config.dtype, device)
    optimizer = adamw(model, lr, config.weight_decay, working_dtype=torch.bfloat16 if bf16 else None)
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    schedule = WarmupCosine(optimizer, warmup_steps=warmup_steps, total_steps=total_steps, min_lr=config.min_lr)
    step = 0
    found = checkpoint.newest(run.checkpoints, warn)
    if found:
        found.load_model(model)
        found.load_optimizer(model, optimizer)
        step = found.step
        print(f"resuming {run.path} at step {step} of {total_steps}")
    run.rewind_log(step)
    if step == total_steps:
        print(f"{run.path} is finished: {total_steps} steps, {config.epochs} epochs")
        return

    if config.cache:
        source = Cached(source, model.in_chans, config.exif, config.num_workers)
    print(
        f"{config.model}, {len(source)} images, {config.epochs} epochs = {total_steps} steps of "
        f"{config.batch_size * config.accum_iter} images, lr {lr:.2e}, {'bf16' if bf16 else 'fp32'} on {device}, "
        f"decoded by {decoder}{why and f' ({why})'}"
    )
    batches = training_batches(
        source,
        size=model.patch_embed.img_size,
        channels=model.in_chans,
        num_patches=num_patches,
        batch_size=config.batch_size,
        batches_per_epoch=steps_per_epoch * config.accum_iter,
        epochs=config.epochs,
        seed=config.seed,
        first=step * config.accum_iter,
        decoder=decoder,
        repeats=config.repeats,
        exif=config.exif,
        bad=bad,
        num_workers=config.num_workers,
        device=device,
    )
    skipped = Skipped(source, config.max_bad_fraction, warn)
    model_state = {"model": {"name": config.model, **kwargs}, "mask_ratio": config.mask_ratio}
    losses: list[torch.Tensor] = []
    model.train()
    with Progress(total_steps, step, config.batch_size * config.accum_iter, steps_per_epoch) as progress:
        while step < total_steps:
            rate = schedule.set(step)
            for _ in range(config.accum_iter):
                with progress.waiting():
                    batch = next(batches).to(device)
                skipped.add(batch)
                with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                    loss = model.loss(batch.images, config.mask_ratio, batch.noise) / config.accum_iter
                loss.backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            mean_loss = None
            saving = step % config.save_every == 0 or step == total_steps
            if saving or step % config.log_every == 0:  # at a save, too: a resumed run then logs the same lines
                mean_loss = torch.stack(losses).sum().item() * config.accum_iter / len(losses)
                losses.clear()
                run.log(
                    {
                        "step": step,
                        "epoch": (step - 1) // steps_per_epoch,
                        "train_loss": mean_loss,
                        "train_lr": rate,
                        "images_per_s": round(progress.images_per_s(step), 1),
                        "waiting": round(progress.share_waiting(), 4),
                        "skipped": len(skipped),
                    }
                )
                if not math.isfinite(mean_loss):
                    raise UserError(f"the loss is {mean_loss} at step {step}; lower --lr or check the images")
            progress.update(step, rate, mean_loss)
            if saving:
                checkpoint.save(run.checkpoints, step, model, optimizer, model_state)
