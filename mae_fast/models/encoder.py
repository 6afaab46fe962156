"""The encoder that the masked autoencoder and the classifier share: class token and patches through ViT blocks.

Shapes: N images, C channels, L patches, K visible, D width, h x w grid of patches.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..ops.attention import each_sequence
from ..ops.embed_visible import embed_visible
from ..ops.patches import image_size
from .blocks import Block, NormLayer, PatchEmbed, State, Windows, at_least, joined, plain
from .pos_embed import resized

try:
    from huggingface_hub import PyTorchModelHubMixin
except ImportError:  # the benchmarks run on machines that have torch alone

    class PyTorchModelHubMixin:  # type: ignore[no-redef]
        """Nothing: there is no hub."""

        def __init_subclass__(cls, **_: Any) -> None:
            super().__init_subclass__()


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
Pool = Literal["tokens", "cls", "mean", "map"]
# How a model's config.json has ``norm_layer=partial(nn.LayerNorm, eps=1e-6)``: {"eps": 1e-6}.
CODERS: dict[type, Any] = {partial: (lambda norm: norm.keywords, lambda words: partial(nn.LayerNorm, **words))}


def default_pixel_stats(channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation [C] of pixels in 0..1: ImageNet's for 3 channels, 0.5 for any other number."""
    return (IMAGENET_MEAN, IMAGENET_STD) if channels == 3 else ((0.5,) * channels,) * 2


