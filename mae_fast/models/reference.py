"""The same models in plain eager torch: the oracle of the tests and the baseline of the benchmarks.

This file uses no ops or layers of the package, only standard ``torch.nn`` modules with the published keys. Every step
is written out as in the paper.

Shapes: N images, L patches, K visible, D encoder width, E decoder width, P values per patch.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        n, t, d = x.shape
        q, k, v = self.qkv(x).reshape(n, t, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, d))
        return out


class _Block(nn.Module):
    def __init__(self, dim: int, num_heads: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = _Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(dim, hidden), "fc2": nn.Linear(hidden, dim)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        hidden: Tensor = F.gelu(self.mlp["fc1"](self.norm2(x)))
        x = x + self.mlp["fc2"](hidden)
        return x


class ReferenceMAE(nn.Module):
    """Eager masked autoencoder with the published keys. Build it from one of our models with ``ReferenceMAE.of``."""

    pixel_stats: tuple[Tensor, Tensor]  # mean and std [C] that standardised the images

    def __init__(
        self,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        decoder_embed_dim: int,
        decoder_depth: int,
        decoder_num_heads: int,
        hidden: int,
        decoder_hidden: int,
        eps: float,
        norm_pix_loss: bool,
        encoder_mask_token: bool = False,
        target: Any = None,
    ) -> None:
        super().__init__()
        self.patch, self.norm_pix_loss, self.target = patch_size, norm_pix_loss, target
        tokens = 1 + (img_size[0] // patch_size[0]) * (img_size[1] // patch_size[1])
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim), requires_grad=False)
        self.blocks = nn.ModuleList([_Block(embed_dim, num_heads, hidden, eps) for _ in range(depth)])
        self.norm = nn.LayerNorm(embed_dim, eps=eps)
        width = decoder_embed_dim
        self.decoder_embed = nn.Linear(embed_dim, width)
        token = nn.Parameter(torch.zeros(1, 1, embed_dim if encoder_mask_token else width))
        self.encoder_mask_token = token if encoder_mask_token else None
        self.mask_token = None if encoder_mask_token else token
        self.decoder_pos_embed = nn.Parameter(torch.zeros(1, tokens, width), requires_grad=False)
        blocks = [_Block(width, decoder_num_heads, decoder_hidden, eps) for _ in range(decoder_depth)]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(width, eps=eps)
        self.decoder_pred = nn.Linear(width, target.size if target else patch_size[0] * patch_size[1] * in_chans)

    @classmethod
    def of(cls, model: Any) -> "ReferenceMAE":
        """The reference with the shapes, weights, dtype and device of a ``MaskedAutoencoderViT``."""
        first, last = model.blocks[0], [*model.blocks, *model.decoder_blocks][-1]  # there may be no decoder blocks
        twin = cls(
            img_size=model.patch_embed.img_size,
            patch_size=model.patch_embed.patch_size,
            in_chans=model.patch_embed.proj.in_channels,
            embed_dim=model.cls_token.shape[2],
            depth=len(model.blocks),
            num_heads=first.attn.num_heads,
            decoder_embed_dim=model.decoder_embed.out_features,
            decoder_depth=len(model.decoder_blocks),
            decoder_num_heads=last.attn.num_heads,
            hidden=first.mlp.fc1.out_features,
            decoder_hidden=last.mlp.fc1.out_features,
            eps=first.norm1.eps,
            norm_pix_loss=model.norm_pix_loss,
            encoder_mask_token=model.encoder_mask_token is not None,
            target=copy.deepcopy(model.target),
        ).to(model.cls_token)
        twin.pixel_stats = model.pixel_mean, model.pixel_std
        twin.load_state_dict(model.state_dict())
        return twin

    def patchify(self, imgs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, L, P]."""
        n, c, height, width = imgs.shape
        p, q = self.patch
        x = imgs.reshape(n, c, height // p, p, width // q, q)
        return torch.einsum("nchpwq->nhwpqc", x).reshape(n, (height // p) * (width // q), p * q * c)

    def random_masking(self, x: Tensor, mask_ratio: float, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Keep the patches of smallest noise: [N, L, D] -> [N, K, D], mask [N, L], ids_restore [N, L]."""
        n, num_patches, width = x.shape
        num_keep = int(num_patches * (1 - mask_ratio))
        if noise is None:
            noise = torch.rand(n, num_patches, device=x.device)
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_restore = torch.argsort(ids_shuffle, dim=1)
        kept = torch.gather(x, 1, ids_shuffle[:, :num_keep, None].expand(-1, -1, width))
        mask = torch.ones(n, num_patches, device=x.device)
        mask[:, :num_keep] = 0
        return kept, torch.gather(mask, 1, ids_restore), ids_restore

    def forward_encoder(self, imgs: Tensor, mask_ratio: float, noise: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Embed all patches, add positions, drop the removed ones, run the encoder."""
        x = self.patch_embed["proj"](imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        if self.encoder_mask_token is None:
            x, mask, ids_restore = self.random_masking(x, mask_ratio, noise)
        else:  # removed patches become mask tokens, their positions stay
            _, mask, ids_restore = self.random_masking(x, mask_ratio, noise)
            x = torch.where(mask[:, :, None] == 1, self.encoder_mask_token + self.pos_embed[:, 1:], x)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(x.shape[0], -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), mask, ids_restore

    def forward_decoder(self, latent: Tensor, ids_restore: Tensor) -> Tensor:
        """Append mask tokens, un-shuffle, add positions, run the decoder, predict every patch."""
        x = self.decoder_embed(latent)
        if self.mask_token is not None:
            removed = ids_restore.shape[1] + 1 - x.shape[1]
            x_ = torch.cat([x[:, 1:], self.mask_token.expand(x.shape[0], removed, -1)], dim=1)
            x_ = torch.gather(x_, 1, ids_restore[:, :, None].expand(-1, -1, x.shape[2]))
            x = torch.cat([x[:, :1], x_], dim=1)
        x = x + self.decoder_pos_embed
        for block in self.decoder_blocks:
            x = block(x)
        pred: Tensor = self.decoder_pred(self.decoder_norm(x))[:, 1:]
        return pred

    def forward_loss(self, imgs: Tensor, pred: Tensor, mask: Tensor) -> Tensor:
        """Mean squared error on the removed patches."""
        if self.target and not hasattr(self.target, "basis"):  # tokens of a dVAE
            mean, std = self.pixel_stats
            pixels = imgs * std[:, None, None] + mean[:, None, None]
            h, w = imgs.shape[2] // self.patch[0], imgs.shape[3] // self.patch[1]
            tokens = self.target.tokenizer.tokens(pixels, (h, w))
            loss = F.cross_entropy(pred.transpose(1, 2), tokens, reduction="none")
            return (loss * mask).sum() / mask.sum()
        target = self.patchify(imgs)
        if self.target:
            target = (target - self.target.centre) @ self.target.basis
        if self.norm_pix_loss:
            target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
        loss = ((pred - target) ** 2).mean(-1)
        return (loss * mask).sum() / mask.sum()

    def forward(
        self, imgs: Tensor, mask_ratio: float = 0.75, noise: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Images [N, C, H, W] -> loss, pred [N, L, P], mask [N, L]."""
        latent, mask, ids_restore = self.forward_encoder(imgs, mask_ratio, noise)
        pred = self.forward_decoder(latent, ids_restore)
        return self.forward_loss(imgs, pred, mask), pred, mask

    def predict_ratio_loss(self, imgs: Tensor, mask_ratio: float, noise: Tensor, predict_ratio: float) -> Tensor:
        """The loss over the first M removed patches in the order of the noise. The model never sees the others."""
        x = self.patch_embed["proj"](imgs).flatten(2).transpose(1, 2) + self.pos_embed[:, 1:]
        n, num_patches, _ = x.shape
        num_keep = int(num_patches * (1 - mask_ratio))
        num_predicted = max(1, round((num_patches - num_keep) * predict_ratio))
        ids_shuffle = torch.argsort(noise, dim=1)
        ids_keep, ids_predicted = ids_shuffle[:, :num_keep], ids_shuffle[:, num_keep : num_keep + num_predicted]

        tokens = _take(x, ids_keep)
        if self.encoder_mask_token is not None:
            positions = _take(self.pos_embed[:, 1:].expand(n, -1, -1), ids_predicted)
            tokens = torch.cat([tokens, self.encoder_mask_token + positions], dim=1)
        x = torch.cat([(self.cls_token + self.pos_embed[:, :1]).expand(n, -1, -1), tokens], dim=1)
        for block in self.blocks:
            x = block(x)

        x = self.decoder_embed(self.norm(x))
        if self.mask_token is not None:
            x = torch.cat([x, self.mask_token.expand(n, num_predicted, -1)], dim=1)
        ids = torch.cat([ids_keep, ids_predicted], dim=1)
        positions = _take(self.decoder_pos_embed[:, 1:].expand(n, -1, -1), ids)
        x = x + torch.cat([self.decoder_pos_embed[:, :1].expand(n, -1, -1), positions], dim=1)
        for block in self.decoder_blocks:
            x = block(x)

        pred = self.decoder_pred(self.decoder_norm(x))[:, 1 + num_keep :]  # [N, M, P]
        in_place = pred.new_zeros(n, num_patches, pred.shape[2])
        in_place = in_place.scatter(1, ids_predicted[:, :, None].expand_as(pred), pred)
        mask = torch.zeros(n, num_patches, device=pred.device).scatter(1, ids_predicted, 1.0)
        return self.forward_loss(imgs, in_place, mask)


def _take(x: Tensor, ids: Tensor) -> Tensor:
    """Rows ``ids`` [N, K] of each image: [N, L, D] -> [N, K, D]."""
    return torch.gather(x, 1, ids[:, :, None].expand(-1, -1, x.shape[2]))


class ReferenceViT(nn.Module):
    """Encoder and head of ``mae_fast.models.vit.VisionTransformer``, for images of the model's own size."""

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        patch_size: tuple[int, int],
        in_chans: int,
        num_classes: int,
        embed_dim: int,
        depth: int,
        num_heads: int,
        hidden: int,
        eps: float,
        global_pool: bool,
    ) -> None:
        super().__init__()
        tokens = 1 + (img_size[0] // patch_size[0]) * (img_size[1] // patch_size[1])
        self.global_pool = global_pool
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)})
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.zeros(1, tokens, embed_dim))
        self.blocks = nn.ModuleList([_Block(embed_dim, num_heads, hidden, eps) for _ in range(depth)])
        self.norm = nn.Identity() if global_pool else nn.LayerNorm(embed_dim, eps=eps)
        self.fc_norm = nn.LayerNorm(embed_dim, eps=eps) if global_pool else nn.Identity()
        self.head: nn.Module = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()

    @classmethod
    def of(cls, model: Any) -> "ReferenceViT":
        """The reference with the shapes, weights, dtype and device of a ``VisionTransformer``, without drop path."""
        block = model.blocks[0]
        twin = cls(
            img_size=model.patch_embed.img_size,
            patch_size=model.patch_embed.patch_size,
            in_chans=model.in_chans,
            num_classes=model.num_classes,
            embed_dim=model.cls_token.shape[2],
            depth=len(model.blocks),
            num_heads=block.attn.num_heads,
            hidden=block.mlp.fc1.out_features,
            eps=block.norm1.eps,
            global_pool=model.global_pool,
        )
        if isinstance(model.head, nn.Sequential):  # of a linear probe
            eps: Any = model.head[0].eps
            norm = nn.BatchNorm1d(model.cls_token.shape[2], affine=False, eps=eps)
            twin.head = nn.Sequential(norm, twin.head)
        twin.to(model.cls_token)
        twin.load_state_dict(model.state_dict())
        return twin

    def forward_features(self, imgs: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, D]: the normed mean of the patch tokens, or the class token after the norm."""
        x = self.patch_embed["proj"](imgs).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        pooled: Tensor = self.fc_norm(x[:, 1:].mean(1)) if self.global_pool else x[:, 0]
        return pooled

    def forward(self, imgs: Tensor) -> Tensor:
        """[N, C, H, W] -> logits [N, num_classes]."""
        logits: Tensor = self.head(self.forward_features(imgs))
        return logits
