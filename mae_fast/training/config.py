"""Configurations of the tasks: the flags of the command line, named as in the official implementation, and presets."""

import difflib
import itertools
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.functional_validators import ModelWrapValidatorHandler

from ..errors import UserError
from ..pixel_dtypes import PixelDtype
from .presets import DETECT_PRESETS, DVAE_PRESETS, FINETUNE_PRESETS, LINPROBE_PRESETS, PRESETS, SEGMENT_PRESETS

Config = TypeVar("Config", bound="RunConfig")

FLOAT32_MAX = 3.4e38
PIXEL_FLAGS = ("pixels", "bands", "nodata", "clip", "mean", "std", "in_chans")
SIZE_FLAGS = ("patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio")


class StageConfig(NamedTuple):
    """A stage of a run: its number of epochs, its image size (height, width), and its batch size per process."""

    size: tuple[int, int]
    epochs: int
    batch_size: int


class RunConfig(BaseModel):
    """The flags of all tasks."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        protected_namespaces=(),
        use_attribute_docstrings=True,
        defer_build=True,
    )
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}  # name -> values that replace the defaults
    # Headings of the help, and the flags of this class under each. A subclass adds its own flags.
    headings: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "data": (
            "data_path", "input_size", "bad_list", "max_bad_fraction", "exif", "crops_per_image", "pixels", "bands",
            "nodata", "clip", "mean", "std",
        ),
        "model": ("in_chans", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio"),
        "masking and target": (),
        "optimisation": (
            "batch_size", "accum_iter", "epochs", "warmup_epochs", "blr", "lr", "min_lr", "weight_decay", "clip_grad",
            "ema_decay",
        ),
        "evaluation": (),
        "run and checkpoint": ("output_dir", "seed", "save_every", "keep", "keep_every", "keep_best", "dry_run"),
        "logging": ("log_every", "log_dir", "wandb", "profile"),
        "hardware": (
            "device", "dtype", "execution", "attention", "strategy", "grad_checkpointing", "image_decoder",
            "num_workers", "cache",
        ),
    }  # fmt: skip

    data_path: Path
    """Folder of images, class folders or tar shards, or a saved Hugging Face dataset. If it contains train/, training
    reads only that."""
    output_dir: Path
    """Folder of the run: config.json, log.jsonl, checkpoints/."""
    input_size: int = Field(224, ge=1)
    """Side of the square input images in pixels."""
    batch_size: int = Field(64, ge=1)
    """Images per process and micro-batch."""
    accum_iter: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    epochs: int = Field(800, ge=1)
    """Passes over the data."""
    warmup_epochs: float = Field(40, ge=0)
    """Epochs of linear warm-up from 0."""
    blr: float = Field(1.5e-4, gt=0)
    """Learning rate per 256 images of effective batch."""
    lr: float | None = Field(None, gt=0)
    """Absolute learning rate, instead of blr."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the half-cosine."""
    weight_decay: float = Field(0.05, ge=0)
    """Weight decay of matrices; vectors and biases are not decayed."""
    clip_grad: float | None = Field(None, gt=0)
    """Clip the gradients to this L2 norm."""
    seed: int = Field(0, ge=0, lt=2**63)
    """Seed of the initial weights, order, crops, flips and masks."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Autocast dtype; auto: bf16 if the device has bf16 instructions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Device to train on; auto: cuda if available."""
    image_decoder: Literal["auto", "dali", "pil"] = "auto"
    """Library that decodes images; auto: the fastest installed one."""
    strategy: Literal["ddp", "fsdp"] = "ddp"
    """How several processes share the model; ddp: each has a copy; fsdp: the weights are sharded."""
    execution: Literal["eager", "compile", "cuda-graph"] = "eager"
    """How a step runs: op by op, through torch.compile, or as replayed CUDA graphs (on a GPU)."""
    attention: Literal["auto", "triton", "xformers", "sdpa"] = "auto"
    """Implementation of attention on a GPU; auto: Triton for up to 320 tokens, else xformers, else torch's SDPA."""
    num_workers: int = Field(2, ge=0)
    """Number of processes that load images; for dali on a CPU, number of threads."""
    crops_per_image: int = Field(1, ge=1)
    """Crops of each decoded image in a batch. More crops load faster, but the batch is less diverse."""
    cache: bool = False
    """Cache all decoded images in memory."""
    exif: bool = False
    """Rotate images by their EXIF orientation. The official implementation does not."""
    pixels: Literal["auto", PixelDtype] = "auto"
    """Dtype of the pixels; auto: the dtype of the images. uint8 scales 16-bit images to 8 bits; other dtypes keep all
    values."""
    bands: str | None = None
    """Bands to use, counted from 1, in this order, such as 4,3,2 or 1-4,7; none: all bands. Without --bands, the images
    must have --in-chans bands."""
    nodata: float | None = None
    """Pixel value that marks missing pixels, in addition to NaN. The loss and all statistics ignore missing pixels."""
    clip: str | None = None
    """Clip pixel values to LOW:HIGH, or to percentiles of each channel, such as 2%:98%."""
    mean: str | None = None
    """Mean of each channel to standardise images with, comma-separated, in the units of the pixels (uint8: 0 to 1).
    auto: measure it on 1,000 images. none: the mean of the weights; else, for uint8 without --bands, --clip and
    --nodata, ImageNet's mean (0.5 unless there are 3 channels); else auto."""
    std: str | None = None
    """Standard deviation of each channel, in the format of --mean."""
    in_chans: int | None = Field(None, ge=1)
    """Channels of the images; none: the number of --bands, else that of the weights, else 3. Weights for another number
    of channels are adapted."""
    patch_size: str | None = None
    """Side of a patch in pixels, or HEIGHTxWIDTH. Default of this flag and the next four: the value in the weights'
    run, else that of --model."""
    embed_dim: int | None = Field(None, ge=1)
    """Width of the encoder."""
    depth: int | None = Field(None, ge=1)
    """Blocks of the encoder."""
    num_heads: int | None = Field(None, ge=1)
    """Heads of the encoder's attention."""
    mlp_ratio: float | None = Field(None, gt=0)
    """Ratio of the hidden width of the MLPs to the width of the model."""
    bad_list: Path | None = None
    """List of unusable images from 'mae-fast data check', if it is not in the image folder."""
    max_bad_fraction: float = Field(0.01, ge=0, le=1)
    """Stop the run if more than this fraction of the images is unusable."""
    log_every: int = Field(20, ge=1)
    """Optimizer steps per line of log.jsonl."""
    save_every: int = Field(1000, ge=1)
    """Optimizer steps between checkpoints."""
    keep: int = Field(2, ge=1)
    """Number of newest checkpoints to keep."""
    keep_every: int | None = Field(None, ge=1)
    """Also save a checkpoint every N epochs, and keep it."""
    keep_best: str | None = None
    """Also save the checkpoint with the best value of this metric of log.jsonl, such as val_acc1, and keep it as
    checkpoints/best. Commands that read weights accept this folder."""
    ema_decay: float | None = Field(None, gt=0, lt=1)
    """Decay of an exponential moving average of the weights, such as 0.9999; none: no average."""
    grad_checkpointing: bool = False
    """Recompute the activations of each block in the backward pass: less memory, about a third more time."""
    log_dir: Path | None = None
    """Write TensorBoard logs to this folder: scalars at each log step, reconstructions at each checkpoint."""
    wandb: str | None = None
    """Log the same scalars and pictures to this Weights & Biases project."""
    profile: Path | None = None
    """Write a profiler trace of steps 4 to 6 after the start, for chrome://tracing or Perfetto, to this file."""
    dry_run: bool = False
    """Build everything, take one step, print its memory use, and save nothing."""

    _given: frozenset[str] | None = PrivateAttr(None)
    _datasets: dict[str, Any] = PrivateAttr(default_factory=dict)

    @classmethod
    def with_preset(cls: type[Config], preset: str | None = None, **flags: Any) -> Config:
        """A configuration with the values of the preset for the flags that are not given.

        Values of the preset that contradict a given flag are ignored.

        Raises:
            UserError: if a name or a value is invalid, or a given flag has no effect with the others.
        """
        values = dict(cls.preset_values(preset))
        if "blr" in flags:
            values.pop("lr", None)
        if flags.get("target", "pixel") != "pixel":
            values.pop("norm_pix_loss", None)
        config = cls(**{**values, **flags})
        config._given = frozenset(flags)
        for name, why in config.without_effect():
            if name in flags:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} {flags[name]} has no effect {why}", "leave one of them out")
        return config

    def with_datasets(self: Config, **datasets: Any) -> Config:
        """A copy that uses ``datasets`` as the sources "train" and "val", instead of ``data_path``."""
        made = self.model_copy()
        made._datasets = {name: source for name, source in datasets.items() if source is not None}
        return made

    def dataset(self, split: str) -> Any:
        """The source given for ``split``; None if there is none."""
        return self._datasets.get(split)

    def was_given(self, name: str) -> bool:
        """Whether the user has set this flag. False if its value is from a preset or is the default."""
        return name in (self.model_fields_set if self._given is None else self._given)

    def switched_on(self, *names: str) -> Iterator[str]:
        """The names of those flags that are neither false, 0 nor None."""
        return (name for name in names if getattr(self, name))

    def without_effect(self) -> Iterator[tuple[str, str]]:
        """Flags without effect, each with the reason. It is an error if the user has given one of them."""
        if self.lr is not None:
            yield "blr", f"with --lr {self.lr:g}, which sets the learning rate itself"
        if getattr(self, "img_size", None):
            yield "input_size", "with --img-size"

    def changed(self: Config, **flags: Any) -> Config:
        """A copy with other values.

        Raises:
            UserError: if a name or a value is invalid.
        """
        made = type(self)(**{name: getattr(self, name) for name in self.model_fields_set} | flags)
        made._given = None if self._given is None else self._given | flags.keys()
        return made

    @classmethod
    def preset_values(cls, preset: str | None) -> Mapping[str, Any]:
        """The values of the preset that differ from the defaults; empty without a preset.

        Raises:
            UserError: if the preset is unknown.
        """
        if preset is not None and preset not in cls.presets:
            raise UserError(f"--preset {preset} is unknown", f"known are {', '.join(cls.presets)}")
        return cls.presets.get(preset or "", {})

    @classmethod
    def sections(cls) -> dict[str, list[str]]:
        """The headings of the help, each with the names of its flags."""
        found: dict[str, list[str]] = {heading: [] for heading in RunConfig.headings}
        for parent in reversed(cls.__mro__):
            for heading, names in vars(parent).get("headings", {}).items():
                found[heading].extend(names)
        return {heading: names for heading, names in found.items() if names}

    @field_validator("bands", "mean", "std", mode="before")
    @classmethod
    def _list_as_text(cls, value: Any) -> Any:
        if isinstance(value, int | float):
            return f"{value:g}"
        return ",".join(f"{x:g}" for x in value) if isinstance(value, list | tuple) else value

    def model_sizes(self) -> dict[str, Any]:
        """The given sizes of the encoder, as constructor arguments.

        Raises:
            UserError: if --patch-size is invalid.
        """
        given = {name: getattr(self, name) for name in ("embed_dim", "depth", "num_heads", "mlp_ratio")}
        given["patch_size"] = None if self.patch_size is None else _sides("patch-size", self.patch_size)
        return {name: value for name, value in given.items() if value is not None}

    def image_sides(self) -> tuple[int, int]:
        """Height and width of the input images.

        Raises:
            UserError: if --img-size is invalid.
        """
        text = getattr(self, "img_size", None)
        return (self.input_size, self.input_size) if text is None else _height_and_width("img-size", text)

    def image_stages(self, size: tuple[int, int]) -> list[StageConfig]:
        """The stages of the run. Without a resolution schedule, it is a single stage with images of ``size``."""
        return [StageConfig(size, self.epochs, self.batch_size)]

    def statistic(self, name: str, channels: int) -> tuple[float, ...] | None:
        """``mean`` or ``std`` of each channel; None if it is not given or is "auto".

        Raises:
            UserError: unless it is one number per channel, and above 0 for ``std``.
        """
        text = getattr(self, name)
        if text is None or text == "auto":
            return None
        try:
            values = tuple(float(word) for word in text.split(","))
        except ValueError as error:
            raise UserError(f"--{name} {text} is invalid", "give auto, or one number per channel: 0.5,0.4") from error
        if not all(abs(x) < FLOAT32_MAX for x in values):  # False for NaN, too
            raise UserError(f"--{name} {text} is invalid", "give finite float32 numbers, or auto")
        if len(values) == 1:
            values *= channels
        if len(values) != channels or (name == "std" and min(values) < 1 / FLOAT32_MAX):
            kind = "number above 0" if name == "std" else "number"
            raise UserError(f"--{name} {text} is invalid", f"give one {kind} for each of {channels} channels, or auto")
        return values

    def clip_limits(self) -> tuple[bool, tuple[tuple[float, float], ...]]:
        """Whether ``clip`` is in percent, and a tuple of its (low, high) pair, empty if it is not given.

        Raises:
            UserError: if it is not a range.
        """
        if self.clip is None:
            return False, ()
        words = self.clip.split(":")
        percent = all(word.endswith("%") for word in words)
        try:
            low, high = (float(word.removesuffix("%")) if percent else float(word) for word in words)
            if not low < high or (percent and not 0 <= low < high <= 100):
                raise ValueError
        except ValueError as error:
            raise UserError(f"--clip {self.clip} is invalid", "give LOW:HIGH, such as 0:4000 or 2%:98%") from error
        return percent, ((low, high),)

    @field_validator("init", "weights", mode="before", check_fields=False)
    @classmethod
    def _path_as_text(cls, value: Any, info: ValidationInfo) -> Any:
        if value == "":  # perhaps from an unset shell variable
            name = str(info.field_name)
            raise UserError(f"{name} '': the name is empty", f"give a file, a folder or a run, or leave --{name} out")
        return os.fspath(value) if isinstance(value, os.PathLike) else value

    @model_validator(mode="wrap")
    @classmethod
    def _checked(cls, values: Any, handler: ModelWrapValidatorHandler[Any]) -> Any:
        try:
            config = handler(values)
        except ValidationError as error:
            raise _user_error(error, cls) from error
        size, crops = config.batch_size, config.crops_per_image
        if size % crops:
            raise UserError(
                f"batch_size must be a multiple of crops_per_image, got {size} and {crops}",
                f"use --batch-size {max(1, size // crops) * crops}",
            )
        if config.warmup_epochs >= config.epochs:
            raise UserError(
                f"warmup_epochs must be below epochs, got {config.warmup_epochs:g} and {config.epochs}",
                f"for example, use --warmup-epochs {config.epochs * 0.05:g}",
            )
        return config


