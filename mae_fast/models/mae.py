"""Masked autoencoder with a ViT encoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022).

Shapes: N images, C channels, L patches, K visible, D encoder width, E decoder width, P = p * q * C values per patch.
``mask``: 1 where a patch was removed, 0 where it was kept.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..ops.decoder_tokens import decoder_tokens
from ..ops.embed_visible import embed_visible
from ..ops.masked_loss import masked_loss
from ..ops.patches import image_size, patchify, unpatchify
from ..ops.random_masking import random_masking
from .blocks import Block, NormLayer, State, apply_linear, at_least, init_weights, joined, normalised
from .encoder import Encoder, _visible, decoded
from .pos_embed import resized, sincos_2d
from .sizes import MAE_ALIASES, MAE_CONFIGS
from .targets import TokenTarget, build_target


class MaskedAutoencoderViT(Encoder):
    """The paper's model, with the published constructor, state-dict keys, random draws and return values.

    Beyond the published model: ``img_size`` and ``patch_size`` may be (height, width), ``in_chans`` any number, the
    masking noise or the masks may be given, images may come as uint8 [N, H, W, C], and there are the paper's ablations.
    The defaults are ViT-L/16.

    Args:
        encoder_mask_token: the encoder sees all patches, removed ones as ``encoder_mask_token`` [1, 1, D]; latents are
            then [N, 1+L, D] in image order, and the decoder inserts nothing.
        target: what is predicted in place of pixels, as ``targets.build_target`` takes it: P is then its size.
        pixel_mean, pixel_std: one value for each channel, see ``Encoder``.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        embed_dim: int = 1024,
        depth: int = 24,
        num_heads: int = 16,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 8,
        decoder_num_heads: int = 16,
        mlp_ratio: float = 4.0,
        norm_layer: NormLayer = nn.LayerNorm,
        norm_pix_loss: bool = False,
        encoder_mask_token: bool = False,
        target: Mapping[str, Any] | None = None,
        pixel_mean: Sequence[float] | None = None,
        pixel_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(
            img_size,
            patch_size,
            in_chans,
            embed_dim,
            depth,
            num_heads,
            mlp_ratio,
            qkv_bias=True,
            norm_layer=norm_layer,
            pixel_mean=pixel_mean,
            pixel_std=pixel_std,
        )
        self.pos_embed.requires_grad_(False)

        at_least(1, decoder_embed_dim=decoder_embed_dim)
        at_least(0, decoder_depth=decoder_depth)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        token = nn.Parameter(torch.zeros(1, 1, embed_dim if encoder_mask_token else decoder_embed_dim))
        self.encoder_mask_token = token if encoder_mask_token else None
        self.mask_token = None if encoder_mask_token else token
        tokens = self.pos_embed.shape[1]
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim), requires_grad=False)
        block = partial(Block, decoder_embed_dim, decoder_num_heads, mlp_ratio, norm_layer=norm_layer)
        self.decoder_blocks = nn.ModuleList([block() for _ in range(decoder_depth)])
        self.decoder_norm = norm_layer(decoder_embed_dim)
        p, q = self.patch_embed.patch_size
        predicted = None if target is None else build_target(target, (p, q), in_chans)
        self.decoder_pred = nn.Linear(decoder_embed_dim, predicted.size if predicted else p * q * in_chans)

        if norm_pix_loss and target:
            raise ValueError(f"norm_pix_loss is of pixels, the target is {dict(target)}: give one of the two")
        self.norm_pix_loss = norm_pix_loss
        self.initialize_weights()
        self.target = predicted  # after them: its weights are not to be initialised

    def initialize_weights(self) -> None:
        """Sine-cosine tables; xavier-uniform linears and patch embedding; class and mask token ~ N(0, 0.02)."""
        grid = self.patch_embed.grid_size
        with torch.no_grad():
            self.pos_embed.copy_(sincos_2d(self.pos_embed.shape[2], grid))
            self.decoder_pos_embed.copy_(sincos_2d(self.decoder_pos_embed.shape[2], grid))
            weight = self.patch_embed.proj.weight
            nn.init.xavier_uniform_(weight.view(weight.shape[0], -1))
        nn.init.normal_(self.cls_token, std=0.02)
        for token in (self.mask_token, self.encoder_mask_token):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        self.apply(self._init_weights)

    def _init_weights(self, m: nn.Module) -> None:
        init_weights(m)

    def settings(self) -> dict[str, Any]:
        """``Encoder.settings``, and the loss."""
        return {**super().settings(), "norm_pix_loss": self.norm_pix_loss}

    def patchify(self, imgs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, L, P], channel fastest."""
        return patchify(imgs, self.patch_embed.patch_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[N, L, P] -> [N, C, H, W]; also for a square grid other than the model's own."""
        grid = self.patch_embed.grid_size
        if x.shape[1] != self.patch_embed.num_patches:
            side = int(x.shape[1] ** 0.5)
            grid = (side, side)
        return unpatchify(x, self.patch_embed.patch_size, grid)

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x [N, L, D] -> visible ones [N, K, D] in shuffled order, mask [N, L], ids_restore [N, L]."""
        ids_keep, _, ids_restore, mask = self._draw_masks(x, x.shape[1], mask_ratio, noise)
        return x.gather(1, ids_keep[:, :, None].expand(-1, -1, x.shape[2])), mask, ids_restore

    def _draw_masks(
        self, x: Tensor, num_patches: int, mask_ratio: float, noise: Tensor | None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if mask is not None:
            if noise is not None:
                raise ValueError("masks are drawn from the noise: give noise or mask, not both")
            num_keep = _visible(mask, len(x), num_patches, x.device).shape[1]
            return random_masking((mask != 0).float(), num_keep)
        if not 0 <= mask_ratio <= 1:
            raise ValueError(f"mask_ratio must be in 0..1, got {mask_ratio}")
        if noise is None:
            noise = torch.rand(x.shape[0], num_patches, device=x.device)
        elif noise.shape != (x.shape[0], num_patches):
            raise ValueError(f"noise must be [N, L] = [{x.shape[0]}, {num_patches}], got {list(noise.shape)}")
        return random_masking(noise, int(num_patches * (1 - mask_ratio)))

    def _tokens(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor, grid: tuple[int, int]) -> Tensor:
        """What the encoder's blocks see of images of ``grid``: class token and visible patches, [N, 1+K, D]; or, with
        mask tokens, all [N, 1+L, D]."""
        if self.encoder_mask_token is None:
            return self._embed(images, ids_keep, grid)
        proj, pos = self.patch_embed.proj, resized(self.pos_embed, self.patch_embed.grid_size, grid)
        nowhere, stats = torch.zeros_like(pos), self._pixel_stats(images)
        visible = embed_visible(images, ids_keep, proj.weight, proj.bias, nowhere, self.cls_token, **stats)
        return decoder_tokens(visible, self.encoder_mask_token, ids_restore, pos)

    def _encode(self, images: Tensor, ids_keep: Tensor, ids_restore: Tensor) -> State:
        """``_tokens`` after the blocks, before ``norm``."""
        return self._run(
            self.blocks, (self._tokens(images, ids_keep, ids_restore, self.patch_embed.grid_size), None, None)
        )

    def _check_images(self, images: Tensor) -> None:
        expected = (self.in_chans, *self.patch_embed.img_size)
        known = images.dtype == torch.uint8 or images.is_floating_point()
        if not known or images.ndim != 4 or image_size(images) != expected:
            c, h, w = expected
            raise ValueError(
                f"images must be floating [N, {c}, {h}, {w}] or uint8 [N, {h}, {w}, {c}], "
                f"got {images.dtype} {list(images.shape)}"
            )

    def forward_encoder(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> latent [N, 1+K, D] of the visible patches, mask [N, L], ids_restore [N, L]."""
        self._check_images(x)
        num_patches = self.patch_embed.num_patches
        ids_keep, _, ids_restore, drawn = self._draw_masks(x, num_patches, mask_ratio, noise, mask)
        return self.norm(joined(*self._encode(x, ids_keep, ids_restore))), drawn, ids_restore

    def encode_packed(
        self, images: Sequence[Tensor], mask_ratio: float = 0.75, noise: Sequence[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``forward_encoder`` of images of several sizes at once, in which no token waits for a longer image.

        Args:
            images: each floating [C, H, W] or uint8 [H, W, C], H and W multiples of the patch's sides.
            mask_ratio: of each image.
            noise: each [L] of its image; drawn one image after the other if not given.

        Returns:
            Of each image, latent [1+K, D], mask [L] and ids_restore [L]: what it would be alone, up to rounding. The
            position table is resized to its grid (bicubic).

        Raises:
            ValueError: on images or noise of the wrong shape.
        """
        embedded, drawn = [], []
        for i, image in enumerate(images):
            batch = image[None]
            grid = self._grid(batch, f"image {i}", batch="")
            given = None if noise is None else noise[i][None]
            ids_keep, _, ids_restore, mask = self._draw_masks(batch, grid[0] * grid[1], mask_ratio, given)
            embedded.append(self._tokens(batch, ids_keep, ids_restore, grid)[0])
            drawn.append((mask[0], ids_restore[0]))
        if not embedded:
            return []
        lengths = tuple(len(x) for x in embedded)
        latent = self.norm(joined(*self._run(self.blocks, (torch.cat(embedded)[None], None, None), lengths)))[0]
        return [(x, *rest) for x, rest in zip(latent.split(list(lengths)), drawn, strict=True)]

    def _decode(self, x: Tensor, ids_restore: Tensor) -> State:
        """``decoder_embed``'s output [N, 1+K, E] -> [N, 1+L, E] after the blocks, before ``decoder_norm``."""
        if self.mask_token is None:  # the encoder had it
            x = x + self.decoder_pos_embed
        else:
            x = decoder_tokens(x, self.mask_token, ids_restore, self.decoder_pos_embed)
        return self._run(self.decoder_blocks, (x, None, None))

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent [N, 1+K, D] -> predictions for all patches [N, L, P] in image order."""
        x = joined(*self._decode(apply_linear(self.decoder_embed, x), ids_restore))
        return apply_linear(self.decoder_pred, self.decoder_norm(x[:, 1:]))

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, ids: Tensor | None = None) -> Tensor:
        """Mean squared error on removed patches, against pixels or, with ``norm_pix_loss``, standardised patches.

        ``pred`` [N, R, P] and ``mask`` [N, R] are of the patches ``ids`` [N, R]; None: of all, in image order. Any
        weights will do as ``mask``: 0 leaves a patch out.
        """
        if self.target:
            wanted = torch.arange(mask.shape[1], device=mask.device).expand_as(mask) if ids is None else ids
            return self.target.loss(imgs, pred, mask, wanted, self.pixel_mean, self.pixel_std)
        return masked_loss(
            imgs,
            pred,
            mask,
            ids=ids,
            patch=self.patch_embed.patch_size,
            norm_pix=self.norm_pix_loss,
            **self._pixel_stats(imgs),
        )

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> loss (scalar), predictions for all patches [N, L, P] in image order, mask [N, L].

        Without ``noise`` [N, L] one ``torch.rand(N, L)`` is drawn on the images' device; the int(L * (1 - mask_ratio))
        patches of smallest noise stay visible. ``mask`` [N, L], 1 where a patch is to be removed, as many in each
        image, takes the place of both. With nothing removed the loss is 0 / 0 = NaN.
        """
        # derived classes may have the published arguments only
        given = {name: x for name, x in (("noise", noise), ("mask", mask)) if x is not None}
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, **given)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    def loss(
        self, images: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of ``forward`` for training: the same value, predicting the removed patches only."""
        self._check_images(images)
        num_patches = self.patch_embed.num_patches
        ids_keep, ids_removed, ids_restore, _ = self._draw_masks(images, num_patches, mask_ratio, noise, mask)
        x = _projected(
            self._encode(images, ids_keep, ids_restore), self.norm, partial(apply_linear, self.decoder_embed)
        )
        predict = partial(apply_linear, self.decoder_pred)
        if isinstance(self.target, TokenTarget):
            tokens = self.target(images, ids_removed, self.pixel_mean, self.pixel_std)
            predict = partial(self.target.loss_of_hidden, predict, tokens)
        pred = _projected(self._decode(x, ids_restore), self.decoder_norm, predict, 1 + ids_removed)
        if isinstance(self.target, TokenTarget):
            return pred
        return self.forward_loss(images, pred, torch.ones_like(ids_removed, dtype=torch.float32), ids_removed)


def _projected(
    state: State, norm: nn.Module, layer: Callable[[Tensor], Tensor], tokens: Tensor | None = None
) -> Tensor:
    """``layer(norm(x))``, of each image's ``tokens`` [N, R] only; the norm written in the layer's own dtype."""

    def project(x: Tensor) -> tuple[Tensor, None]:
        return layer(x if tokens is None else x.gather(1, tokens[:, :, None].expand(-1, -1, x.shape[2]))), None

    return normalised(state, norm, project)[1]


def build(name: str, **kwargs: Any) -> MaskedAutoencoderViT:
    """The model called ``name`` in ``sizes.MAE_CONFIGS`` or ``MAE_ALIASES``. ``kwargs`` override constructor arguments.

    ``norm_layer`` may be JSON: {"eps": 1e-5}, as in ``Encoder.settings``.

    Raises:
        ValueError: on an unknown name, or sizes that do not fit each other.
    """
    config = MAE_CONFIGS.get(MAE_ALIASES.get(name, name))
    if config is None:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted({*MAE_CONFIGS, *MAE_ALIASES}))}")
    return MaskedAutoencoderViT(**decoded({**config, **kwargs}))
