"""Pre-training: the paper's loop, resumable at any step."""

import math
import statistics
import sys
from contextlib import ExitStack, closing, nullcontext

import torch

from ..data.cache import Cached
from ..data.check import known_bad
from ..data.loader import Skipped, choose_decoder, training_batches
from ..data.sources import open_source
from ..errors import UserError
from ..models.mae import build
from . import checkpoint
from .config import PretrainConfig
from .distributed import Processes, processes, spread
from .guard import Guard
from .heap import keep_freed_memory
from .optim import WarmupCosine, adamw
from .progress import Progress
from .run import RunFolder
from .signals import Signals


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


def wants_bf16(dtype: str, device: torch.device) -> bool:
    """Whether to autocast to bf16: asked for, or ``auto`` on a device with bf16 matrix instructions."""
    if dtype != "auto":
        return dtype == "bf16"
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def _values(losses: list[torch.Tensor], among: Processes) -> list[float]:
    return [float(x) for x in among.mean(torch.stack(losses))] if losses else []


def _silent(*_: object) -> None:
    """Print nothing: another process does."""


# What may change when a run goes on.
FREE = ("num_workers", "cache", "output_dir", "strategy", "bad_list", "max_bad_fraction")


def pretrain(config: PretrainConfig) -> None:
    """Train as ``config`` says, resuming from the newest good checkpoint in ``config.output_dir``.

    In each process that ``torchrun`` has started, or in this one alone.

    Raises:
        UserError: on anything that the user has to change.
        SystemExit: after a signal that asked for the end: the run is saved, and its line continues it.
    """
    with processes(config.device) as among, Signals() as signals, ExitStack() as stack:
        _pretrain(config, among, signals, stack)
    if signals.caught:
        sys.exit(signals.exit_status())


