"""Semantic segmentation with UPerNet (Xiao et al., "Unified Perceptual Parsing for Scene Understanding", ECCV 2018) on
four feature maps of a plain encoder, as in the benchmarks of BEiT (Bao et al., 2022) and MAE.

Shapes: N images, K classes, D width of the encoder, C channels of the head, h x w of a map.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.patches import image_size, without_missing
from .dense import DenseEncoder, layer_groups
from .features import Backbone

UNLABELLED = 255  # label of pixels without a class
AUXILIARY = 0.4  # weight of the auxiliary head's loss
WINDOWS = 8  # batch size of sliding-window inference
STRIDE = 2 / 3  # of the sliding window, as a share of its side


def _conv(in_channels: int, channels: int, kernel_size: int) -> nn.Sequential:
    conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels), nn.ReLU())


def _classifier(channels: int, num_classes: int) -> nn.Conv2d:
    conv = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(conv.weight, std=0.01)
    assert conv.bias is not None
    nn.init.zeros_(conv.bias)
    return conv


def _resized(x: Tensor, size: Sequence[int]) -> Tensor:
    return F.interpolate(x, size=list(size), mode="bilinear", align_corners=False)


class UPerNet(nn.Module):
    """UPerNet's head: pyramid pooling of the last map, a feature pyramid over all maps, and their fusion.

    Args:
        width: D of the maps.
        channels: C of the head.
        bins: sides of the grids that the last map is pooled to.
    """

    def __init__(self, width: int, num_classes: int, channels: int, bins: Sequence[int] = (1, 2, 3, 6)) -> None:
        super().__init__()
        self.pyramid = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(side), _conv(width, channels, 1)) for side in bins
        )
        self.bottleneck = _conv(width + len(bins) * channels, channels, 3)
        self.lateral = nn.ModuleList(_conv(width, channels, 1) for _ in range(3))
        self.smooth = nn.ModuleList(_conv(channels, channels, 3) for _ in range(3))
        self.fusion = _conv(4 * channels, channels, 3)
        self.classifier = _classifier(channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        """Four maps [N, D, h, w], finest first -> logits [N, K, h, w] in the size of the finest map."""
        *fine, top = maps
        pooled = [_resized(level(top), top.shape[2:]) for level in self.pyramid]
        x = self.bottleneck(torch.cat([top, *pooled], 1))
        levels = [x]
        for i in (2, 1, 0):
            side = self.lateral[i](fine[i])
            x = side + _resized(x, side.shape[2:])
            levels.append(self.smooth[i](x))
        size = fine[0].shape[2:]
        logits: Tensor = self.classifier(self.fusion(torch.cat([_resized(level, size) for level in levels], 1)))
        return logits


class SegmentationModel(nn.Module):
    """UPerNet on an encoder's maps, resized to strides of 1/4, 1/2, 1 and 2 patches (4, 8, 16, 32 pixels for patch 16).

    The heads use batch norm, as in the papers. It removes the mean over positions, which in maps of a pre-trained
    encoder is several times larger than the differences between positions. Layer norm would keep that mean. Use
    ``nn.SyncBatchNorm.convert_sync_batchnorm`` to share the statistics of all processes. There is no dropout before the
    classifiers.

    Images may have any size. They are padded at the bottom and the right with the mean colour, to whole patches.

    Args:
        encoder: the model shares its blocks, up to the last one of ``layers``.
        num_classes: K.
        channels: C of the head. The auxiliary head has half of that.
        layers: numbers of the four blocks whose outputs are the maps. None: the last block of each quarter.
    """

    def __init__(
        self, encoder: Backbone, num_classes: int, channels: int = 512, layers: Sequence[int] | None = None
    ) -> None:
        super().__init__()
        depth = len(encoder.blocks)
        self.net = DenseEncoder(
            encoder, layers or [-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)], window=None
        )
        self.num_classes = num_classes
        width = encoder.cls_token.shape[2]

        def doubled() -> nn.Module:
            return nn.ConvTranspose2d(width, width, kernel_size=2, stride=2)

        self.scales = nn.ModuleList(
            [
                nn.Sequential(doubled(), nn.BatchNorm2d(width), nn.GELU(), doubled()),
                doubled(),
                nn.Identity(),
                nn.MaxPool2d(2, ceil_mode=True),
            ]
        )
        self.head = UPerNet(width, num_classes, channels)
        half = max(1, channels // 2)
        self.auxiliary = nn.Sequential(_conv(width, half, 3), _classifier(half, num_classes))

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the encoder."""
        return self.net.blocks

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: embedding, each block, everything after the blocks."""
        return layer_groups("net.")

    def no_weight_decay(self) -> set[str]:
        """Parameters with more than one dimension that get no weight decay."""
        return {"net.pos_embed", "net.cls_token"}

    def _maps(self, images: Tensor) -> list[Tensor]:
        _, height, width = image_size(images, self.net.is_raw(images))
        p, q = self.net.patch_embed.patch_size
        if height % p or width % q:
            if stats := self.net.pixel_stats(images):
                images = without_missing(images, **stats)
            images = F.pad(images, (0, -width % q, 0, -height % p))
        return [scale(x) for scale, x in zip(self.scales, self.net(images), strict=True)]

    def _to_pixels(self, logits: Tensor, images: Tensor) -> Tensor:
        """Logits of a map -> logits of the pixels of ``images``, without the padding: fp32 [N, K, H, W]."""
        _, height, width = image_size(images, self.net.is_raw(images))
        p, q = self.net.patch_embed.patch_size
        padded = height + -height % p, width + -width % q
        return _resized(logits.float(), padded)[..., :height, :width]

    def forward(self, images: Tensor) -> Tensor:
        """Logits fp32 [N, K, H, W] of images: floating [N, C, H, W], standardised, or raw pixels [N, H, W, C]."""
        return self._to_pixels(self.head(self._maps(images)), images)

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Cross-entropy of both heads, scalar.

        It is the mean over all pixels. Unlabelled pixels contribute zero loss. So the mean over processes is the mean
        over all their images.

        Args:
            images: as in ``forward``.
            labels: int64 [N, H, W]. 255: no label.
        """
        maps = self._maps(images)

        def entropy(logits: Tensor) -> Tensor:
            logits = self._to_pixels(logits, images)
            return F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum") / labels.numel()

        return entropy(self.head(maps)) + AUXILIARY * entropy(self.auxiliary(maps[2]))


