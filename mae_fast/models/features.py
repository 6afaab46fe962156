"""The encoder that the masked autoencoder and the classifier share, and its features.

Shapes: N images, C channels, L patches, K visible, D width, h x w grid of patches.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.autograd import needs_torch_ops
from ..ops.embed_visible import embed_visible
from ..ops.patches import check_tensor, image_size, is_raw, without_missing
from ..pixel_dtypes import PIXEL_DTYPES
from .blocks import Block, NormLayer, PatchEmbed, Windows, apply_block, at_least, is_plain_patch_embed
from .pos_embed import resize_pos_embed
from .residual import Residual

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:  # the benchmarks run on machines that have torch alone

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        """Placeholder for machines without huggingface_hub."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Pool = Literal["tokens", "cls", "mean", "map"]
# config.json stores ``norm_layer=partial(nn.LayerNorm, eps=1e-6)`` as {"eps": 1e-6}.
CODERS: dict[type, Any] = {partial: (lambda norm: norm.keywords, lambda words: partial(nn.LayerNorm, **words))}


def default_pixel_stats(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation [C] of pixels in 0..1: ImageNet's for 3 channels, 0.5 for any other number."""
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels,) * 2


def decode_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments with ``norm_layer`` from JSON, {"eps": 1e-6}, replaced by that layer norm."""
    norm = arguments.get("norm_layer")
    return {**arguments, "norm_layer": CODERS[partial][1](norm)} if isinstance(norm, dict) else arguments


class Backbone(nn.Module):
    """Patch embedding, class token, position table and blocks, under the published names.

    Images are either standardised, floating [N, C, H, W], or raw pixels [N, H, W, C] of dtype ``pixel_dtype``. If
    ``pixel_dtype`` is floating, float16 and float32 are both accepted. The model standardises raw pixels by
    ``(pixels - pixel_mean) / pixel_std``, where uint8 pixels are divided by 255 first. The buffers ``pixel_mean`` and
    ``pixel_std`` [C] are not part of the state dict. NaN and ``nodata`` mark missing pixels.
    """

    patch_embed: PatchEmbed
    cls_token: nn.Parameter  # [1, 1, D]
    pos_embed: nn.Parameter  # [1, 1+L, D]
    blocks: nn.ModuleList
    pixel_mean: Tensor
    pixel_std: Tensor
    in_chans: int
    pixel_dtype = "uint8"
    nodata: float | None = None
    grad_checkpointing = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        """Move or cast the module, but keep the pixel statistics at least fp32: bf16 would shift colours."""
        stats = {name: getattr(self, name) for name in ("pixel_mean", "pixel_std")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in stats.items():
            after = getattr(self, name)
            if after.dtype.itemsize < 4:
                setattr(self, name, before.float().to(after.device))
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Save only the inputs of blocks, and recompute the rest in the backward pass: less memory, slower."""
        self.grad_checkpointing = enable

    def run_blocks(
        self,
        blocks: Sequence[nn.Module] | nn.ModuleList,
        tokens: Tensor,
        lengths: tuple[int, ...] | None = None,
        first_query: int = 0,
    ) -> Residual:
        """Run ``blocks`` on tokens [N, T, D].

        Args:
            lengths: lengths of packed sequences, see ``ops.attention``.
            first_query: compute only the tokens from this index on in the last block, see ``Block.forward_fused``.
                If there are no blocks, return only these tokens.
        """
        residual = Residual(tokens if len(blocks) else tokens[:, first_query:])
        for i, block in enumerate(blocks):
            is_last = i == len(blocks) - 1
            residual = self._run_block(block, residual, lengths, first_query=first_query if is_last else 0)
        return residual

    def block_outputs(
        self, tokens: Tensor, layers: Sequence[int], windows: Sequence[Windows | None] = ()
    ) -> list[Tensor]:
        """Outputs [N, T, D] of the blocks with the numbers ``layers``. ``windows``: empty, or one entry for each block.

        No block after the last one of ``layers`` runs.
        """
        residual = Residual(tokens)
        outputs: dict[int, Tensor] = {}
        for i in range(max(layers, default=-1) + 1):
            residual = self._run_block(self.blocks[i], residual, windows=windows[i] if windows else None)
            if i in layers:
                outputs[i] = residual.materialize()
        return [outputs[i] for i in layers]

    def _run_block(
        self,
        block: nn.Module,
        residual: Residual,
        lengths: tuple[int, ...] | None = None,
        windows: Windows | None = None,
        first_query: int = 0,
    ) -> Residual:
        arguments = (block, residual, lengths, windows, first_query)
        if needs_torch_ops() or not (self.grad_checkpointing and torch.is_grad_enabled()):
            return apply_block(*arguments)
        checkpointed: Residual = checkpoint(apply_block, *arguments, use_reentrant=False)
        return checkpointed

    def is_raw(self, images: Tensor) -> bool:
        """Whether ``images`` are raw pixels [N, H, W, C], not standardised [N, C, H, W].

        Raises:
            ValueError: if integer images do not have the model's ``pixel_dtype``, or if ``pixel_dtype`` is floating and
                the shape could be both [N, H, W, C] and [N, C, H, W].
        """
        check_tensor("images", images)
        dtype: torch.dtype = getattr(torch, self.pixel_dtype)
        if images.is_floating_point():
            if not dtype.is_floating_point:
                return False
            if images.ndim == 4 and images.shape[1] == images.shape[3] == self.in_chans:
                raise ValueError(
                    f"images {list(images.shape)} could be raw [N, H, W, C] or standardised [N, C, H, W]: "
                    f"give images whose height is not the number of channels, {self.in_chans}"
                )
            return is_raw(images, self.in_chans)
        if images.dtype != dtype:
            raise ValueError(
                f"images must be floating and standardised, or raw pixels of dtype {self.pixel_dtype}, "
                f"got {images.dtype} {list(images.shape)}"
            )
        return True

    def pixel_stats(self, images: Tensor) -> dict[str, Any]:
        """The arguments ``mean``, ``std`` and ``nodata`` of the ops for raw pixels; empty for standardised images."""
        raw = self.is_raw(images)
        return {"mean": self.pixel_mean, "std": self.pixel_std, "nodata": self.nodata} if raw else {}

    def embed_patches(self, images: Tensor, ids: Tensor | None, grid: tuple[int, int]) -> Tensor:
        """Class token and embedded patches, with positions, [N, 1+K, D].

        Args:
            ids: [N, K], numbers of the patches. None: all patches.
            grid: rows and columns of patches.
        """
        return self._embed(images, ids, resize_pos_embed(self.pos_embed, self.patch_embed.grid_size, grid))

    def _embed(self, images: Tensor, ids: Tensor | None, pos: Tensor) -> Tensor:
        """``embed_patches`` with the position table ``pos`` [1, 1+L, D]."""
        embed, stats = self.patch_embed, self.pixel_stats(images)
        if is_plain_patch_embed(embed):
            if ids is None:
                ids = torch.arange(pos.shape[1] - 1, device=images.device).expand(images.shape[0], -1)
            return embed_visible(images, ids, embed.proj.weight, embed.proj.bias, pos, self.cls_token, **stats)
        x = embed(without_missing(images, **stats) if stats else images) + pos[:, 1:]
        x = x if ids is None else gather_tokens(x, ids)
        return torch.cat([(self.cls_token + pos[:, :1]).expand(len(x), -1, -1), x], dim=1)

    def patch_grid(self, images: Tensor, name: str = "images", batch: str = "N, ") -> tuple[int, int]:
        """Rows and columns of patches of images [N, ...] of any size.

        Raises:
            ValueError: on a wrong number of channels, or sides that are not multiples of the patch size.
        """
        check_tensor(name, images)
        c, (p, q) = self.in_chans, self.patch_embed.patch_size
        if images.ndim != 4 or image_size(images, raw := self.is_raw(images))[0] != c:
            shape = list(images.shape if batch else images.shape[1:])
            raise ValueError(
                f"{name} must be floating [{batch}{c}, H, W] or {self.pixel_dtype} [{batch}H, W, {c}], "
                f"got {images.dtype} {shape}"
            )
        _, height, width = image_size(images, raw)
        if height % p or width % q or not height or not width:
            raise ValueError(f"{name} must have sides that are multiples of {p} x {q}, got {height} x {width}")
        return height // p, width // q


