"""Exports models to torch.export and ONNX. The graphs are those of the reference model and contain only torch's ops.

Shapes: N images (any number), C channels, H x W pixels, L patches, D encoder width, P values per patch.
"""

import copy
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line
from ..models.mae import MaskedAutoencoderViT
from ..models.reference import ReferenceMAE, ReferenceViT
from ..models.segmentation import SegmentationModel
from ..models.vit import VisionTransformer
from ..ops.patches import without_missing
from .files import METADATA_KEY
from .metadata import UNKNOWN, Model, ModelMetadata

Part = Literal["classifier", "segmentation", "encoder", "reconstruction"]
# Limit of the difference between onnxruntime and torch, relative to the largest value. fp32 rounding is about 1e-6.
LIMIT = 1e-4
Exportable = Model | SegmentationModel


class _Encoder(nn.Module):
    """Images [N, C, H, W] -> tokens [N, 1+L, D] after the last norm, class token first, all patches in image order."""

    def __init__(self, mae: ReferenceMAE) -> None:
        super().__init__()
        self.mae = mae

    def forward(self, images: Tensor) -> Tensor:
        mae = self.mae
        x = mae.patch_embed["proj"](images).flatten(2).transpose(1, 2) + mae.pos_embed[:, 1:]
        x = torch.cat([(mae.cls_token + mae.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], dim=1)
        for block in mae.blocks:
            x = block(x)
        out: Tensor = mae.norm(x)
        return out


class _Reconstruction(nn.Module):
    """Images [N, C, H, W] and noise [N, L] -> pred [N, L, P] and mask [N, L], like ``MaskedAutoencoderViT.forward``."""

    def __init__(self, mae: ReferenceMAE, mask_ratio: float) -> None:
        super().__init__()
        self.mae, self.mask_ratio = mae, mask_ratio

    def forward(self, images: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        latent, mask, ids_restore = self.mae.forward_encoder(images, self.mask_ratio, noise)
        return self.mae.forward_decoder(latent, ids_restore), mask


class _Classifier(nn.Module):
    """Images [N, C, H, W] -> logits [N, num_classes]."""

    def __init__(self, vit: ReferenceViT) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.vit(images)
        return logits


class _FromRawPixels(nn.Module):
    """Standardises raw pixels [N, H, W, C] and calls ``part``. Missing values become the mean."""

    mean: Tensor
    std: Tensor

    def __init__(self, part: nn.Module, model: Exportable) -> None:
        super().__init__()
        net = _backbone(model)
        self.part, self.nodata = part, net.nodata
        self.register_buffer("mean", net.pixel_mean.clone())
        self.register_buffer("std", net.pixel_std.clone())

    def forward(self, images: Tensor, noise: Tensor | None = None) -> Any:
        standard = without_missing(images, self.mean, self.std, self.nodata).to(self.mean.dtype)
        return self.part(standard) if noise is None else self.part(standard, noise)


OUTPUTS: dict[Part, list[str]] = {
    "encoder": ["tokens"],
    "reconstruction": ["pred", "mask"],
    "classifier": ["logits"],
    "segmentation": ["logits"],
}


def parts_of(model: nn.Module) -> list[Part]:
    """The parts of a model that can be exported.

    Raises:
        UserError: if no part can be exported.
    """
    kinds: list[tuple[type[nn.Module], list[Part]]] = [
        (VisionTransformer, ["classifier"]),
        (SegmentationModel, ["segmentation"]),
        (MaskedAutoencoderViT, ["encoder", "reconstruction"]),
    ]
    for kind, parts in kinds:
        if isinstance(model, kind):
            return parts
    if type(model).__name__ == "Detector":
        raise UserError(
            "a detector cannot be exported: the number of its proposals depends on the image",
            "predict with 'mae-fast predict' or mae_fast.load",
        )
    raise UserError(
        f"a {type(model).__name__} of {type(model).__module__} is not a model of this package",
        "export models of other packages with torch.onnx.export",
    )


def _reference(model: Exportable, part: Part, mask_ratio: float, raw_pixels: bool) -> nn.Module:
    """A part of ``model`` in plain torch, with a copy of its weights."""
    made = _reference_part(model, part, mask_ratio)
    return _FromRawPixels(made, model).eval() if raw_pixels else made


def _reference_part(model: Exportable, part: Part, mask_ratio: float) -> nn.Module:
    if part not in (fitting := parts_of(model)):
        raise UserError(f"a {type(model).__name__} has no {part!r} to export", f"give {' or '.join(fitting)}")
    if isinstance(model, SegmentationModel):
        return copy.deepcopy(model).eval()  # while a model is exported, our ops run as torch's
    if model.norm_eps is None:
        raise UserError(
            "the layer norms of this model differ in eps, but only one eps can be exported", "use one norm_layer"
        )
    if not 0 <= mask_ratio < 1:
        raise UserError(f"the mask ratio must be at least 0 and below 1, got {mask_ratio}", "give another")
    try:
        if isinstance(model, VisionTransformer):
            return _Classifier(ReferenceViT.of(model).eval())
        mae = ReferenceMAE.of(model).eval()
    except (RuntimeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"only models with this package's layers can be exported: {why}") from error
    return _Encoder(mae) if part == "encoder" else _Reconstruction(mae, mask_ratio)


def _backbone(model: Exportable) -> Any:
    return model.net if isinstance(model, SegmentationModel) else model


def _example(model: Exportable, part: Part, n: int, like: Tensor, raw_pixels: bool) -> dict[str, Tensor]:
    """Random inputs by name, the same in each call. Floating inputs have the dtype and device of ``like``."""
    net = _backbone(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, net.in_chans, *net.patch_embed.img_size, generator=generator)
    given = {"images": images.to(like)}
    if raw_pixels:
        values = images.permute(0, 2, 3, 1) * net.pixel_std.cpu().float() + net.pixel_mean.cpu().float()
        values = (255 * values).clamp(0, 255) if net.pixel_dtype == "uint8" else values
        dtype = getattr(torch, net.pixel_dtype)
        if not dtype.is_floating_point:
            values = values.clamp(torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        given["images"] = values.to(like.device, dtype)
    if part == "reconstruction":
        given["noise"] = torch.rand(n, net.patch_embed.num_patches, generator=generator).to(like)
    return given


def _export(module: nn.Module, given: dict[str, Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("N", min=1)
    return torch.export.export(module, (), given, dynamic_shapes={name: {0: batch} for name in given})


def export_program(
    model: Exportable, part: Part, mask_ratio: float = 0.75, raw_pixels: bool = False
) -> torch.export.ExportedProgram:
    """Export a part of ``model`` as a program of torch's ops, for any number of images of the model's size.

    Inputs are given by name: ``program.module()(images=..., noise=...)``. Images are floating [N, C, H, W] and
    standardised, or raw pixels.

    Args:
        model: it is not changed. The program has a copy of its weights, with the same dtype and device.
        part: one of
            "encoder" of a ``MaskedAutoencoderViT``: images -> tokens [N, 1+L, D] after the last norm, class token
            first, all patches in image order;
            "reconstruction" of a ``MaskedAutoencoderViT``: images and noise [N, L] -> pred [N, L, P] and mask [N, L];
            the patches with the smallest noise stay visible;
            "classifier" of a ``VisionTransformer``: images -> logits [N, num_classes];
            "segmentation" of a ``SegmentationModel``: images -> logits [N, num_classes, H, W].
        mask_ratio: share of removed patches, for "reconstruction".
        raw_pixels: the input is raw pixels [N, H, W, C] of dtype ``model.pixel_dtype``. The graph standardises them and
            replaces missing values by the mean.

    Raises:
        UserError: if the model has no such part, or layers that are not this package's own.
    """
    module = _reference(model, part, mask_ratio, raw_pixels)
    return _export(module, _example(model, part, 2, _backbone(model).cls_token, raw_pixels))


def export_onnx(
    model: Exportable,
    path: Path,
    part: Part,
    mask_ratio: float = 0.75,
    raw_pixels: bool = False,
    recorded: ModelMetadata = UNKNOWN,
) -> float | None:
    """Write the program of ``export_program``, in fp32, as an ONNX file with standard operators only.

    Inputs are called images and noise; outputs tokens, pred and mask, or logits. The metadata entry "mae_fast" is JSON
    with the model's settings, such as the pixel mean and standard deviation, and the ``recorded`` settings, such as
    classes and preprocessing. Weights of more than 1.5 GB are written to ``path`` + ".data". If onnxruntime is
    installed, it checks the file before the file is moved to ``path``.

    Returns:
        The largest difference between onnxruntime and torch on random images. None without onnxruntime.

    Raises:
        UserError: as in ``export_program``; if the file exists; if onnx or onnxscript is not installed; if onnxruntime
            fails or its outputs differ.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX needs the packages onnx and onnxscript", "pip install 'mae_fast[onnx]'") from error
    module = _reference(model, part, mask_ratio, raw_pixels).float().cpu()
    metadata = _metadata_json(model, part, mask_ratio, recorded)

    def examples(n: int) -> dict[str, Tensor]:
        return _example(model, part, n, torch.empty(0), raw_pixels)

    def write(file: Path) -> float | None:
        program = torch.onnx.export(
            _export(module, examples(2)),
            dynamo=True,
            input_names=list(examples(2)),
            output_names=OUTPUTS[part],
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[METADATA_KEY] = metadata
        program.save(file)
        return _difference(file, module, [examples(n) for n in (1, 3)])

    difference: float | None = write_new_file(path, write)
    return difference


def save_program(
    model: Exportable,
    path: Path,
    part: Part,
    mask_ratio: float = 0.75,
    raw_pixels: bool = False,
    recorded: ModelMetadata = UNKNOWN,
) -> None:
    """Write the program of ``export_program`` with ``torch.export.save``.

    ``torch.export.load(path).module()`` runs it. The extra file "mae_fast.json" has the metadata of ``export_onnx``.
    """
    program = export_program(model, part, mask_ratio, raw_pixels)
    files = {f"{METADATA_KEY}.json": _metadata_json(model, part, mask_ratio, recorded)}
    write_new_file(path, lambda file: torch.export.save(program, file, extra_files=files))


def _metadata_json(model: Exportable, part: Part, mask_ratio: float, recorded: ModelMetadata) -> str:
    """The settings that are not part of the graph, such as the pixel mean, as JSON."""
    known = recorded if isinstance(model, SegmentationModel) else ModelMetadata.from_model(model).filled_from(recorded)
    metadata = replace(known, mask_ratio=None)
    return json.dumps((replace(metadata, mask_ratio=mask_ratio) if part == "reconstruction" else metadata).to_dict())


def _difference(file: Path, module: nn.Module, batches: list[dict[str, Tensor]]) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = [session.run(None, {name: x.numpy() for name, x in given.items()}) for given in batches]
    except Exception as error:  # its errors have no common base class
        raise UserError(f"onnxruntime cannot run the exported model: {first_line(error)}") from error
    largest = 0.0
    with torch.inference_mode():
        for given, outputs in zip(batches, found, strict=True):
            expected = module(**given)
            for theirs, ours in zip(outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
                difference = (torch.from_numpy(theirs) - ours).abs().max().item()
                if not difference <= LIMIT * ours.abs().max().item():  # also true for NaN
                    raise UserError(f"the outputs of onnxruntime and torch differ by {difference:.3g}; nothing written")
                largest = max(largest, difference)
    return largest


def write_new_file(path: Path, write: Callable[[Path], Any]) -> Any:
    """Call ``write`` with a path in a temporary folder, then move all written files to the folder of ``path``."""
    if path.exists():
        raise UserError(f"{path} exists", "give another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        result = write(Path(folder) / path.name)
        # Move ``path`` last, when the files with its weights are complete.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            if file.name != path.name and (path.parent / file.name).exists():
                raise UserError(f"{path.parent / file.name} exists", "give another name, or remove it")
            os.rename(file, path.parent / file.name)
    return result