def _sides(flag: str, text: str) -> int | list[int]:
    """Parse a side in pixels, or a height and width if they differ.

    Raises:
        UserError: if ``text`` is neither a number nor HEIGHTxWIDTH.
    """
    words = text.lower().split("x")
    if len(words) > 2 or not all(word.isdecimal() and int(word) > 0 for word in words):
        raise UserError(f"--{flag} {text} is invalid", "give a number of pixels, or HEIGHTxWIDTH, such as 16x8")
    sides = [int(word) for word in words]
    return sides[0] if len({*sides}) == 1 else sides


def _height_and_width(flag: str, text: str) -> tuple[int, int]:
    """Like ``_sides``, but always (height, width)."""
    sides = _sides(flag, text)
    return (sides, sides) if isinstance(sides, int) else (sides[0], sides[1])


def _size_text(size: tuple[int, int]) -> str:
    """A size in the format of the flags."""
    height, width = size
    return f"{height}" if height == width else f"{height}x{width}"


def _user_error(error: ValidationError, kind: type[RunConfig]) -> UserError:
    first = error.errors()[0]
    name = str(first["loc"][0]) if first["loc"] else "configuration"
    if first["type"] == "missing":
        names = [str(each["loc"][0]) for each in error.errors() if each["type"] == "missing"]
        return UserError(f"missing: {', '.join(names)}", "give them")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, kind.model_fields, 1)
        return UserError(f"{name} is unknown", f"did you mean {near[0]}?" if near else None)
    expected = first["msg"].removeprefix("Value error, ").lower()
    return UserError(f"--{name.replace('_', '-')} {first['input']} is invalid", expected)