class Encoder(Backbone, PyTorchModelHubMixin):
    """A backbone with a norm after its blocks.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` come from huggingface_hub. They keep constructor
    arguments in ``config.json`` and weights in ``model.safetensors``. Loading is strict. ``norm_layer`` must build a
    layer norm.

    Args:
        pixel_mean, pixel_std: one value per channel. The unit is 0..1 for uint8 pixels, and that of the raw values for
            other dtypes. The defaults are ImageNet's for 3 channels, and 0.5 for any other number.
        nodata: raw value of missing pixels. None: there is no such value.
        pixel_dtype: dtype of raw pixels: "uint8", "uint16", "int16", "float16" or "float32".

    Attributes:
        embed_dim, num_features: D, under timm's names.
        num_prefix_tokens: number of tokens before the patches: 1, the class token.
        num_classes: outputs of the head; 0: no head.
    """

    num_prefix_tokens = 1
    num_classes = 0

    def __init__(
        self,
        img_size: int | tuple[int, int],
        patch_size: int | tuple[int, int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        norm_layer: NormLayer,
        drop_path_rate: float = 0.0,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
        nodata: float | None = None,
        pixel_dtype: str = "uint8",
    ) -> None:
        super().__init__()
        at_least(0, depth=depth)
        if pixel_dtype not in PIXEL_DTYPES:
            raise ValueError(f"pixel_dtype must be one of {', '.join(PIXEL_DTYPES)}, got {pixel_dtype!r}")
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer, drop_path) for drop_path in rates]
        )
        self.norm = norm_layer(embed_dim)
        self.embed_dim = self.num_features = embed_dim
        self.in_chans, self.nodata, self.pixel_dtype = in_chans, nodata, pixel_dtype
        mean, std = default_pixel_stats(in_chans)
        for name, given, default in ("pixel_mean", pixel_mean, mean), ("pixel_std", pixel_std, std):
            values = default if given is None else tuple(given)
            if len(values) != in_chans or (name == "pixel_std" and min(values) <= 0):
                kind = "positive value" if name == "pixel_std" else "value"
                raise ValueError(f"{name} must have one {kind} for each of {in_chans} channels, got {list(values)}")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32), persistent=False)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**{"library_name": "mae_fast", "coders": CODERS, **kwargs})

    @property
    def norm_eps(self) -> float | None:
        """The eps of all layer norms of encoder and decoder; None if they differ."""
        parts = (getattr(self, name, None) for name in ("blocks", "norm", "fc_norm", "decoder_blocks", "decoder_norm"))
        norms = (x for part in parts if part is not None for x in part.modules() if isinstance(x, nn.LayerNorm))
        eps = {norm.eps for norm in norms}
        return eps.pop() if len(eps) == 1 else None

    def settings(self) -> dict[str, Any]:
        """Constructor arguments, as JSON values, that change the outputs but are not part of the state dict.

        They are read from the model, so they include changes made after construction.
        """
        stats: dict[str, Any] = {
            # numpy prints the shortest decimal of an fp32 value: 0.485, not 0.48500001430511475
            name: [float(str(x)) for x in getattr(self, name).float().cpu().numpy()]
            for name in ("pixel_mean", "pixel_std")
            if not getattr(self, name).is_meta
        }
        return {
            **stats,
            **({} if self.nodata is None else {"nodata": self.nodata}),
            **({} if self.pixel_dtype == "uint8" else {"pixel_dtype": self.pixel_dtype}),
            **({} if self.norm_eps is None else {"norm_layer": {"eps": self.norm_eps}}),
        }

    def _save_pretrained(self, save_directory: Path) -> None:
        recorded: Any = self._hub_mixin_config  # the constructor's arguments
        self._hub_mixin_config = {**(recorded or {}), **self.settings()}
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Any:
        """Load strictly by default. Decode ``norm_layer``, which the mixin leaves as a dict."""
        return super()._from_pretrained(strict=strict, **decode_arguments(kwargs))

    def forward_features(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
        pool: Pool = "tokens",
    ) -> Tensor | list[Tensor]:
        """Features of images of any size.

        Args:
            images: floating [N, C, H, W], standardised, or raw pixels [N, H, W, C]. Height and width are multiples of
                the patch size. The position table is resized to their grid (bicubic).
            mask: [N, L], 1 where a patch is removed, the same number in each image. The blocks do not see removed
                patches. Without ``mask``, nothing is removed.
            layers: return the outputs of these blocks, before the last norm. -1 is the last block.
            pool: "tokens": [N, 1+K, D], class token first, then the visible patches in image order. "cls": the class
                token [N, D]. "mean": the mean of the visible patches [N, D]. "map": the patches as a map [N, D, h, w],
                without ``mask`` only.

        Returns:
            A tensor, after the last norm. With ``layers``, a list of tensors.

        Raises:
            ValueError: if the shape of images or mask is wrong, or if the model does not have one of the blocks.
        """
        grid = self.patch_grid(images)
        if pool not in ("tokens", "cls", "mean", "map"):
            raise ValueError(f"pool must be 'tokens', 'cls', 'mean' or 'map', got {pool!r}")
        if pool == "map" and mask is not None:
            raise ValueError("pool='map' needs all patches: leave mask out, or use pool='tokens'")
        ids = None if mask is None else visible_ids(mask, images.shape[0], grid[0] * grid[1])
        x = self.embed_patches(images, ids, grid)
        if layers is None:
            return self.norm_and_pool(self.run_blocks(self.blocks, x).materialize(), pool, grid)
        outputs = self.block_outputs(x, block_numbers(layers, len(self.blocks)))
        return [pool_tokens(output, pool, grid) for output in outputs]

    def norm_and_pool(self, x: Tensor, pool: Pool, grid: tuple[int, int]) -> Tensor:
        """Features of the tokens [N, 1+K, D] after the blocks."""
        return pool_tokens(self.norm(x), pool, grid)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: Literal["NCHW", "NLC"] = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> Any:
        """Outputs of blocks, with the arguments and results of timm's ``VisionTransformer.forward_intermediates``.

        Args:
            x: images of any size, as for ``forward_features``.
            indices: block indices, or an int n: the last n blocks. None: all blocks. The results are in the order of
                the blocks.
            return_prefix_tokens: return the class token [N, 1, D] with each output.
            norm: apply ``norm`` to each output. A classifier with ``global_pool`` has no such norm.
            stop_early: stop after the last block of ``indices``.
            output_fmt: "NCHW": maps [N, D, h, w]. "NLC": patches [N, L, D].
            intermediates_only: do not return the final tokens.
            output_dict: return a dict with image_features, image_intermediates and image_intermediates_prefix.

        Returns:
            The final tokens [N, 1+L, D] after ``norm``, and the list of outputs.

        Raises:
            ValueError: if the shape of the images is wrong, the model does not have a block, or the format is unknown.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt must be 'NCHW' or 'NLC', got {output_fmt!r}")
        numbers = _chosen_blocks(indices, len(self.blocks))
        grid = self.patch_grid(x)
        last = numbers[-1] if stop_early or intermediates_only else len(self.blocks) - 1
        *outputs, final = self.block_outputs(self.embed_patches(x, None, grid), [*numbers, last])
        last_norm = getattr(self, "norm", nn.Identity())
        outputs = [last_norm(output) for output in outputs] if norm else outputs
        maps = [as_map(y[:, 1:], grid).contiguous() if output_fmt == "NCHW" else y[:, 1:] for y in outputs]
        prefixes = [y[:, :1] for y in outputs]
        if output_dict:
            found: dict[str, Any] = {"image_intermediates": maps}
            if return_prefix_tokens:
                found["image_intermediates_prefix"] = prefixes
            return found if intermediates_only else {**found, "image_features": last_norm(final)}
        results: Any = list(zip(maps, prefixes, strict=True)) if return_prefix_tokens else maps
        return results if intermediates_only else (last_norm(final), results)

    def get_classifier(self) -> nn.Module:
        """The head; ``nn.Identity`` if there is none, as in timm."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: bool | str | None = None) -> None:
        """Replace the head, see ``VisionTransformer.reset_classifier``.

        Raises:
            ValueError: unless ``num_classes`` is 0: this model has no head.
        """
        if num_classes:
            raise ValueError(
                f"a {type(self).__name__} has no classifier: load its weights into a VisionTransformer, such as "
                f"mae_fast.create_model('vit_base_patch16', weights, num_classes={num_classes})"
            )


