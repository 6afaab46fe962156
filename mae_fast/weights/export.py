"""Models for other runtimes: torch.export and ONNX, through the plain reference, so that no graph has an op of ours.

Shapes: N images (any number), C channels, H x W pixels, L patches, D encoder width, P values per patch.
"""

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import UserError
from ..models.mae import MaskedAutoencoderViT
from ..models.reference import ReferenceMAE, ReferenceViT
from ..models.vit import VisionTransformer
from .files import METADATA
from .metadata import Details

What = Literal["encoder", "reconstruction", "classifier"]
Model = MaskedAutoencoderViT | VisionTransformer
# Of the largest value: what onnxruntime and torch may differ by. Rounding in fp32 is a hundredth of it.
LIMIT = 1e-4


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
    """Images [N, C, H, W] and noise [N, L] -> pred [N, L, P] and mask [N, L], as ``MaskedAutoencoderViT.forward``."""

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


OUTPUTS: dict[What, list[str]] = {
    "encoder": ["tokens"],
    "reconstruction": ["pred", "mask"],
    "classifier": ["logits"],
}


def _plain(model: Model, what: What, mask_ratio: float) -> nn.Module:
    """``what`` of ``model`` in plain torch, with weights of its own."""
    kind = VisionTransformer if what == "classifier" else MaskedAutoencoderViT
    if what not in OUTPUTS or not isinstance(model, kind):
        fitting = ["classifier"] if isinstance(model, VisionTransformer) else ["encoder", "reconstruction"]
        raise UserError(f"a {type(model).__name__} has no {what!r} to export", f"give {' or '.join(fitting)}")
    if model.norm_eps is None:
        raise UserError(
            "the layer norms of this model differ in eps, and only one can be exported",
            "use one norm_layer",
        )
    if not 0 <= mask_ratio < 1:
        raise UserError(f"the mask ratio must be at least 0 and below 1, got {mask_ratio}")
    try:
        if isinstance(model, VisionTransformer):
            return _Classifier(ReferenceViT.of(model).eval())
        mae = ReferenceMAE.of(model).eval()
    except (RuntimeError, AttributeError) as error:
        why = " ".join(str(error).split())
        raise UserError(f"only models of the package's own layers, whole, can be exported: {why}") from error
    return _Encoder(mae) if what == "encoder" else _Reconstruction(mae, mask_ratio)


