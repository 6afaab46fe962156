"""Converts files and folders of weights."""

import contextlib
import copy
import io
import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from ..models.vit import VisionTransformer
from .convert import convert, detect, fold_batch_norm
from .create import find_weights, load_run
from .export import write_new_file
from .files import METADATA_KEY
from .hub_configs import (
    FOLDER_LAYOUTS,
    PTH_KEYS,
    processor_config,
    timm_config,
    transformers_config,
    unrecorded_settings,
)
from .metadata import Model, ModelMetadata, build_model, config_folder, read_config, read_weights
from .run_reader import run_or_checkpoint

logger = logging.getLogger(__name__)

FILE_ENDINGS = (".safetensors", ".pth")
OTHER_ENDINGS = (".bin", ".pt", ".ckpt")  # refused, also as names of folders


@dataclass(frozen=True)
class ConversionOptions:
    """Options of ``convert_files``.

    Attributes:
        source_layout: "auto" or a layout in ``LAYOUTS``.
        verify: load the source and the target with their libraries and with this package, and compare the outputs
            with those of the source's model. If any differ, nothing is written.
        ema: convert the averaged weights of a run.
        metadata: settings of the model. They must not contradict those that the source records.
    """

    source_layout: str = "auto"
    verify: bool = False
    ema: bool = False
    metadata: ModelMetadata = field(default_factory=ModelMetadata)


class _OutputsDiffer(Exception):
    """The target's outputs differ from the source's."""


def convert_files(source: str | Path, target: Path, to: str, options: ConversionOptions = ConversionOptions()) -> bool:
    """Convert ``source`` to ``target`` in the layout ``to``. Log all changes and comparisons.

    Args:
        source: a file; a folder of transformers, timm or ``save_pretrained``; the folder of a training run or of one
            of its checkpoints; or a repository on the hub.
        target: as in ``save_weights``.
        to: a layout in ``LAYOUTS``.

    Returns:
        Whether the target was written. False if outputs differ.

    Raises:
        UserError: if the source cannot be read or converted, or the target cannot be written.
    """
    _check_target(target, to)
    source = find_weights(source)
    weights, recorded, run_model = _read_source(source, options.ema)
    layout = options.source_layout
    if layout == "auto":
        layout = "timm" if "architecture" in read_config(source) else detect(weights)
    for name in ("num_heads", "decoder_num_heads", "norm_eps", "norm_pix_loss"):
        ours, theirs = getattr(options.metadata, name), getattr(recorded, name)
        if None not in (ours, theirs) and ours != theirs:
            flag = f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} {ours}: {source} records {theirs}", f"leave {flag} out")
    own = convert(weights, layout, "ours").weights
    metadata, notes = options.metadata.filled_from(recorded).for_pixels(own["patch_embed.proj.weight"].shape[1])
    converted = convert(weights, layout, to)
    model = build_model(own, metadata) if options.verify or target.suffix not in FILE_ENDINGS else None
    if not (model or run_model):
        _check_fit(own, metadata)
    if model and metadata.norm_eps is None:
        eps = f"using {model.norm_eps}, set another with --norm-eps"
        notes.append(f"{source} does not record the eps of its layer norms: {eps}")
    for note in (*notes, *converted.notes):
        logger.info("note: %s", note)
    unrecorded = unrecorded_settings(target, to, metadata, own)

    def verify(written: Path) -> None:
        assert model is not None
        with tempfile.TemporaryDirectory() as folder:
            readers = [(to, written)] if to != "ours" else []
            if layout != "ours":
                same_layout = convert(weights, layout, layout).weights
                readers.insert(0, (layout, _copy_with_weights(source, same_layout, Path(folder))))
            truth = _with_folded_head(run_model) or _from_pretrained(source) or model
            _verify(truth, model, [*readers, ("ours", written)], metadata)

    try:
        save_weights(target, to, converted.weights, metadata, model, verify if options.verify else None)
    except _OutputsDiffer:
        logger.info("nothing written")
        return False
    if unrecorded:
        logger.warning(unrecorded)
    logger.info("wrote %d tensors of layout %s to %s as %s", len(converted.weights), layout, target, to)
    return True


def _check_fit(weights: dict[str, Tensor], metadata: ModelMetadata) -> None:
    """Raise ``UserError`` unless our ``weights`` fit each other and the known settings."""
    table, kernel = weights["pos_embed"], weights["patch_embed.proj.weight"].shape[2:]
    heads = metadata.num_heads or 1, metadata.decoder_num_heads or 1  # 1 divides any width
    known = replace(metadata, num_heads=heads[0], decoder_num_heads=heads[1])
    if known.img_size is None and table.ndim == 3 and len(kernel) == 2:
        known = replace(known, img_size=((table.shape[1] - 1) * kernel[0], kernel[1]))
    with torch.device("meta"):
        build_model({name: value.to("meta") for name, value in weights.items()}, known)


def _read_source(source: Path, ema: bool) -> tuple[dict[str, Tensor], ModelMetadata, Model | None]:
    """The weights of ``source``, its metadata, and the model if the source is a run, else None."""
    if run := run_or_checkpoint(source):
        model, checkpoint = load_run(run, ema)
        metadata = ModelMetadata.from_model(model).filled_from(
            ModelMetadata.from_state(checkpoint.state, checkpoint.path)
        )
        return model.state_dict(), metadata, model
    if ema:
        raise UserError(f"--ema needs a training run, got {source}", "leave --ema out")
    return *read_weights(source), None


