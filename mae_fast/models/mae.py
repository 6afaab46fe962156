"""Masked autoencoder with a ViT encoder (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022).

Shapes: N images, C channels, L patches, K visible, R = L - K removed, M predicted (R, or fewer with a predict ratio),
D encoder width, E decoder width, P = p * q * C values per patch. ``mask``: 1 where a patch was removed, 0 where it was
kept.
"""

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.decoder_tokens import decoder_tokens
from ..ops.masked_loss import masked_loss
from ..ops.masked_loss.reference import loss_of_targets
from ..ops.patches import check_tensor, image_size, patchify, unpatchify, without_missing
from ..ops.random_masking import random_masking
from .blocks import Block, NormLayer, apply_linear, at_least, ignore_order, init_weights
from .features import Encoder, decode_arguments, gather_tokens, visible_ids
from .pos_embed import resize_pos_embed, sincos_2d
from .sizes import MAE_ALIASES, MAE_CONFIGS, num_predicted
from .targets import TokenTarget, build_target


class Masking(NamedTuple):
    """The patches of each image in random order: K visible ones, M removed ones that are predicted, the rest."""

    ids_keep: Tensor  # [N, K], numbers of the visible patches
    ids_predicted: Tensor  # [N, M], numbers of the removed patches that are predicted
    ids_restore: Tensor  # [N, L], position of each patch in the random order
    mask: Tensor  # [N, L]