class PretrainConfig(RunConfig):
    """Pre-train a masked autoencoder. Run the same command again to resume."""

    presets = PRESETS
    headings = {
        "model": ("model", "encoder_mask_token", "decoder_depth", "decoder_embed_dim", "decoder_num_heads", "init"),
        "data": ("img_size", "augmentation", "resolution_schedule"),
        "masking and target": (
            "mask_ratio", "mask_sampling", "masks", "predict_ratio", "target", "norm_pix_loss", "pca_components",
            "tokenizer",
        ),
        "evaluation": ("val_loss", "online_eval", "eval_data", "eval_every"),
    }  # fmt: skip

    model: str = "mae_vit_large_patch16"
    """Name of the model, a factory function of mae_fast."""
    img_size: str | None = None
    """Size of the input images if they are not square, HEIGHTxWIDTH; replaces --input-size."""
    mask_ratio: float = Field(0.75, gt=0, lt=1)
    """Share of the patches to remove."""
    mask_sampling: Literal["random", "block", "grid"] = "random"
    """Kind of masks; random: random patches; block: rectangles, as in BEiT; grid: all but one patch of each
    cell."""
    masks: Path | None = None
    """Draw masks from this .npy file instead: [M, h, w], 1 = removed, the same number of removed patches in each."""
    predict_ratio: float = Field(1.0, gt=0, le=1)
    """Share of the removed patches to predict, drawn at random for each image and step. Below 1, the decoder is
    faster."""
    augmentation: Literal["none", "crop-fixed", "crop", "crop-jitter"] = "crop"
    """Augmentation of images; none: center crops; crop-fixed, crop: random crops of a fixed or of a random size, and
    flips; crop-jitter: crop with colour jitter."""
    resolution_schedule: str | None = None
    """Train on smaller images first, in stages SIZE:SHARE or SIZE:SHARE:BATCH, such as
    112:0.4:512,160:0.3:256,224:0.3:128. SHARE is the share of the epochs; BATCH replaces --batch-size in the stage. The
    last stage must have the image size of the model."""
    encoder_mask_token: bool = False
    """Feed the encoder a mask token for each removed patch, instead of adding mask tokens in the decoder."""
    decoder_depth: int | None = Field(None, ge=0)
    """Blocks of the decoder; none: that of --model. 0 is a linear decoder and requires --encoder-mask-token."""
    decoder_embed_dim: int | None = Field(None, ge=1)
    """Width of the decoder; none: that of --model."""
    decoder_num_heads: int | None = Field(None, ge=1)
    """Attention heads of the decoder; none: that of --model, or width / 32 if --decoder-embed-dim is given."""
    target: Literal["pixel", "pca", "dvae"] = "pixel"
    """Prediction target of a removed patch: its pixels, their principal components, or its dVAE token."""
    norm_pix_loss: bool = False
    """Predict pixels standardised per patch."""
    pca_components: int = Field(96, ge=1)
    """With --target pca: the number of leading components."""
    tokenizer: Path | None = None
    """With --target dvae: a run of 'mae-fast train-dvae', or a file with the weights of OpenAI's DALL-E encoder."""
    init: str | None = None
    """Initial weights: a run, a file or folder in any supported layout, or a hub name; none: random weights."""
    val_loss: bool = False
    """Evaluate the loss on val/ of the evaluation data. The mask of each image is the same in all evaluations."""
    online_eval: Literal["knn", "linear"] | None = None
    """Evaluate the accuracy of frozen, mean-pooled features on val/; knn: by the 20 nearest neighbours in train/;
    linear: by a logistic regression on train/. It does not affect training."""
    eval_data: Path | None = None
    """Evaluation data: a folder with train/ and val/, with class folders for --online-eval; none: --data-path."""
    eval_every: int = Field(1, ge=1)
    """Epochs between evaluations."""

    @model_validator(mode="after")
    def _check_evaluation(self) -> "PretrainConfig":
        if (self.eval_data or self.eval_every > 1) and not (self.val_loss or self.online_eval):
            raise UserError(
                "--eval-data and --eval-every require --val-loss or --online-eval", "add --val-loss or --online-eval"
            )
        return self

    @model_validator(mode="after")
    def _check_schedule(self) -> "PretrainConfig":
        if self.resolution_schedule is None:
            return self
        flag, own = f"--resolution-schedule {self.resolution_schedule}", self.image_sides()
        stages = self.image_stages(own)
        if self.masks:
            raise UserError(f"{flag}: --masks {self.masks} has masks for images of one size", "leave one of them out")
        if stages[-1].size != own:
            last, whole = _size_text(stages[-1].size), _size_text(own)
            raise UserError(
                f"{flag}: the last stage has images of {last} pixels, but the model has images of {whole}",
                f"end with a stage of {whole}, or change --input-size or --img-size",
            )
        for stage in stages:
            if stage.batch_size % self.crops_per_image:
                raise UserError(
                    f"{flag}: a batch size must be a multiple of crops_per_image, got {stage.batch_size} and "
                    f"{self.crops_per_image}",
                    f"use {max(1, stage.batch_size // self.crops_per_image) * self.crops_per_image}",
                )
        return self

    def image_stages(self, size: tuple[int, int]) -> list[StageConfig]:
        """The stages of the resolution schedule. Their ends are rounded to whole epochs.

        Raises:
            UserError: if the schedule is invalid, or a stage is shorter than one epoch.
        """
        if self.resolution_schedule is None:
            return super().image_stages(size)
        parsed = self._parsed_schedule()
        shares = [share for _, share, _ in parsed]
        ends = [math.floor(share * self.epochs + 0.5) for share in itertools.accumulate(shares)]
        epochs = [end - start for start, end in itertools.pairwise([0, *ends[:-1], self.epochs])]
        if min(epochs) < 1:
            raise UserError(
                f"--resolution-schedule {self.resolution_schedule}: with --epochs {self.epochs}, a share of "
                f"{shares[epochs.index(min(epochs))]:g} is not one whole epoch",
                f"use --epochs {math.ceil(1 / min(shares))} or more, or larger shares",
            )
        return [StageConfig(sides, n, batch) for (sides, _, batch), n in zip(parsed, epochs, strict=True)]

    def schedule_of_all(self, batches: int) -> str | None:
        """The resolution schedule with BATCH as images per step. ``batches``: batches per step of all processes."""
        if self.resolution_schedule is None:
            return None
        parsed = self._parsed_schedule()
        return ",".join(f"{_size_text(size)}:{share!r}:{batch * batches}" for size, share, batch in parsed)

    def _parsed_schedule(self) -> list[tuple[tuple[int, int], float, int]]:
        """Image size, share and batch size of each stage."""
        text, stages = self.resolution_schedule or "", []
        hint = "give SIZE:SHARE or SIZE:SHARE:BATCH for each stage, such as 112:0.4:512,160:0.3:256,224:0.3"
        for stage in text.split(","):
            words = stage.strip().split(":")
            try:
                size, share, batch = words[0], float(words[1]), int(words[2]) if words[2:] else self.batch_size
            except (IndexError, ValueError) as error:
                raise UserError(f"--resolution-schedule {text}: {stage!r} is not a stage", hint) from error
            if len(words) > 3 or not 0 < share <= 1 or batch < 1:
                raise UserError(f"--resolution-schedule {text}: {stage!r} is not a stage", hint)
            stages.append((_height_and_width("resolution-schedule", size), share, batch))
        if not math.isclose(total := sum(share for _, share, _ in stages), 1, abs_tol=1e-6):
            raise UserError(
                f"--resolution-schedule {text}: the shares must sum to 1, got {total:g}",
                "change the last one, for example",
            )
        return stages

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().without_effect()
        if self.masks:
            for name in ("mask_ratio", "mask_sampling"):
                yield name, f"with --masks {self.masks}, which provides the masks"
        if self.target != "pca":
            yield "pca_components", f"with --target {self.target}"
        if self.decoder_depth == 0:
            yield "decoder_num_heads", "with --decoder-depth 0"