def block_numbers(blocks: Sequence[int], depth: int, name: str = "layers") -> list[int]:
    """Map block numbers, which may be negative, to 0..depth - 1: -1 is the last block.

    Raises:
        ValueError: if the model does not have one of the blocks.
    """
    if not all(-depth <= i < depth for i in blocks):
        raise ValueError(f"{name} must be in {-depth}..{depth - 1}, got {list(blocks)}")
    return [i % depth for i in blocks]


def _chosen_blocks(indices: int | Sequence[int] | None, depth: int) -> list[int]:
    """The block numbers that ``indices`` of ``forward_intermediates`` selects, sorted."""
    if indices is None or isinstance(indices, int):
        count = depth if indices is None else indices
        indices = range(depth - count, depth) if 0 < count <= depth else ()
    if not indices:
        raise ValueError(f"indices must choose 1 to {depth} blocks, got {indices!r}")
    return sorted({*block_numbers(indices, depth, "indices")})


def pool_tokens(x: Tensor, pool: Pool, grid: tuple[int, int]) -> Tensor:
    """Tokens [N, 1+K, D] pooled as ``Encoder.forward_features`` describes."""
    if pool == "cls":
        return x[:, 0]
    if pool == "mean":
        return x[:, 1:].mean(1)
    return as_map(x[:, 1:], grid) if pool == "map" else x


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches [N, h * w, D] of a grid -> a map [N, D, h, w]."""
    n, _, d = x.shape
    return x.transpose(1, 2).reshape(n, d, *grid)


def gather_tokens(x: Tensor, ids: Tensor) -> Tensor:
    """Tokens ``ids`` [N, K] of each image: [N, T, D] -> [N, K, D]."""
    return x.gather(1, ids[:, :, None].expand(-1, -1, x.shape[2]))


def visible_ids(mask: Tensor, n: int, num_patches: int) -> Tensor:
    """Numbers [N, K] of the visible patches of ``n`` images, in image order.

    Raises:
        ValueError: if the shape of the mask is wrong, if it has values other than 0 and 1, or if images differ in their
            number of visible patches.
    """
    check_tensor("mask", mask)
    if mask.shape != (n, num_patches):
        raise ValueError(f"mask must be [N, L] = [{n}, {num_patches}], got {list(mask.shape)}")
    if not ((mask == 0) | (mask == 1)).all():
        raise ValueError("mask must be 1 for removed patches and 0 for visible ones, got other values")
    visible = mask == 0
    counts = visible.sum(1)
    if n and (counts != counts[0]).any():
        numbers = sorted(set(counts.tolist()))
        raise ValueError(f"mask must leave the same number of patches visible in each image, got {numbers}")
    return visible.nonzero()[:, 1].reshape(n, -1 if n else 0)