def windows(height: int, width: int, crop: int, stride: int) -> list[list[tuple[int, int]]]:
    """(top, left) of each window of ``slide``, grouped into batches."""
    h, w = min(crop, height), min(crop, width)
    corners = [
        (min(top, height - h), min(left, width - w))
        for top in range(0, height - h + stride, stride)
        for left in range(0, width - w + stride, stride)
    ]
    return [corners[i : i + WINDOWS] for i in range(0, len(corners), WINDOWS)]


def stride_of(crop: int) -> int:
    """The stride in pixels between windows of ``crop`` pixels."""
    return max(1, round(crop * STRIDE))


def whole_image_logits(model: Callable[[Tensor], Tensor], image: Tensor, crop: int, size: tuple[int, int]) -> Tensor:
    """Logits fp32 [K, *size] of an image, by sliding-window inference.

    Args:
        model: as in ``slide``.
        image: raw pixels [H, W, C], whose shorter side has ``crop`` pixels, as from ``data.segmentation.scaled``.
        crop: side of the windows.
        size: height and width of the result: those of the original image.
    """
    logits = slide(model, image, crop, stride_of(crop))
    return F.interpolate(logits[None], size=size, mode="bilinear", align_corners=False)[0]


def slide(model: Callable[[Tensor], Tensor], image: Tensor, crop: int, stride: int) -> Tensor:
    """Outputs of ``model`` for ``crop`` x ``crop`` windows of an image, averaged where they overlap: fp32 [K, H, W].

    The last windows of a row and a column end at the border. Windows are never larger than the image.

    Args:
        model: maps raw pixels [N, h, w, C] to [N, K, h, w].
        image: raw pixels [H, W, C].
        stride: distance between windows, at most ``crop``.
    """
    height, width, _ = image.shape
    h, w = min(crop, height), min(crop, width)
    total: Tensor | None = None
    counts = torch.zeros(height, width, device=image.device)
    for corners in windows(height, width, crop, stride):
        answers = model(torch.stack([image[top : top + h, left : left + w] for top, left in corners])).float()
        if total is None:
            total = answers.new_zeros(answers.shape[1], height, width)
        for answer, (top, left) in zip(answers, corners, strict=True):
            total[:, top : top + h, left : left + w] += answer
            counts[top : top + h, left : left + w] += 1
    assert total is not None
    return total / counts