class EvaluatedConfig(RunConfig):
    """The flags of the tasks that fine-tune or probe an encoder and evaluate on held-out images."""

    headings = {
        "model": ("model", "weights"),
        "evaluation": ("eval_every", "eval_only", "predictions", "ema"),
    }

    model: str = "vit_base_patch16"
    """Name of the encoder, a factory function of mae_fast."""
    weights: str | None = None
    """Initial weights of the encoder: a run, a file or folder in any supported layout, or a hub name; none: random
    weights."""
    eval_every: int = Field(1, ge=1)
    """Epochs between evaluations on the held-out images."""
    eval_only: bool = False
    """Do not train: evaluate the run in --output-dir on the held-out images, and print the metrics."""
    predictions: Path | None = None
    """With --eval-only: write the predictions to this file."""
    ema: bool = False
    """With --eval-only: evaluate the averaged weights of a run trained with --ema-decay."""

    @model_validator(mode="after")
    def _check_eval_only(self) -> "EvaluatedConfig":
        if (self.predictions or self.ema) and not self.eval_only:
            raise UserError("--predictions and --ema require --eval-only", "add it")
        if self.predictions and not self.predictions.absolute().parent.is_dir():
            raise UserError(f"--predictions {self.predictions}: its folder does not exist", "make it, or give another")
        return self

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().without_effect()
        if self.eval_only and self.dry_run:
            yield "dry_run", "with --eval-only, which does not train"