def decoded(arguments: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments, with a ``norm_layer`` that is a dict from JSON replaced by the class that it describes."""
    norm = arguments.get("norm_layer")
    return {**arguments, "norm_layer": CODERS[partial][1](norm)} if isinstance(norm, dict) else arguments


class Backbone(nn.Module):
    """Patch embedding, class token, position table and blocks, under the published names, and what runs them.

    Images come floating and standardised [N, C, H, W], or uint8 [N, H, W, C]: those are standardised inside with the
    buffers ``pixel_mean`` and ``pixel_std`` [C], which are not part of the state dict.
    """

    patch_embed: PatchEmbed
    cls_token: nn.Parameter  # [1, 1, D]
    pos_embed: nn.Parameter  # [1, 1+L, D]
    blocks: nn.ModuleList
    pixel_mean: Tensor
    pixel_std: Tensor
    in_chans: int
    grad_checkpointing = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Backbone":
        """Moves and casts of the module leave the pixel statistics at least fp32: in bf16 they would shift colours."""
        stats = {name: getattr(self, name) for name in ("pixel_mean", "pixel_std")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in stats.items():
            after = getattr(self, name)
            if after.dtype.itemsize < 4:
                setattr(self, name, before.float().to(after.device))
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Keep only each block's input for the backward pass, which computes the rest again: less memory, more time."""
        self.grad_checkpointing = enable

    def _run(
        self,
        blocks: nn.ModuleList | Sequence[nn.Module],
        state: State,
        lengths: tuple[int, ...] | None = None,
        windows: Windows | None = None,
    ) -> State:
        for blk in blocks:
            step = partial(blk.open if plain(blk, Block) else partial(_whole, blk), lengths=lengths, windows=windows)
            if self.grad_checkpointing and torch.is_grad_enabled():
                state = checkpoint(step, *state, use_reentrant=False)
            else:
                state = step(*state)
        return state

    def _outputs(self, x: Tensor, layers: Sequence[int], windows: Sequence[Windows | None] = ()) -> list[Tensor]:
        """Of the blocks numbered ``layers``, on tokens x [N, T, D]; ``windows`` of each block, or none of any."""
        state: State = (x, None, None)
        outputs: dict[int, Tensor] = {}
        for i in range(max(layers, default=-1) + 1):
            state = self._run([self.blocks[i]], state, windows=windows[i] if windows else None)
            if i in layers:
                outputs[i] = joined(*state)
        return [outputs[i] for i in layers]

    def _pixel_stats(self, images: Tensor) -> dict[str, Tensor]:
        """The ops' ``mean`` and ``std`` for uint8 images; floating ones come already standardised."""
        return {"mean": self.pixel_mean, "std": self.pixel_std} if images.dtype == torch.uint8 else {}

    def _embed(self, images: Tensor, ids_keep: Tensor, grid: tuple[int, int]) -> Tensor:
        """Class token and visible patches [N, 1+K, D] of images of ``grid`` (rows, columns), positions added."""
        proj = self.patch_embed.proj
        pos = resized(self.pos_embed, self.patch_embed.grid_size, grid)
        return embed_visible(images, ids_keep, proj.weight, proj.bias, pos, self.cls_token, **self._pixel_stats(images))

    def _grid(self, images: Tensor, name: str = "images", batch: str = "N, ") -> tuple[int, int]:
        """Rows and columns of patches of images [N, ...] of any size.

        Raises:
            ValueError: if they are no images of the model's channels, in whole patches.
        """
        known = images.dtype == torch.uint8 or images.is_floating_point()
        c, (p, q) = self.in_chans, self.patch_embed.patch_size
        if not known or images.ndim != 4 or image_size(images)[0] != c:
            shape = list(images.shape if batch else images.shape[1:])
            raise ValueError(
                f"{name} must be floating [{batch}{c}, H, W] or uint8 [{batch}H, W, {c}], got {images.dtype} {shape}"
            )
        _, height, width = image_size(images)
        if height % p or width % q or not height or not width:
            raise ValueError(f"{name} must have sides that are multiples of {p} x {q}, got {height} x {width}")
        return height // p, width // q


class Encoder(Backbone, PyTorchModelHubMixin):
    """A new backbone, and the norm that follows it.

    ``save_pretrained``, ``from_pretrained`` and ``push_to_hub`` are the Hugging Face hub's: constructor arguments in
    ``config.json``, weights in ``model.safetensors``, both checked in full. A norm layer must be a layer norm.

    ``pixel_mean`` and ``pixel_std`` have one value for each channel, of pixels in 0..1. By default they are ImageNet's
    for 3 channels and 0.5 for any other number.
    """

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
    ) -> None:
        super().__init__()
        at_least(0, depth=depth)
        self.patch_embed = PatchEmbed(img_size, patch_size, in_chans, embed_dim)
        tokens = 1 + self.patch_embed.num_patches
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        rates = [drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.blocks = nn.ModuleList(
            [Block(embed_dim, num_heads, mlp_ratio, qkv_bias, norm_layer, drop_path) for drop_path in rates]
        )
        self.norm = norm_layer(embed_dim)
        self.in_chans = in_chans
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
        """The eps of the layer norms of blocks and encoder or decoder; None if they do not all have the same one."""
        parts = (getattr(self, name, None) for name in ("blocks", "norm", "fc_norm", "decoder_blocks", "decoder_norm"))
        norms = (x for part in parts if part is not None for x in part.modules() if isinstance(x, nn.LayerNorm))
        eps = {norm.eps for norm in norms}
        return eps.pop() if len(eps) == 1 else None

    def settings(self) -> dict[str, Any]:
        """Constructor arguments, as JSON, that change the outputs and show in no tensor of the state dict.

        They are read from the model, so that changes since its construction count.
        """
        stats = {
            # numpy prints the shortest decimal of an fp32 value: 0.485, not 0.48500001430511475
            name: [float(str(x)) for x in getattr(self, name).float().cpu().numpy()]
            for name in ("pixel_mean", "pixel_std")
            if not getattr(self, name).is_meta
        }
        return stats if self.norm_eps is None else {**stats, "norm_layer": {"eps": self.norm_eps}}

    def _save_pretrained(self, save_directory: Path) -> None:
        recorded: Any = self._hub_mixin_config  # when it was built
        self._hub_mixin_config = {**(recorded or {}), **self.settings()}
        super()._save_pretrained(save_directory)

    @classmethod
    def _from_pretrained(cls, *, strict: bool = True, **kwargs: Any) -> Any:
        """The mixin's, strict by default; it decodes what is annotated as a class only."""
        return super()._from_pretrained(strict=strict, **decoded(kwargs))

    def forward_features(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        layers: Sequence[int] | None = None,
        pool: Pool = "tokens",
    ) -> Tensor | list[Tensor]:
        """Features of images of any size; nothing is masked unless ``mask`` says so.

        Args:
            images: floating [N, C, H, W], standardised, or uint8 [N, H, W, C]; sides that are multiples of the patch's.
                The position table is resized to their grid (bicubic).
            mask: [N, L], 1 where a patch is removed: the blocks do not see it. As many in each image.
            layers: numbers of blocks, negative from the last: their outputs, before the last norm, in that order.
            pool: "tokens": [N, 1+K, D], class token first, then the visible patches in image order. "cls": the class
                token [N, D]. "mean": the mean of the visible patches [N, D]. "map": the patches as a map [N, D, h, w],
                without ``mask``.

        Returns:
            A tensor, after the last norm; with ``layers`` a list of them.

        Raises:
            ValueError: on images or a mask of the wrong shape, and on blocks that the model does not have.
        """
        grid = self._grid(images)
        if pool not in ("tokens", "cls", "mean", "map"):
            raise ValueError(f"pool must be 'tokens', 'cls', 'mean' or 'map', got {pool!r}")
        if pool == "map" and mask is not None:
            raise ValueError("pool='map' needs all patches: leave mask out, or take pool='tokens'")
        x = self._embed(images, _visible(mask, len(images), grid[0] * grid[1], images.device), grid)
        if layers is None:
            return self._normed_and_pooled(joined(*self._run(self.blocks, (x, None, None))), pool, grid)
        return [pooled(out, pool, grid) for out in self._outputs(x, numbers(layers, len(self.blocks)))]

    def _normed_and_pooled(self, x: Tensor, pool: Pool, grid: tuple[int, int]) -> Tensor:
        return pooled(self.norm(x), pool, grid)


def numbers(blocks: Sequence[int], depth: int, name: str = "layers") -> list[int]:
    """Of blocks that may be counted from the last, -1, on.

    Raises:
        ValueError: on a block that is not there.
    """
    if not all(-depth <= i < depth for i in blocks):
        raise ValueError(f"{name} must be in {-depth}..{depth - 1}, got {list(blocks)}")
    return [i % depth for i in blocks]


def pooled(x: Tensor, pool: Pool, grid: tuple[int, int]) -> Tensor:
    """Tokens [N, 1+K, D], class token first, as ``Encoder.forward_features`` has it."""
    if pool == "cls":
        return x[:, 0]
    if pool == "mean":
        return x[:, 1:].mean(1)
    return as_map(x[:, 1:], grid) if pool == "map" else x


def as_map(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """Patches [N, h * w, D] of a grid -> a map [N, D, h, w], without a copy if it can be."""
    n, _, d = x.shape
    return x.transpose(1, 2).reshape(n, d, *grid)


def _visible(mask: Tensor | None, n: int, num_patches: int, device: torch.device) -> Tensor:
    """The visible patches' numbers [N, K], in image order."""
    if mask is None:
        return torch.arange(num_patches, device=device).expand(n, -1)
    if mask.shape != (n, num_patches):
        raise ValueError(f"mask must be [N, L] = [{n}, {num_patches}], got {list(mask.shape)}")
    visible = mask == 0
    counts = visible.sum(1)
    if n and (counts != counts[0]).any():
        raise ValueError(f"mask must remove as many patches of each image, got {sorted(set(counts.tolist()))} visible")
    return visible.nonzero()[:, 1].reshape(n, -1)


def _whole(
    block: nn.Module, x: Tensor, residual: Tensor | None, shift: Tensor | None,
    lengths: tuple[int, ...] | None, windows: Windows | None,
) -> State:  # fmt: skip
    """A block that is not ours, or has hooks: called on the whole sum, one sequence at a time."""
    call = block if windows is None else partial(block, windows=windows)
    return each_sequence(joined(x, residual, shift), lengths, call), None, None