def _pretrain(config: PretrainConfig, among: Processes, signals: Signals, stack: ExitStack) -> None:
    say, tell = (print, warn) if among.first else (_silent, _silent)
    keep_freed_memory()
    source = open_source(config.data_path, "train")
    torch.manual_seed(config.seed)
    kwargs = {"img_size": config.input_size, "norm_pix_loss": config.norm_pix_loss}
    try:
        model = build(config.model, **kwargs).to(among.device)
    except ValueError as error:
        raise UserError(f"--model {config.model}: {error}") from error
    bad = known_bad(source, model.in_chans, config.bad_list)
    num_patches = model.patch_embed.num_patches
    check_mask_ratio(num_patches, config.mask_ratio)
    per_step = config.batch_size * config.accum_iter * among.world
    steps_per_epoch = len(source) * config.repeats // per_step
    if steps_per_epoch == 0:
        raise UserError(
            f"{source.root} holds {len(source)} images, fewer than one step of {per_step}; "
            "lower --batch-size or --accum-iter"
        )
    total_steps = steps_per_epoch * config.epochs
    decoder, why = choose_decoder() if config.decoder == "auto" else (config.decoder, "")
    # What a run is resumed with may be spread otherwise over processes and micro-batches.
    settings = config.model_dump(mode="json", exclude={*FREE, "batch_size", "accum_iter"})
    settings |= {"images_per_step": per_step, "decoder": decoder, "images": source.fingerprint[:16]}
    run = stack.enter_context(closing(RunFolder(config.output_dir, settings, write=among.first)))

    lr = config.lr or config.blr * per_step / 256
    bf16 = wants_bf16(config.dtype, among.device)
    spread_model = spread(model, config.strategy, among)
    optimizer = adamw(model, lr, config.weight_decay, working_dtype=torch.bfloat16 if bf16 else None)
    warmup_steps = round(config.warmup_epochs * steps_per_epoch)
    schedule = WarmupCosine(optimizer, warmup_steps=warmup_steps, total_steps=total_steps, min_lr=config.min_lr)
    step = 0
    found = checkpoint.newest(run.checkpoints, tell)
    if found:
        found.load_model(model)
        found.load_optimizer(model, optimizer)
        step = found.step
        say(f"resuming {run.path} at step {step} of {total_steps}")
    if among.first:
        run.rewind_log(step)
    if step == total_steps:
        say(f"{run.path} is finished: {total_steps} steps, {config.epochs} epochs")
        return

    if config.cache:
        source = Cached(source, model.in_chans, config.exif, config.num_workers)
    say(
        f"{config.model}, {len(source)} images, {config.epochs} epochs = {total_steps} steps of {per_step} images, "
        f"lr {lr:.2e}, {'bf16' if bf16 else 'fp32'} on {among.device}"
        f"{(among.world > 1 and f', {among.world} processes ({config.strategy})') or ''}, "
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
        rank=among.rank,
        world=among.world,
        decoder=decoder,
        repeats=config.repeats,
        exif=config.exif,
        bad=bad,
        num_workers=config.num_workers,
        device=among.device,
    )
    skipped = Skipped(source, config.max_bad_fraction, warn)
    model_state = {"model": {"name": config.model, **kwargs}, "mask_ratio": config.mask_ratio}
    losses = [torch.tensor(x, device=among.device) for x in (found.state.get("losses", ()) if found else ())]
    model.train()
    saver = stack.enter_context(closing(checkpoint.Saver(run.checkpoints, warn)))

    def roll_back() -> None:
        saver.wait()
        among.any(False)  # every process then sees the same checkpoints
        good = checkpoint.newest(run.checkpoints, tell, guard.bad_steps)
        if good is None:
            tell("there is no checkpoint to go back to")
            return
        good.load_model(model)
        good.load_optimizer(model, optimizer)
        tell(f"went back to the weights of step {good.step}")

    guard = Guard(model, optimizer, run.path / "not_finite" if among.first else None, roll_back, tell)
    with Progress(total_steps, step, per_step, steps_per_epoch, quiet=not among.first) as progress:
        while step < total_steps:
            rate = schedule.set(step)
            ids: list[int] = []
            for micro in range(config.accum_iter):
                with progress.waiting():
                    batch = next(batches)
                skipped.add(batch)
                ids += batch.ids.tolist()
                batch = batch.to(among.device)
                last = micro == config.accum_iter - 1
                with nullcontext() if last else spread_model.without_sync():
                    with torch.autocast(among.device.type, torch.bfloat16, enabled=bf16):
                        loss = spread_model.loss(batch.images, config.mask_ratio, batch.noise)
                    (loss / config.accum_iter).backward()  # type: ignore[no-untyped-call]
                losses.append(loss.detach())
            step += 1
            guard.step({"step": step, "seed": config.seed, "ids": ids}, config.clip_grad)
            optimizer.zero_grad()
            ending = among.any(signals.caught is not None)
            mean_loss = None
            if step % config.log_every == 0 or step == total_steps:
                finite = [x for x in _values(losses, among) if math.isfinite(x)]
                mean_loss = statistics.fmean(finite) if finite else None
                losses.clear()
                total_skipped = among.sum(len(skipped))
                if among.first:
                    run.log(
                        {
                            "step": step,
                            "epoch": (step - 1) // steps_per_epoch,
                            "train_loss": mean_loss,
                            "train_lr": rate,
                            "images_per_s": round(progress.images_per_s(step), 1),
                            "waiting": round(progress.share_waiting(), 4),
                            "skipped": total_skipped,
                            "not_finite": len(guard.bad_steps),
                        }
                    )
            progress.update(step, rate, mean_loss)
            if step % config.save_every == 0 or step == total_steps or ending:
                guard.settle()
                state = model_state | {"losses": _values(losses, among)}  # not logged yet
                saved = checkpoint.snapshot(step, model, optimizer, state)
                if among.first:
                    saver.save(saved, guard.bad_steps)
            if ending:
                say(f"saving {run.path} at step {step}: run the same line again to go on")
                return