class ClassifyConfig(EvaluatedConfig):
    """The flags that fine-tuning and linear probing share."""

    headings = {
        "model": ("global_pool",),
        "data": ("img_size", "labels", "multi_label", "cache_features", "sampler"),
        "optimisation": ("class_weights",),
    }

    data_path: Path
    """Folder with train/ and val/, which contain the same class folders, or tar shards with labels; or a saved Hugging
    Face DatasetDict with these splits. With --labels, images at any depth."""
    model: str = "vit_base_patch16"
    """Name of the model, a factory function of mae_fast; or timm/NAME for a plain vision transformer of timm."""
    weights: str | None = None
    """Initial weights: a run, a file or folder in any supported layout, or a hub name; for timm's models a file that
    timm reads, or "pretrained" for timm's own weights; none: random weights."""
    img_size: str | None = None
    """Size of the input images if they are not square, HEIGHTxWIDTH; replaces --input-size."""
    global_pool: bool = True
    """Use the mean of the patch tokens as input of the head; otherwise the class token."""
    labels: Path | None = None
    """CSV file of the classes, instead of class folders: a header, and two columns, the image and its class."""
    multi_label: Path | None = None
    """CSV file of the labels, for images with several labels. The first column has the names of the images. The others
    are one column of 0 and 1 per label, or a single column with a list of labels, separated by | or ; or commas."""
    class_weights: Literal["none", "balanced"] = "none"
    """Class weights of the loss; balanced: n / (k * count), for n images of k classes, count images in the class."""
    sampler: Literal["shuffle", "balanced"] = "shuffle"
    """Sampling of an epoch's images; shuffle: each image once; balanced: the same number of images of each class.
    Steps per epoch are unchanged."""
    eval_only: bool = False
    """Do not train: print accuracies, metrics per class and the confusion matrix of the run in --output-dir, or of
    --weights."""
    predictions: Path | None = None
    """With --eval-only: write the class, prediction and probability of each image to this CSV file."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().without_effect()
        if self.multi_label:
            for name, off in (("class_weights", "none"), ("sampler", "shuffle")):
                if getattr(self, name) != off:
                    yield name, "with --multi-label, as images have several classes"
        if self.model.startswith("timm/"):
            yield "global_pool", f"with --model {self.model}, which has its own pooling"
            yield "attention", f"with --model {self.model}, which has its own attention"
            for name in SIZE_FLAGS:
                yield name, f"with --model {self.model}, which has its own sizes"


class FinetuneConfig(ClassifyConfig):
    """Fine-tune a classifier, from pre-trained weights or from scratch. Run the same command again to resume."""

    presets = FINETUNE_PRESETS
    headings = {
        "model": ("train_blocks", "drop_path"),
        "data": ("scale", "aa", "reprob", "mixup", "cutmix"),
        "optimisation": ("layer_decay", "beta2", "smoothing"),
    }

    batch_size: int = Field(32, ge=1)
    """Images per process and micro-batch."""
    epochs: int = Field(50, ge=1)
    """Passes over the data."""
    warmup_epochs: float = Field(5, ge=0)
    """Epochs of linear warm-up from 0."""
    blr: float = Field(5e-4, gt=0)
    """Learning rate per 256 images of effective batch."""
    min_lr: float = Field(1e-6, ge=0)
    """Learning rate at the end of the half-cosine."""
    layer_decay: float = Field(0.75, gt=0, le=1)
    """Layer-wise learning rate decay: factor from each block to the previous one."""
    beta2: float = Field(0.999, ge=0, lt=1)
    """AdamW's second beta; the first is 0.9."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth rate of the last block. Rates grow linearly from 0 (first block) to this value."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Smallest and largest area of a random crop, as a share of the image."""
    aa: str | None = "rand-m9-mstd0.5-inc1"
    """RandAugment policy in timm's notation; none: only crops and flips."""
    reprob: float = Field(0.25, ge=0, le=1)
    """Probability of random erasing."""
    smoothing: float = Field(0.1, ge=0, lt=1)
    """Label smoothing."""
    mixup: float = Field(0.8, ge=0)
    """Mixup alpha; 0: off."""
    cutmix: float = Field(1.0, ge=0)
    """CutMix alpha; 0: off."""
    train_blocks: float | Literal["all"] = "all"
    """Number of last blocks to train, with the norm and the head after them; 0.5: the MLP of the last block."""
    cache_features: bool = False
    """Compute the output of the frozen blocks once per image, from center crops. Disables augmentation, mixing and
    label smoothing."""

    @field_validator("scale")
    @classmethod
    def _two_shares(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1] <= 1:
            raise ValueError("give two numbers above 0 and up to 1, the smaller one first")
        return scale

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().without_effect()
        if self.cache_features:
            yield "scale", "with --cache-features, which uses center crops"
        if self.multi_label:
            for name in self.switched_on("mixup", "cutmix", "smoothing"):
                yield name, "with --multi-label, which does not change labels"
        if self.cache_features:
            for name in self.switched_on("aa", "reprob", "mixup", "cutmix", "smoothing"):
                yield name, "with --cache-features, which disables augmentation"
        if self.train_blocks != "all" and self.train_blocks < 1:
            for name in self.switched_on("drop_path", "grad_checkpointing"):
                yield name, f"with --train-blocks {self.train_blocks:g}, as no whole block is trained"
        if self.train_blocks == 0 and self.layer_decay < 1:
            yield "layer_decay", "with --train-blocks 0, as no block is trained"


