"""Floating-point operations of the models, by formula. This module works without torch.

Shapes: L patches, K kept, D encoder width, E decoder width, P values per patch. A multiply-add is two operations. All
counts are for one image.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .sizes import num_predicted


@dataclass(frozen=True)
class Sizes:
    """The sizes that the FLOPs of a masked autoencoder depend on."""

    patches: int  # L
    values: int  # P
    width: int  # D
    depth: int
    decoder_width: int = 512  # E
    decoder_depth: int = 8
    mlp_ratio: float = 4.0
    encoder_mask_token: bool = False
    predicted: int | None = None  # values predicted per patch; None: P

    @classmethod
    def of(cls, model: Any) -> "Sizes":
        """The sizes of a ``MaskedAutoencoderViT``."""
        return cls(
            patches=model.patch_embed.num_patches,
            values=model.patch_embed.proj.weight[0].numel(),
            width=model.cls_token.shape[2],
            depth=len(model.blocks),
            decoder_width=model.decoder_embed.out_features,
            decoder_depth=len(model.decoder_blocks),
            mlp_ratio=model.blocks[0].mlp.fc1.out_features / model.cls_token.shape[2],
            encoder_mask_token=model.encoder_mask_token is not None,
            predicted=model.decoder_pred.out_features,
        )

    @classmethod
    def of_config(cls, config: Mapping[str, Any], img_size: int | None = None) -> "Sizes":
        """The sizes of one of ``sizes.MAE_CONFIGS``, for square RGB images."""
        return cls(
            patches=((img_size or config["img_size"]) // config["patch_size"]) ** 2,
            values=3 * config["patch_size"] ** 2,
            width=config["embed_dim"],
            depth=config["depth"],
            decoder_width=config["decoder_embed_dim"],
            decoder_depth=config["decoder_depth"],
            mlp_ratio=config["mlp_ratio"],
        )


@dataclass(frozen=True)
class Flops:
    """FLOPs of linear layers (``gemm``) and of attention."""

    gemm: float
    attention: float

    @property
    def total(self) -> float:
        return self.gemm + self.attention


def train_flops(sizes: Sizes, mask_ratio: float = 0.75, *, predict_ratio: float = 1.0, least: bool = False) -> Flops:
    """FLOPs of a forward and a backward pass. The backward pass counts as two forward passes:

        forward = 2 * tokens * weights                  for each linear layer
                + 4 * tokens ** 2 * width               for each attention, q k^T and its product with v

    The default counts the published model, which embeds all L patches and projects all L + 1 tokens to predictions:
    58.7e9 for ViT-B/16 at mask ratio 0.75. Use it as the numerator of MFU.

    The computation of a target other than pixels, such as a tokenizer's, is not counted.

    Args:
        predict_ratio: as in ``model.loss``: the decoder has 1 + K + M tokens and predicts M of them.
        least: count only the operations of ``model.loss``. It embeds the K visible patches, predicts the L - K removed
            ones, and computes no gradient of the pixels. In its last block, the other tokens are only keys and values.
    """
    length, kept = sizes.patches, int(sizes.patches * (1 - mask_ratio))
    wanted = num_predicted(length - kept, predict_ratio)
    decoded = 1 + kept + wanted
    seen = decoded if sizes.encoder_mask_token else 1 + kept
    encoder = block_flops(seen, sizes.width, sizes.depth, sizes.mlp_ratio)
    decoder = block_flops(decoded, sizes.decoder_width, sizes.decoder_depth, sizes.mlp_ratio)
    if least and decoder.gemm and wanted:
        skipped, width = 1 + kept, sizes.decoder_width
        linear = 2 * skipped * width**2 * (1 + 2 * sizes.mlp_ratio)
        decoder = Flops(decoder.gemm - linear, decoder.attention - 4 * skipped * decoded * width)
    embedded, predicted, passes = (kept, wanted, 2) if least else (length, decoded, 3)
    gemm = 3 * (encoder.gemm + decoder.gemm)
    gemm += 3 * linear_flops(seen, sizes.width, sizes.decoder_width)
    gemm += passes * linear_flops(embedded, sizes.values, sizes.width)
    gemm += 3 * linear_flops(predicted, sizes.decoder_width, sizes.predicted or sizes.values)
    return Flops(gemm, 3 * (encoder.attention + decoder.attention))


def block_flops(tokens: int, width: int, depth: int, mlp_ratio: float = 4.0) -> Flops:
    """FLOPs of a forward pass of ``depth`` transformer blocks."""
    return Flops(depth * 2 * tokens * width**2 * (4 + 2 * mlp_ratio), depth * 4 * tokens**2 * width)


def linear_flops(rows: int, inputs: int, outputs: int) -> float:
    """FLOPs of a forward pass of a linear layer."""
    return 2.0 * rows * inputs * outputs