def _with_folded_head(model: Model | None) -> Model | None:
    """The model with the head of a linear probe folded and rounded to the weights' dtype, as it is written."""
    if isinstance(model, VisionTransformer) and isinstance(model.head, nn.Sequential):
        weights = fold_batch_norm(model.state_dict())
        model = copy.deepcopy(model)
        model.head = nn.Linear(model.cls_token.shape[2], model.num_classes).to(model.cls_token)
        model.load_state_dict(weights)
    return model


def _from_pretrained(source: Path) -> Model | None:
    """The model in a folder of ``save_pretrained``, loaded by ``from_pretrained``. None for other sources."""
    config = read_config(source)
    if "embed_dim" not in config:  # save_pretrained writes the arguments of our constructors
        return None
    kind = MaskedAutoencoderViT if "decoder_embed_dim" in config else VisionTransformer
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # the hub prints "Loading weights from local directory"
            model: Model = kind.from_pretrained(config_folder(source))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{source} is not a folder of save_pretrained ({' '.join(str(error).split())})") from error
    return model


def _copy_with_weights(source: Path, weights: dict[str, Tensor], folder: Path) -> Path:
    """A copy of ``source``, with its configuration if there is one, but with ``weights``, for its own library."""
    has_config = bool(read_config(source))
    path = folder / ("source" if has_config else "source.safetensors")
    if has_config:
        path.mkdir()
        shutil.copy(config_folder(source) / "config.json", path)
    file = path / "model.safetensors" if has_config else path
    save_file({name: x.contiguous() for name, x in weights.items()}, file, {"format": "pt"})
    return path


def _verify(truth: Model, model: Model, readers: list[tuple[str, Path]], metadata: ModelMetadata) -> None:
    """Compare the outputs of each reader with those of ``truth``. Raise ``_OutputsDiffer`` beyond ``LIMIT``."""
    from .verify import LIMIT, differences

    all_agree = True
    for layout, path in readers:
        found = differences(truth, layout, path, model, metadata)
        agree = all(x <= LIMIT for x in found.values())  # False for NaN
        all_agree &= agree
        both = "the source and mae_fast's reader" if layout == "ours" else f"{layout} and mae_fast"
        listed = ", ".join(f"{name} {x:.2g}" for name, x in found.items())
        logger.info(
            "%s %s, relative to the largest value: %s (limit %g)", both, "agree" if agree else "DIFFER", listed, LIMIT
        )
    if not all_agree:
        raise _OutputsDiffer


def save_weights(
    path: Path,
    layout: str,
    weights: dict[str, Tensor],
    metadata: ModelMetadata,
    model: Model | None,
    verify: Callable[[Path], None] | None = None,
) -> None:
    """Write ``weights``, which have the names of ``layout``. If it fails, no file is left.

    Args:
        path: a ``.safetensors`` or ``.pth`` file, else a folder. A folder gets ``config.json`` and
            ``model.safetensors``, for ``from_pretrained`` of transformers or ``timm.create_model("local-dir:FOLDER")``.
        layout: a layout in ``LAYOUTS``.
        metadata: settings of the model. They are written if the file format can hold them.
        model: a model with these weights. Needed for a folder.
        verify: called with the written file before it is moved to ``path``. An exception cancels the move.

    Raises:
        UserError: if ``path`` exists, the library does not load folders, or it has no such model.
    """
    _check_target(path, layout)

    def write(temporary: Path) -> None:
        if temporary.suffix == ".pth":
            _write_pth(temporary, layout, weights, metadata)
        else:
            file = temporary
            if temporary.suffix != ".safetensors":
                assert model is not None
                _write_configs(temporary, layout, model, metadata)
                file = temporary / "model.safetensors"
            # transformers 4.x refuses files without "format"
            header = {"format": "pt", METADATA_KEY: json.dumps(metadata.to_dict())}
            save_file({name: tensor.contiguous() for name, tensor in weights.items()}, file, header)
        if verify:
            verify(temporary)

    try:
        write_new_file(path, write)
    except (SafetensorError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        raise UserError(f"{path} cannot be written ({' '.join(str(error).split())})") from error


def _write_pth(file: Path, layout: str, weights: dict[str, Tensor], metadata: ModelMetadata) -> None:
    settings = {METADATA_KEY: metadata.to_dict()} if metadata.to_dict() else {}
    torch.save({PTH_KEYS[layout]: weights, **settings} if layout in PTH_KEYS else weights, file)


def _write_configs(folder: Path, layout: str, model: Model, metadata: ModelMetadata) -> None:
    if layout == "timm":
        configs = {"config.json": timm_config(model, metadata)}
    else:
        configs = {
            "config.json": transformers_config(model, metadata),
            "preprocessor_config.json": processor_config(model, metadata),
        }
    folder.mkdir()
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")


def _check_target(path: Path, layout: str) -> None:
    if path.suffix in OTHER_ENDINGS or (path.suffix not in FILE_ENDINGS and layout not in FOLDER_LAYOUTS):
        endings = " or ".join(FILE_ENDINGS)
        if layout in FOLDER_LAYOUTS:
            raise UserError(f"{path} has an unsupported ending", f"give a folder, or a file that ends in {endings}")
        raise UserError(f"{path}: the layout {layout} is written to files only", f"give a name that ends in {endings}")
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists", "give another name, or remove it")