class LinprobeConfig(ClassifyConfig):
    """Train a linear classifier on frozen features. Run the same command again to resume."""

    presets = LINPROBE_PRESETS

    global_pool: bool = False
    """Use the mean of the patch tokens as input of the head; otherwise the class token."""
    batch_size: int = Field(512, ge=1)
    """Images per process and micro-batch."""
    epochs: int = Field(90, ge=1)
    """Passes over the data."""
    warmup_epochs: float = Field(10, ge=0)
    """Epochs of linear warm-up from 0."""
    blr: float = Field(0.1, gt=0)
    """Learning rate per 256 images of effective batch."""
    weight_decay: float = Field(0.0, ge=0)
    """LARS's weight decay of the head's weight matrix."""
    cache_features: bool = False
    """Compute the features once per image, from center crops without augmentation."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().without_effect()
        if self.grad_checkpointing:
            yield "grad_checkpointing", "in a linear probe, as the blocks are frozen"


class DenseConfig(EvaluatedConfig):
    """The flags that segmentation and detection share."""

    headings = {"model": ("drop_path", "freeze_encoder"), "optimisation": ("layer_decay",)}

    layer_decay: float = Field(0.65, gt=0, le=1)
    """Layer-wise learning rate decay: factor from each block to the previous one."""
    drop_path: float = Field(0.1, ge=0, lt=1)
    """Stochastic depth rate of the last block. Rates grow linearly from 0 (first block) to this value."""
    freeze_encoder: bool = False
    """Train only the head."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().without_effect()
        if self.freeze_encoder:
            for name in self.switched_on("drop_path", "grad_checkpointing"):
                yield name, "with --freeze-encoder"
            if self.layer_decay < 1:
                yield "layer_decay", "with --freeze-encoder"