class MaskedAutoencoderViT(Encoder):
    """The model of the paper, with the published constructor, state-dict keys, random draws and return values.

    The defaults are ViT-L/16. Additions to the published model:

    - ``img_size`` and ``patch_size`` may be (height, width).
    - ``in_chans`` may be any number.
    - The caller may pass masking noise or masks.
    - Images may be raw pixels [N, H, W, C], see ``Backbone``.
    - The paper's ablations are available.

    Args:
        encoder_mask_token: give the encoder all patches, with ``encoder_mask_token`` [1, 1, D] in place of each removed
            one. Latents are then [N, 1+L, D] in image order, and the decoder inserts no mask tokens.
        target: predict this target instead of pixels, see ``targets.build_target``. It sets P.
        pixel_mean, pixel_std, nodata, pixel_dtype: description of raw pixels, see ``Encoder``.
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
        nodata: float | None = None,
        pixel_dtype: str = "uint8",
    ) -> None:
        super().__init__(
            img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio, qkv_bias=True,
            norm_layer=norm_layer, pixel_mean=pixel_mean, pixel_std=pixel_std, nodata=nodata, pixel_dtype=pixel_dtype,
        )  # fmt: skip
        self.pos_embed.requires_grad_(False)

        at_least(1, decoder_embed_dim=decoder_embed_dim)
        at_least(0, decoder_depth=decoder_depth)
        self.decoder_embed = nn.Linear(embed_dim, decoder_embed_dim)
        token = nn.Parameter(torch.zeros(1, 1, embed_dim if encoder_mask_token else decoder_embed_dim))
        self.encoder_mask_token = token if encoder_mask_token else None
        self.mask_token = None if encoder_mask_token else token
        tokens = self.pos_embed.shape[1]
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, decoder_embed_dim), requires_grad=False)
        self.decoder_blocks = nn.ModuleList(
            Block(decoder_embed_dim, decoder_num_heads, mlp_ratio, norm_layer=norm_layer) for _ in range(decoder_depth)
        )
        self.decoder_norm = norm_layer(decoder_embed_dim)
        p, q = self.patch_embed.patch_size
        predicted = None if target is None else build_target(target, (p, q), in_chans)
        self.decoder_pred = nn.Linear(decoder_embed_dim, predicted.size if predicted else p * q * in_chans)

        if norm_pix_loss and target:
            raise ValueError(f"norm_pix_loss needs pixels as the target, got the target {dict(target)}")
        self.norm_pix_loss = norm_pix_loss
        self.initialize_weights()
        self.target = predicted  # set after initialize_weights, which would overwrite its weights

    def initialize_weights(self) -> None:
        """Sine-cosine tables, xavier-uniform linear layers and patch embedding, class and mask token ~ N(0, 0.02)."""
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

    def no_weight_decay(self) -> set[str]:
        """The fixed position tables. The published pre-training decays the class token and the mask token."""
        return {"pos_embed", "decoder_pos_embed"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: embedding, each block, the decoder's embedding, each of its blocks, and
        the prediction."""
        block = "" if coarse else r"\.(\d+)"
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed|^encoder_mask_token",
            "blocks": rf"^blocks{block}",
            "decoder_stem": r"^norm|^decoder_embed|^mask_token|^decoder_pos_embed",
            "decoder_blocks": rf"^decoder_blocks{block}",
        }

    def settings(self) -> dict[str, Any]:
        """``Encoder.settings`` and ``norm_pix_loss``."""
        return {**super().settings(), "norm_pix_loss": self.norm_pix_loss}

    def patchify(self, imgs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, L, P], channel fastest."""
        return patchify(imgs, self.patch_embed.patch_size)

    def unpatchify(self, x: Tensor) -> Tensor:
        """[N, L, P] -> [N, C, H, W]. If L is not the model's own, the grid is taken to be square."""
        check_tensor("x", x)
        grid = self.patch_embed.grid_size
        if x.shape[1] != self.patch_embed.num_patches:
            side = int(x.shape[1] ** 0.5)
            grid = (side, side)
        return unpatchify(x, self.patch_embed.patch_size, grid)

    def random_masking(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens x [N, L, D] -> visible tokens [N, K, D] in random order, mask [N, L], ids_restore [N, L]."""
        check_tensor("x", x)
        if x.ndim != 3:
            raise ValueError(f"x must be [N, L, D], got {list(x.shape)}")
        masking = self._draw_masks(x, x.shape[1], mask_ratio, noise)
        return gather_tokens(x, masking.ids_keep), masking.mask, masking.ids_restore

    def forward_encoder(
        self, x: Tensor, mask_ratio: float, noise: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> latent [N, 1+K, D] of the visible patches, mask [N, L], ids_restore [N, L]."""
        self._check_images(x)
        if self._overrides("random_masking") and noise is None and mask is None:
            x, mask, ids_restore = self._mask_by_override(x, mask_ratio)
        else:
            masking = self._draw_masks(x, self.patch_embed.num_patches, mask_ratio, noise, mask)
            x, mask, ids_restore = self._embed_visible(x, masking), masking.mask, masking.ids_restore
        x = self.run_blocks(self.blocks, x).materialize()
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, x: Tensor, ids_restore: Tensor) -> Tensor:
        """Latent [N, 1+K, D] -> predictions for all patches [N, L, P] in image order."""
        check_tensor("x", x)
        x = apply_linear(self.decoder_embed, x)
        x = self._insert_mask_tokens(x, ids_restore)
        x = self.run_blocks(self.decoder_blocks, x).materialize()
        return apply_linear(self.decoder_pred, self.decoder_norm(x[:, 1:]))

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor, ids: Tensor | None = None) -> Tensor:
        """Mean squared error on removed patches, against pixels or, with ``norm_pix_loss``, normalized patches.

        It is ``sum(mask * mean((pred - patch) ** 2)) / sum(mask)``. Missing pixels are left out.
        With a ``target``, the loss is that of the target.

        Args:
            pred: [N, L, P], predictions for all patches in image order. With ``ids``, [N, R, P].
            mask: [N, L], the weight of each patch, 0 to leave it out. With ``ids``, [N, R].
            ids: [N, R], the patches that ``pred`` and ``mask`` belong to.
        """
        if self.target:
            wanted = torch.arange(mask.shape[1], device=mask.device).expand_as(mask) if ids is None else ids
            return self.target.loss(imgs, pred, mask, wanted, self.pixel_mean, self.pixel_std)
        patch, norm_pix = self.patch_embed.patch_size, self.norm_pix_loss
        if self._overrides("patchify"):
            return loss_of_targets(self.patchify(imgs), pred, mask, norm_pix)[0]
        return masked_loss(imgs, pred, mask, ids=ids, patch=patch, norm_pix=norm_pix, **self.pixel_stats(imgs))

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images -> loss (scalar), predictions for all patches [N, L, P] in image order, mask [N, L].

        The int(L * (1 - mask_ratio)) patches with the smallest ``noise`` [N, L] stay visible. By default, the noise is
        one ``torch.rand(N, L)`` on the device of the images. ``mask`` [N, L] replaces ``mask_ratio`` and excludes
        ``noise``: it is 1 for each patch to remove, the same number in each image. ``noise`` or ``mask`` bypasses an
        overridden ``random_masking``. If nothing is removed, the loss is 0 / 0 = NaN.

        Raises:
            ValueError: if images, ``noise`` or ``mask`` have a wrong shape, ``mask_ratio`` is not in [0, 1], ``noise``
                and ``mask`` are both given, or ``mask`` has other values than 0 and 1 or removes different numbers of
                patches.
        """
        # Subclasses may override forward_encoder with the published arguments only.
        options = {name: x for name, x in (("noise", noise), ("mask", mask)) if x is not None}
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, **options)
        pred = self.forward_decoder(latent, ids_restore)
        if (self._overrides("forward_loss") or self._overrides("patchify")) and self.is_raw(imgs):
            imgs = without_missing(imgs, self.pixel_mean, self.pixel_std, self.nodata)
        loss = self.forward_loss(imgs, pred, mask)
        return loss, pred, mask

    def loss(
        self,
        images: Tensor,
        mask_ratio: float = 0.75,
        noise: Tensor | None = None,
        mask: Tensor | None = None,
        any_size: bool = False,
        predict_ratio: float = 1.0,
    ) -> Tensor:
        """The loss of ``forward``, for training: the same value, but only the removed patches are predicted.

        With ``any_size``, images may have another size than the model's own, in multiples of the patch size. Both
        position tables are resized to their grid (bicubic).

        If ``random_masking``, ``patchify``, ``forward_encoder``, ``forward_decoder`` or ``forward_loss`` is overridden,
        it is called as in ``forward``, with predictions for all patches. An overridden ``forward_loss`` or ``patchify``
        gets raw pixels standardised, [N, C, H, W], with 0 for missing ones.

        With ``predict_ratio`` below 1, only M = ``max(1, round(R * predict_ratio))`` of the R removed patches are
        predicted, where ``round`` rounds halves to even numbers. They are the removed patches with the smallest noise,
        a new random choice for each image and step. There are no tokens for the other removed patches in the decoder,
        or in an encoder with ``encoder_mask_token``, and the loss leaves them out. The blocks get tokens in random
        order. With ``mask``, a ``torch.rand(N, L)`` chooses the predicted patches.

        Raises:
            ValueError: as ``forward``; if ``predict_ratio`` is not in (0, 1], or is below 1 and a step is overridden.
        """
        if not isinstance(predict_ratio, Real):
            raise TypeError(f"predict_ratio must be a number, got {predict_ratio!r}")
        if not 0 < predict_ratio <= 1:
            raise ValueError(f"predict_ratio must be above 0 and at most 1, got {predict_ratio}")
        steps = ("random_masking", "patchify", "forward_encoder", "forward_decoder", "forward_loss")
        if overridden := [step for step in steps if self._overrides(step)]:
            if predict_ratio < 1:
                raise ValueError(f"predict_ratio must be 1 if {overridden[0]} is overridden, got {predict_ratio}")
            return MaskedAutoencoderViT.forward(self, images, mask_ratio, noise, mask)[0]
        if not any_size:
            self._check_images(images, "; loss takes other sizes with any_size=True")
        grid = self.patch_grid(images)
        masking = self._draw_masks(images, grid[0] * grid[1], mask_ratio, noise, mask, predict_ratio)
        image_order, ids = self._needs_image_order(masking), masking.ids_predicted
        x = self._embed_visible(images, masking, grid, image_order)  # [N, 1+K, D]
        x = self._encode(x)  # [N, 1+K, E]
        count = None if image_order else ids.shape[1]
        x = self._insert_mask_tokens(x, masking.ids_restore, grid, count)  # [N, 1+K+M, E]
        if isinstance(self.target, TokenTarget):
            return self._token_loss(images, x, ids, image_order)
        x = self._decode(x, ids, image_order)  # [N, M, E]
        pred = apply_linear(self.decoder_pred, x)  # [N, M, P]
        return self.forward_loss(images, pred, torch.ones_like(ids, dtype=torch.float32), ids)

    def _overrides(self, step: str) -> bool:
        """Whether a subclass or the instance has its own method ``step``."""
        # Not by ``__func__`` of the method, which torch.compile evaluates wrongly.
        return step in self.__dict__ or getattr(type(self), step) is not getattr(MaskedAutoencoderViT, step)

    def _needs_image_order(self, masking: Masking) -> bool:
        """Whether ``loss`` must pass all patches to the blocks in image order.

        The output of our blocks for a token does not depend on its position in the sequence. So the removed patches can
        stay after the visible ones, and the last block computes only them, without a copy. Custom blocks may depend on
        the order. If only a part of the patches has tokens, there is no image order to restore.
        """
        visible, predicted, patches = (ids.shape[1] for ids in masking[:3])
        if visible + predicted < patches:
            return False
        blocks = [*self.decoder_blocks]
        with_all = [*self.blocks, *blocks] if self.encoder_mask_token is not None else blocks
        return not (blocks and predicted and ignore_order(with_all))

    def _embed_visible(
        self, images: Tensor, masking: Masking, grid: tuple[int, int] | None = None, image_order: bool = True
    ) -> Tensor:
        """Images -> class token and visible patches with positions [N, 1+K, D].

        With ``encoder_mask_token``: class token and all patches [N, 1+L, D] in image order, or [N, 1+K+M, D] with the
        removed patches last. ``grid`` is (rows, columns) of patches; the default is the model's own.
        """
        grid = grid or self.patch_embed.grid_size
        if self.encoder_mask_token is None:
            return self.embed_patches(images, masking.ids_keep, grid)
        pos = resize_pos_embed(self.pos_embed, self.patch_embed.grid_size, grid)
        visible = self._embed(images, masking.ids_keep, torch.zeros_like(pos))
        token, ids_restore = self.encoder_mask_token, masking.ids_restore
        count = None if image_order else masking.ids_predicted.shape[1]
        return decoder_tokens(visible, token, ids_restore, pos, image_order=image_order, num_mask_tokens=count)

    def _mask_by_override(self, images: Tensor, mask_ratio: float) -> tuple[Tensor, Tensor, Tensor]:
        """Class token and visible tokens [N, 1+K, D], mask and ids_restore [N, L], from an own ``random_masking``."""
        if self.encoder_mask_token is not None:
            raise ValueError("encoder_mask_token does not work with an own random_masking: pass noise or mask")
        x = self.embed_patches(images, None, self.patch_embed.grid_size)
        visible, mask, ids_restore = self.random_masking(x[:, 1:], mask_ratio)
        return torch.cat([x[:, :1], visible], dim=1), mask, ids_restore

    def _encode(self, x: Tensor) -> Tensor:
        """Tokens [N, 1+K, D] -> latent in the width of the decoder [N, 1+K, E]."""
        latent = self.run_blocks(self.blocks, x)
        with latent.add_and_norm(self.norm) as (_, normed):
            return apply_linear(self.decoder_embed, normed)

    def _insert_mask_tokens(
        self, x: Tensor, ids_restore: Tensor, grid: tuple[int, int] | None = None, count: int | None = None
    ) -> Tensor:
        """Visible tokens [N, 1+K, E] -> tokens of all patches [N, 1+L, E] with positions, in image order.

        With ``count`` M: [N, 1+K+M, E], the removed patches last. ``grid``: as for ``_embed_visible``.
        """
        own, image_order = self.patch_embed.grid_size, count is None
        pos = resize_pos_embed(self.decoder_pos_embed, own, grid or own)
        mask_token: Tensor | None = self.mask_token
        if mask_token is None:  # the encoder had mask tokens, so x has tokens of all patches
            if image_order:
                return x + pos
            mask_token, count = x.new_zeros(1, 1, x.shape[2]), 0
        return decoder_tokens(x, mask_token, ids_restore, pos, image_order=image_order, num_mask_tokens=count)

    def _decode(self, x: Tensor, ids_predicted: Tensor, image_order: bool) -> Tensor:
        """Tokens [N, 1+L, E] in image order, or [N, 1+K+M, E] -> decoded tokens of the predicted patches [N, M, E]."""
        first_predicted = 0 if image_order else x.shape[1] - ids_predicted.shape[1]
        decoded = self.run_blocks(self.decoder_blocks, x, first_query=first_predicted)
        with decoded.add_and_norm(self.decoder_norm) as (_, normed):
            return gather_tokens(normed, 1 + ids_predicted) if image_order else normed  # the class token is first

    def _token_loss(self, images: Tensor, x: Tensor, ids_predicted: Tensor, image_order: bool) -> Tensor:
        """The loss of a ``TokenTarget``, which computes the logits in parts to save memory."""
        assert isinstance(self.target, TokenTarget)
        wanted = self.target(images, ids_predicted, self.pixel_mean, self.pixel_std)
        return self.target.loss_of_decoded(self.decoder_pred, self._decode(x, ids_predicted, image_order), wanted)

    def encode_packed(
        self, images: Sequence[Tensor], mask_ratio: float = 0.75, noise: Sequence[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``forward_encoder`` of images of several sizes at once, packed into one sequence without padding.

        Args:
            images: each floating [C, H, W] or raw pixels [H, W, C], H and W multiples of the patch size.
            mask_ratio: share of removed patches, the same for each image.
            noise: [L] for each image. By default, it is drawn image by image.

        Returns:
            For each image, latent [1+K, D], mask [L] and ids_restore [L]. Up to rounding, they equal those of a call
            with this image only. The position table is resized to the grid of the image (bicubic).

        Raises:
            ValueError: on images or noise of the wrong shape.
        """
        tokens, maskings = [], []
        for i, image in enumerate(images):
            check_tensor(f"image {i}", image)
            batch = image[None]
            grid = self.patch_grid(batch, f"image {i}", batch="")
            given = None if noise is None else noise[i][None]
            masking = self._draw_masks(batch, grid[0] * grid[1], mask_ratio, given)
            tokens.append(self._embed_visible(batch, masking, grid)[0])
            maskings.append(masking)
        if not tokens:
            return []
        lengths = [len(x) for x in tokens]
        x = self.run_blocks(self.blocks, torch.cat(tokens)[None], tuple(lengths)).materialize()
        latents = self.norm(x)[0].split(lengths)
        return [(x, m.mask[0], m.ids_restore[0]) for x, m in zip(latents, maskings, strict=True)]

    def _draw_masks(
        self,
        x: Tensor,
        num_patches: int,
        mask_ratio: float,
        noise: Tensor | None,
        mask: Tensor | None = None,
        predict_ratio: float = 1.0,
    ) -> Masking:
        if mask is not None:
            if noise is not None:
                raise ValueError("noise and mask exclude each other: give noise or mask, not both")
            num_keep = visible_ids(mask, x.shape[0], num_patches).shape[1]
            noise = (mask != 0).float()
            if predict_ratio < 1:  # random order: visible patches get noise in 0..1, removed ones in 1..2
                noise = noise + torch.rand_like(noise)
        else:
            if not isinstance(mask_ratio, Real):
                raise TypeError(f"mask_ratio must be a number, got {mask_ratio!r}")
            if not 0 <= mask_ratio <= 1:
                raise ValueError(f"mask_ratio must be in 0..1, got {mask_ratio}")
            num_keep = int(num_patches * (1 - mask_ratio))
            if noise is None:
                noise = torch.rand(x.shape[0], num_patches, device=x.device)
            check_tensor("noise", noise)
            if noise.shape != (x.shape[0], num_patches):
                raise ValueError(f"noise must be [N, L] = [{x.shape[0]}, {num_patches}], got {list(noise.shape)}")
        masking = Masking(*random_masking(noise, num_keep))
        if predict_ratio == 1:
            return masking
        count = num_predicted(num_patches - num_keep, predict_ratio)
        return masking._replace(ids_predicted=masking.ids_predicted[:, :count])

    def _check_images(self, images: Tensor, hint: str = "; img_size of the constructor sets the size") -> None:
        check_tensor("images", images)
        expected = (self.in_chans, *self.patch_embed.img_size)
        if images.ndim != 4 or (found := image_size(images, self.is_raw(images))) != expected:
            c, h, w = expected
            if images.ndim == 4 and found[0] != c:
                hint = "; in_chans of the constructor sets the number of channels"
            raise ValueError(
                f"images must be floating [N, {c}, {h}, {w}] or {self.pixel_dtype} [N, {h}, {w}, {c}], "
                f"got {images.dtype} {list(images.shape)}{hint}"
            )


def build(name: str, **kwargs: Any) -> MaskedAutoencoderViT:
    """The model called ``name`` in ``sizes.MAE_CONFIGS`` or ``MAE_ALIASES``. ``kwargs`` override constructor arguments.

    ``norm_layer`` may be JSON: {"eps": 1e-5}, as in ``Encoder.settings``.

    Raises:
        ValueError: on an unknown name, or sizes that do not fit each other.
    """
    config = MAE_CONFIGS.get(MAE_ALIASES.get(name, name))
    if config is None:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(sorted({*MAE_CONFIGS, *MAE_ALIASES}))}")
    return MaskedAutoencoderViT(**decode_arguments({**config, **kwargs}))