def _example(model: Model, what: What, n: int, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Inputs by name, the same in each call."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(n, model.in_chans, *model.patch_embed.img_size, generator=generator)
    given = {"images": images}
    if what == "reconstruction":
        given["noise"] = torch.rand(n, model.patch_embed.num_patches, generator=generator)
    return {name: x.to(device, dtype) for name, x in given.items()}


def _traced(plain: nn.Module, given: dict[str, Tensor]) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("N", min=1)
    return torch.export.export(plain, (), given, dynamic_shapes={name: {0: batch} for name in given})


def export_program(model: Model, what: What, mask_ratio: float = 0.75) -> torch.export.ExportedProgram:
    """``what`` of ``model`` as a program of torch's own ops, for any number of images of the model's size.

    Args:
        model: stays as it is; the program has copies of its weights, in their dtype and on their device.
        what: of a ``MaskedAutoencoderViT``: "encoder", images -> tokens [N, 1+L, D] after the last norm, class token
            first, all patches in image order; "reconstruction", images and noise [N, L] -> pred [N, L, P] and mask
            [N, L], where the patches of smallest noise stay visible. Of a ``VisionTransformer``: "classifier",
            images -> logits [N, num_classes]. Images are floating [N, C, H, W], standardised. Inputs are given by
            name: ``program.module()(images=..., noise=...)``.
        mask_ratio: of the reconstruction.

    Raises:
        UserError: if the model has no such part, or layers that are not the package's own.
    """
    like = model.cls_token
    return _traced(_plain(model, what, mask_ratio), _example(model, what, 2, like.dtype, like.device))


def export_onnx(model: Model, path: Path, what: What, mask_ratio: float = 0.75) -> float | None:
    """Write ``export_program``'s program, in fp32, as an ONNX file of the standard's own operators.

    Inputs are called images and noise, outputs tokens, pred and mask, or logits. The metadata has the key "mae_fast":
    JSON with the mean and standard deviation that images are standardised with, and more of the model. Weights of more
    than 1.5 GB go to ``path`` + ".data" beside it. The file is run by onnxruntime, where that is installed, before it
    gets its name.

    Returns:
        The largest difference between onnxruntime and torch on random images; None if it was not checked.

    Raises:
        UserError: as ``export_program``; if there is such a file; without the packages onnx and onnxscript; if
            onnxruntime computes something else, or nothing.
    """
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError("ONNX needs the packages onnx and onnxscript", "pip install 'mae_fast[onnx]'") from error
    plain = _plain(model, what, mask_ratio).float().cpu()
    about = _about(model, what, mask_ratio)

    def given(n: int) -> dict[str, Tensor]:
        return _example(model, what, n, torch.float32, torch.device("cpu"))

    def write(file: Path) -> float | None:
        program = torch.onnx.export(
            _traced(plain, given(2)),
            dynamo=True,
            input_names=list(given(2)),
            output_names=OUTPUTS[what],
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props[METADATA] = about
        program.save(file)
        return _difference(file, plain, [given(n) for n in (1, 3)])

    difference: float | None = new_file(path, write)
    return difference


def save_program(model: Model, path: Path, what: What, mask_ratio: float = 0.75) -> None:
    """Write ``export_program``'s program with ``torch.export.save``; ``torch.export.load(path).module()`` runs it.

    Its extra file "mae_fast.json" is what ``export_onnx`` has as metadata.
    """
    program = export_program(model, what, mask_ratio)
    files = {f"{METADATA}.json": _about(model, what, mask_ratio)}
    new_file(path, lambda file: torch.export.save(program, file, extra_files=files))


def _about(model: Model, what: What, mask_ratio: float) -> str:
    """JSON of what a program's graph does not say, such as how images are standardised."""
    details = Details.of(model)
    return json.dumps((replace(details, mask_ratio=mask_ratio) if what == "reconstruction" else details).known())


def _difference(file: Path, plain: nn.Module, batches: list[dict[str, Tensor]]) -> float | None:
    try:
        import onnxruntime
    except ImportError:
        return None
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = [session.run(None, {name: x.numpy() for name, x in given.items()}) for given in batches]
    except Exception as error:  # its errors have no class in common
        raise UserError(f"onnxruntime cannot run what was exported: {str(error).splitlines()[0]}") from error
    largest = 0.0
    with torch.inference_mode():
        for given, outputs in zip(batches, found, strict=True):
            expected = plain(**given)
            for theirs, ours in zip(outputs, expected if isinstance(expected, tuple) else (expected,), strict=True):
                off = (torch.from_numpy(theirs) - ours).abs().max().item()
                if not off <= LIMIT * ours.abs().max().item():
                    raise UserError(f"onnxruntime computes something else: values differ by {off:.3g}; nothing written")
                largest = max(largest, off)
    return largest


def new_file(path: Path, write: Callable[[Path], Any]) -> Any:
    """Call ``write`` with a file of that name in a folder of its own, then move what is there to ``path``'s folder."""
    if path.exists():
        raise UserError(f"{path} exists", "give another name, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".tmp-", dir=path.parent) as folder:
        result = write(Path(folder) / path.name)
        # The file itself last: it is useless without its weights.
        for file in sorted(Path(folder).iterdir(), key=lambda file: file.name == path.name):
            if file.name != path.name and (path.parent / file.name).exists():
                raise UserError(f"{path.parent / file.name} exists", "give another name, or remove it")
            os.rename(file, path.parent / file.name)
    return result