class SegmentConfig(DenseConfig):
    """Train semantic segmentation on images and masks. Run the same command again to resume."""

    presets = SEGMENT_PRESETS
    headings = {"model": ("head_channels",)}

    data_path: Path
    """Folder with train/ and val/, each with images/ and masks/ (PNG, TIFF or .npy); or ADE20K's folder with images/
    and annotations/."""
    input_size: int = Field(512, ge=1)
    """Side of the square training crops in pixels, and of the sliding window in the evaluation."""
    batch_size: int = Field(16, ge=1)
    """Images per process and micro-batch."""
    epochs: int = Field(100, ge=1)
    """Passes over the data."""
    warmup_epochs: float = Field(1, ge=0)
    """Epochs of linear warm-up from 0."""
    blr: float = Field(1.6e-3, gt=0)
    """Learning rate per 256 images of effective batch."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate at the end of the linear decay."""
    head_channels: int = Field(512, ge=1)
    """Width of the head."""
    predictions: Path | None = None
    """With --eval-only: write the predicted classes of each image to this new folder, as a PNG with the name of its
    mask."""


class DetectConfig(DenseConfig):
    """Train detection and instance segmentation on COCO files. Run the same command again to resume."""

    presets = DETECT_PRESETS
    headings = {"model": ("window", "masks"), "data": ("scale",)}

    data_path: Path
    """Folder with annotations/instances_train2017.json and annotations/instances_val2017.json, and the images in
    train2017/ and val2017/. The year can be omitted from any name."""
    input_size: int = Field(1024, ge=1)
    """Side in pixels of the square input; images are scaled to fit and padded."""
    epochs: int = Field(100, ge=1)
    """Passes over the data."""
    warmup_epochs: float = Field(0.14, ge=0)
    """Epochs of linear warm-up from 0."""
    blr: float = Field(4e-4, gt=0)
    """Learning rate per 256 images of effective batch."""
    min_lr: float = Field(0.0, ge=0, le=0)
    """Unused (step schedule); must be 0. The learning rate falls to 1/10 at 8/9 of all steps, and to 1/100 at 26/27."""
    weight_decay: float = Field(0.1, ge=0)
    """Weight decay of matrices; vectors and biases are not decayed."""
    layer_decay: float = Field(0.7, gt=0, le=1)
    """Layer-wise learning rate decay: factor from each block to the previous one."""
    window: int = Field(14, ge=0)
    """Side in patches of the attention windows; 0: none. The last block of each quarter has global attention."""
    scale: tuple[float, float] = (0.1, 2.0)
    """Range of the random scale of images, relative to the size that fits the square (large-scale jitter)."""
    masks: bool = True
    """Predict boxes and masks (Mask R-CNN), or only boxes (Faster R-CNN)."""
    predictions: Path | None = None
    """With --eval-only: write the detections to this file, in COCO's results format."""

    @field_validator("scale")
    @classmethod
    def _two_factors(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError("give two factors above 0, the smaller one first")
        return scale


class DvaeConfig(RunConfig):
    """Train a discrete VAE, the tokenizer of 'pretrain --target dvae'. Run the same command again to resume."""

    presets = DVAE_PRESETS
    headings = {
        "model": ("vocab_size", "hidden", "groups"),
        "optimisation": ("kl_weight", "temperature_start", "temperature_end", "anneal_epochs"),
    }

    input_size: int = Field(112, ge=1)
    """Side of the square input images in pixels."""
    epochs: int = Field(50, ge=1)
    """Passes over the data."""
    warmup_epochs: float = Field(1, ge=0)
    """Epochs of linear warm-up from 0."""
    blr: float = Field(5e-5, gt=0)
    """Learning rate per 256 images of effective batch."""
    weight_decay: float = Field(1e-4, ge=0)
    """Weight decay of matrices; vectors and biases are not decayed."""
    vocab_size: int = Field(8192, ge=2)
    """Size of the codebook: the number of different tokens."""
    hidden: int = Field(256, ge=4, multiple_of=4)
    """Channels at the resolution of the images. They double at each lower resolution."""
    groups: int = Field(4, ge=1)
    """Number of resolutions, each half of the previous one. 4 gives tokens of 8 x 8 pixels."""
    kl_weight: float = Field(6.6, ge=0)
    """Weight of the KL divergence of the code distribution from the uniform one."""
    temperature_start: float = Field(1.0, gt=0)
    """Initial temperature of the Gumbel-softmax."""
    temperature_end: float = Field(0.0625, gt=0)
    """Temperature after --anneal-epochs, reached along half a cosine."""
    anneal_epochs: float = Field(10, ge=0)
    """Epochs over which the temperature falls."""

    def without_effect(self) -> Iterator[tuple[str, str]]:
        yield from super().without_effect()
        yield "attention", "in a dVAE, which has no attention"
        for name in PIXEL_FLAGS:
            yield name, "in a dVAE, which reads 8-bit RGB"
        for name in SIZE_FLAGS:
            yield name, "in a dVAE, which has no patches"
