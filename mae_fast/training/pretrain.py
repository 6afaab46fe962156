"""Pre-training: the paper's loop, resumable at any step."""

import math
import os
import statistics
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from ..data.cache import Cached
from ..data.check import known_bad
from ..data.keyed import mask_noise
from ..data.loader import Skipped, centred_image, choose_decoder, training_batches
from ..data.sources import Source, open_source
from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT, build
from ..models.reconstruction import picture, reconstruct
from ..weights import load_weights
from . import checkpoint
from .config import PretrainConfig
from .distributed import Processes, processes, spread
from .guard import Guard
from .heap import keep_freed_memory
from .optim import Ema, WarmupCosine, adamw
from .progress import Progress, peak_memory
from .run import RunFolder
from .signals import Signals
from .step import TrainStep
from .track import Track


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
FREE = (
    "num_workers", "cache", "output_dir", "strategy", "step", "bad_list", "max_bad_fraction", "grad_checkpointing",
    "log_dir", "wandb", "profile", "dry_run",
)  # fmt: skip
PICTURES = 8  # images that are reconstructed at each checkpoint


@dataclass(frozen=True)
class Plan:
    """How many images make a step, and how many steps an epoch and the run."""

    images_per_step: int
    steps_per_epoch: int
    total_steps: int

    @classmethod
    def of(cls, images_per_step: int, source: Source, repeats: int, epochs: int) -> "Plan":
        """The last images of an epoch that make no whole step are left out.

        Raises:
            UserError: if there is none.
        """
        steps_per_epoch = len(source) * repeats // images_per_step
        if steps_per_epoch == 0:
            raise UserError(
                f"{source.root} holds {len(source)} images, fewer than one step of {images_per_step}; "
                "lower --batch-size or --accum-iter"
            )
        return cls(images_per_step, steps_per_epoch, steps_per_epoch * epochs)


def pretrain(config: PretrainConfig) -> None:
    """Train as ``config`` says, resuming from the newest good checkpoint in ``config.output_dir``.

    In each process that ``torchrun`` has started, or in this one alone.

    Raises:
        UserError: on anything that the user has to change.
        SystemExit: after a signal that asked for the end: the run is saved, and its line continues it.
    """
    try:
        with processes(config.device) as among, Signals() as signals, ExitStack() as stack:
            _pretrain(config, among, signals, stack)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU's memory is full ({str(error).splitlines()[0]}); lower --batch-size and raise --accum-iter as "
            "much, or use --grad-checkpointing; --dry-run shows what a step takes"
        ) from error
    if signals.caught:
        sys.exit(signals.exit_status())


