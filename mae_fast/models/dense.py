"""Feature maps for detection and segmentation, from plain encoders (Li et al., "Exploring Plain Vision Transformer
Backbones for Object Detection", ECCV 2022: ViTDet).

Shapes: N images, C channels, D width, h x w grid of patches.
"""

import re
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from .blocks import Windows
from .features import Backbone, as_map, block_numbers


class DenseEncoder(Backbone):
    """Feature maps [N, D, h, w] of chosen blocks, for images of any size, like timm's ``features_only`` models.

    It shares the modules of the encoder, under the same names: embedding, position table, and the blocks up to the last
    one of ``layers``. Training them trains the encoder, and the state dict of either loads into the other with
    ``strict=False``. The last norm, the head and the decoder are left out. The position table is resized (bicubic). It
    is trained if it is trained in the encoder: in a classifier, but not in an autoencoder.

    With ``window``, attention is as in ViTDet: within windows, and over the whole image in ``global_blocks``. If the
    windows do not divide the grid, the normed tokens are padded with zeros. The padding takes part in attention: its
    keys and values are the biases of ``qkv``. There is no class token, as in ViTDet. ViTDet's optional relative
    positions are not supported, because MAE's weights have none.

    Without ``window``, all blocks are global and there is a class token, as in pre-training. The maps are then
    ``encoder.forward_features(images, layers=layers, pool="map")``.

    Args:
        encoder: a classifier or an autoencoder.
        layers: blocks whose outputs are returned, in that order. -1 is the last block.
        window: side of the windows, in patches. None: no windows.
        global_blocks: blocks without windows. None: the last block of each quarter, ViTDet's (2, 5, 8, 11) of 12.

    Raises:
        ValueError: if the encoder does not have one of the blocks, or if ``window`` is below 1.
    """

    def __init__(
        self,
        encoder: Backbone,
        layers: Sequence[int] = (-1,),
        window: int | None = 14,
        global_blocks: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        depth = len(encoder.blocks)
        if not layers:
            raise ValueError("layers must name at least one block")
        if window is not None and window < 1:
            raise ValueError(f"window must be at least 1 patch, or None for no windows, got {window}")
        self.layers = block_numbers(layers, depth)
        self.window = window
        if global_blocks is None:
            global_blocks = [-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
        self.global_blocks = block_numbers(global_blocks, depth, "global_blocks")
        self.cls_token, self.pos_embed = encoder.cls_token, encoder.pos_embed
        self.patch_embed, self.blocks = encoder.patch_embed, encoder.blocks[: max(self.layers) + 1]
        self.in_chans, self.nodata, self.pixel_dtype = encoder.in_chans, encoder.nodata, encoder.pixel_dtype
        self.grad_checkpointing = encoder.grad_checkpointing
        for name in ("pixel_mean", "pixel_std"):
            self.register_buffer(name, getattr(encoder, name), persistent=False)

    @property
    def feature_info(self) -> Any:
        """timm's ``FeatureInfo`` of the maps: ``channels()``, ``reduction()`` (pixels per value) and so on."""
        from timm.models import FeatureInfo

        info = {"num_chs": self.cls_token.shape[2], "reduction": max(self.patch_embed.patch_size)}
        return FeatureInfo([{**info, "module": f"blocks.{i}"} for i in range(len(self.blocks))], tuple(self.layers))

    def forward(self, images: Tensor) -> list[Tensor]:
        """Outputs [N, D, h, w] of the blocks, before any norm, in the order of ``layers``.

        Args:
            images: floating [N, C, H, W], standardised, or raw pixels [N, H, W, C]. Height and width are multiples of
                the patch size.

        Raises:
            ValueError: if the shape of the images is wrong.
        """
        grid = self.patch_grid(images)
        x = self.embed_patches(images, None, grid)
        if self.window is None:
            return [as_map(output[:, 1:], grid) for output in self.block_outputs(x, self.layers)]
        windows = Windows(grid, self.window)
        each = [None if i in self.global_blocks else windows for i in range(len(self.blocks))]
        return [as_map(output, grid) for output in self.block_outputs(x[:, 1:], self.layers, each)]


def layer_groups(prefix: str) -> dict[str, Any]:
    """Layers for timm's layer-wise decay: embedding, each block, everything after the blocks.

    ``prefix``, such as "net.", is the name of the ``DenseEncoder`` in the model.
    """
    at = "^" + re.escape(prefix)
    return {"stem": rf"{at}(?:cls_token|pos_embed|patch_embed)", "blocks": rf"{at}blocks\.(\d+)"}


class ChannelNorm(nn.LayerNorm):
    """Layer norm of maps [N, C, h, w] over their channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """Convolution without bias (the map keeps its size), then layer norm over the channels."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int) -> None:
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = ChannelNorm(out_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self.norm(super().forward(x))
        return normed


class SimpleFeaturePyramid(nn.Module):
    """ViTDet's feature pyramid on the last map of an encoder: a backbone for torchvision's detectors.

    Its parameters have the names of the published implementation. p6 is p5 subsampled by 2.

    Args:
        net: the encoder. Its last map is used.
        out_channels: channels of each map.
    """

    def __init__(self, net: DenseEncoder, out_channels: int = 256) -> None:
        super().__init__()
        self.net = net
        self.out_channels = out_channels  # torchvision reads this attribute
        width = net.cls_token.shape[2]

        def doubled(width: int) -> nn.Module:
            return nn.ConvTranspose2d(width, width // 2, kernel_size=2, stride=2)

        def level(width: int, *scaling: nn.Module) -> nn.Module:
            return nn.Sequential(
                *scaling, NormedConv(width, out_channels, 1), NormedConv(out_channels, out_channels, 3)
            )

        norm = ChannelNorm(width // 2, eps=1e-6)
        self.simfp_2 = level(width // 4, doubled(width), norm, nn.GELU(), doubled(width // 2))
        self.simfp_3 = level(width // 2, doubled(width))
        self.simfp_4 = level(width)
        self.simfp_5 = level(width, nn.MaxPool2d(2))

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        """Images -> maps "p2" to "p6", [N, out_channels, H / s, W / s]. For patch size 16, s = 4, 8, 16, 32, 64.

        If the grid has an odd number of rows or columns, p5 ignores the last one. Pad images to a multiple of 32
        pixels, as torchvision's detectors do.
        """
        x = self.net(images)[-1]
        levels = {f"p{i}": self.get_submodule(f"simfp_{i}")(x) for i in (2, 3, 4, 5)}
        return OrderedDict(levels, p6=F.max_pool2d(levels["p5"], kernel_size=1, stride=2))