def _pretrain(config: PretrainConfig, among: Processes, signals: Signals, stack: ExitStack) -> None:
    say, tell = (print, warn) if among.first else (_silent, _silent)
    keep_freed_memory()
    source = open_source(config.data_path, "train")
    torch.manual_seed(config.seed)
    kwargs = {"img_size": config.input_size, "norm_pix_loss": config.norm_pix_loss}
    try:
        model = build(config.model, **kwargs)
    except ValueError as error:
        raise UserError(f"--model {config.model}: {error}") from error
    if config.init:
        _start_from(model, config.init, say)
    model.to(among.device)
    model.set_grad_checkpointing(config.grad_checkpointing)
    bad = known_bad(source, model.in_chans, config.bad_list)
    num_patches = model.patch_embed.num_patches
    check_mask_ratio(num_patches, config.mask_ratio)
    plan = Plan.of(config.batch_size * config.accum_iter * among.world, source, config.repeats, config.epochs)
    decoder, why = choose_decoder() if config.decoder == "auto" else (config.decoder, "")
    # What a run is resumed with may be spread otherwise over processes and micro-batches.
    settings = config.model_dump(mode="json", exclude={*FREE, "batch_size", "accum_iter"})
    settings |= {"images_per_step": plan.images_per_step, "decoder": decoder, "images": source.fingerprint[:16]}
    run = RunFolder(config.output_dir)
    if config.dry_run:
        run.check(settings)
    elif among.first:
        stack.enter_context(closing(run)).open(settings)
        checkpoint.remove_leftovers(run.checkpoints)

    lr = config.lr or config.blr * plan.images_per_step / 256
    bf16 = wants_bf16(config.dtype, among.device)
    spread_model = spread(model, config.strategy, among)
    optimizer = adamw(model, lr, config.weight_decay, working_dtype=torch.bfloat16 if bf16 else None)
    ema = Ema(model, config.ema_decay) if config.ema_decay else None
    averages = ema.averages if ema else {}
    warmup_steps = round(config.warmup_epochs * plan.steps_per_epoch)
    schedule = WarmupCosine(optimizer, warmup_steps=warmup_steps, total_steps=plan.total_steps, min_lr=config.min_lr)
    step = 0
    found = _newest(run, among, tell)
    if found:
        found.load(model, optimizer, averages)
        step = found.step
        say(f"resuming {run.path} at step {step} of {plan.total_steps}")
    if step == plan.total_steps:
        say(f"{run.path} is finished: {plan.total_steps} steps, {config.epochs} epochs")
        return
    track = None
    if among.first and not config.dry_run:
        run.rewind_log(step)
        track = stack.enter_context(closing(Track(run, config.log_dir, config.wandb, settings, step)))

    if config.cache:
        source = Cached(source, model.in_chans, config.exif, config.num_workers)
    say(
        f"{config.model}, {len(source)} images, {config.epochs} epochs = {plan.total_steps} steps of "
        f"{plan.images_per_step} images, lr {lr:.2e}, {'bf16' if bf16 else 'fp32'} on {among.device}"
        f"{(among.world > 1 and f', {among.world} processes ({config.strategy})') or ''}, "
        f"decoded by {decoder}{why and f' ({why})'}"
    )
    batches = training_batches(
        source,
        size=model.patch_embed.img_size,
        channels=model.in_chans,
        num_patches=num_patches,
        batch_size=config.batch_size,
        batches_per_epoch=plan.steps_per_epoch * config.accum_iter,
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
    saved_state = found.state if found else {}
    losses = [torch.tensor(x, device=among.device) for x in saved_state.get("losses", ())]
    model.train()
    saver = stack.enter_context(closing(checkpoint.Saver(run.checkpoints, warn)))
    draw = _pictures(config, model, among) if config.log_dir or config.wandb else None

    def roll_back() -> None:
        saver.wait()
        good = _newest(run, among, tell, guard.bad_steps)
        if good is None:
            tell("there is no checkpoint to go back to")
            return
        good.load(model, optimizer, averages)
        take.recapture()
        tell(f"went back to the weights of step {good.step}")

    guard = Guard(
        model, optimizer, run.path / "not_finite", config.seed, among, roll_back, tell, config.clip_grad,
        saved_state.get("guard"),
    )  # fmt: skip
    take = TrainStep(
        model, spread_model, guard.update, optimizer,
        accum_iter=config.accum_iter, mask_ratio=config.mask_ratio, bf16=bf16, form=config.step, tell=tell,
    )  # fmt: skip
    last_step = step + 1 if config.dry_run else plan.total_steps
    progress = stack.enter_context(
        Progress(plan.total_steps, step, plan.images_per_step, plan.steps_per_epoch, quiet=not among.first)
    )
    profiler = stack.enter_context(_profiler(config.profile if among.first else None))
    while step < last_step:
        rate = schedule.set(step)
        ids: list[int] = []
        for micro in range(config.accum_iter):
            with progress.waiting():
                batch = next(batches)
            skipped.add(batch)
            ids += batch.ids.tolist()
            batch = batch.to(among.device)
            losses.append(take.backward(batch.images, batch.noise, micro))
        step += 1
        guard.settle()
        guard.watch(take.update(), step, ids)
        if ema:
            ema.update()
        profiler()
        if config.dry_run:
            break
        ending = among.any(signals.caught is not None)
        mean_loss = None
        if step % config.log_every == 0 or step == plan.total_steps:
            finite = [x for x in _values(losses, among) if math.isfinite(x)]
            mean_loss = statistics.fmean(finite) if finite else None
            losses.clear()
            total_skipped = among.sum(len(skipped))
            if track:
                track.scalars(
                    {
                        "step": step,
                        "epoch": (step - 1) // plan.steps_per_epoch,
                        "train_loss": mean_loss,
                        "train_lr": rate,
                        "images_per_s": round(progress.images_per_s(step), 1),
                        "waiting": round(progress.share_waiting(), 4),
                        "skipped": total_skipped,
                        "not_finite": len(guard.bad_steps),
                    }
                )
        progress.update(step, rate, mean_loss, len(skipped))
        if step % config.save_every == 0 or step == plan.total_steps or ending:
            guard.settle()
            state = model_state | {"losses": _values(losses, among), "guard": guard.state()}  # losses: not logged yet
            saved = checkpoint.snapshot(step, model, optimizer, state, averages)
            if among.first:
                saver.save(saved, guard.bad_steps)
            if draw:
                image = draw()
                if track:
                    track.picture(step, image)
        if ending:
            say(f"saving {run.path} at step {step}: run the same line again to go on")
            return
    if config.dry_run:
        say(_memory(model, optimizer, averages, among))


def _start_from(model: MaskedAutoencoderViT, path: Path, say: Callable[[str], None]) -> None:
    weights = load_weights(path)
    try:
        keys = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"--init {path} does not fit the model: {error}") from error
    decoder = [name for name in keys.missing_keys if name.startswith("decoder_") or name == "mask_token"]
    if keys.unexpected_keys or len(decoder) < len(keys.missing_keys):
        missing = [name for name in keys.missing_keys if name not in decoder]
        raise UserError(
            f"--init {path} does not fit the model: it lacks {missing or 'nothing'}, "
            f"and has {keys.unexpected_keys or 'nothing'} besides"
        )
    say(f"weights of {path}{'; it has no decoder, which starts at random' if decoder else ''}")


def _newest(
    run: RunFolder, among: Processes, tell: Callable[[str], None], bad_steps: Set[int] | None = None
) -> checkpoint.Checkpoint | None:
    """``checkpoint.newest`` as the first process sees it, so that all go on from the same one."""
    found = checkpoint.newest(run.checkpoints, tell, bad_steps) if among.first else None
    step = among.agree(found.step if found else -1)
    if found or step < 0:
        return found
    path = checkpoint.place(run.checkpoints, step)
    if not path.exists():
        raise UserError(f"process {among.rank} does not see {path}: all must share --output-dir")
    return checkpoint.find(path, tell)


def _pictures(config: PretrainConfig, model: MaskedAutoencoderViT, among: Processes) -> Callable[[], Any]:
    """A function that draws what the model makes of a few images. All processes call it: they may share the weights."""
    source = open_source(config.data_path, "val")
    few = np.linspace(0, len(source) - 1, min(PICTURES, len(source))).round().astype(int).tolist()
    size, num_patches = model.patch_embed.img_size, model.patch_embed.num_patches
    images = torch.stack([centred_image(source, i, size, model.in_chans) for i in few]).to(among.device)
    noise = torch.from_numpy(np.stack([mask_noise(config.seed, 0, i, num_patches) for i in few])).to(among.device)

    def draw() -> Any:
        return picture(reconstruct(model, images, noise, config.mask_ratio), "masked | reconstruction | original")

    return draw


@contextmanager
def _profiler(path: Path | None) -> Iterator[Callable[[], None]]:
    """Gives what is to be called after each step; writes a trace of steps 4 to 6 to ``path``."""
    if path is None:
        yield lambda: None
        return
    from torch.profiler import profile, schedule

    def write(profiler: Any) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
        print(f"wrote {path}")

    with profile(schedule=schedule(wait=2, warmup=1, active=3, repeat=1), on_trace_ready=write) as profiler:
        yield profiler.step


def _memory(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, averages: dict[str, torch.Tensor], among: Processes
) -> str:
    """A line that says what a step's memory went to, in this process."""

    def size(tensors: Iterator[torch.Tensor]) -> int:
        local = (x.to_local() if isinstance(x, DTensor) else x for x in tensors)
        return sum(x.numel() * x.element_size() for x in local)

    state = (x for of_one in optimizer.state.values() for x in of_one.values() if isinstance(x, torch.Tensor))
    parts = {
        "weights": size(iter(model.parameters())),
        "gradients": size(p for p in model.parameters() if p.requires_grad),
        "optimiser": size(state),
        **({"averages": size(iter(averages.values()))} if averages else {}),
    }
    peak = peak_memory()
    if among.device.type == "cuda":
        whole, of = torch.cuda.get_device_properties(among.device).total_memory, "the GPU's"
    else:
        whole, of = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "this machine's"
    listed = ", ".join(f"{name} {value / 2**30:.2f}" for name, value in parts.items())
    rest = (peak - sum(parts.values())) / 2**30
    return (
        f"dry run: one step done, nothing saved. Memory of a process at its peak: {peak / 2**30:.2f} GiB of {of} "
        f"{whole / 2**30:.1f}: {listed}, activations and all else {rest:.2f}"
    )
