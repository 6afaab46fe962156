"""Detection and instance segmentation on a plain encoder: torchvision's Faster R-CNN and Mask R-CNN (He et al., ICCV
2017) with the pyramid and the heads of Li et al., "Exploring Plain Vision Transformer Backbones for Object Detection",
ECCV 2022 (ViTDet).

Shapes: N images, S their side, M objects of an image, K classes.
"""

from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.poolers import LevelMapper

from ..ops.patches import standardise
from .dense import ChannelNorm, DenseEncoder, SimpleFeaturePyramid, layer_groups
from .features import Backbone

NORM = partial(ChannelNorm, eps=1e-6)


class IdentityTransform(nn.Module):
    """Replaces torchvision's transform. It standardises images, but does not resize them or paste masks."""

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Backbone) -> None:
        super().__init__()
        self.register_buffer("mean", encoder.pixel_mean, persistent=False)
        self.register_buffer("std", encoder.pixel_std, persistent=False)

    def forward(self, images: Tensor, targets: Any = None) -> tuple[ImageList, Any]:
        standardised = standardise(images, self.mean, self.std)
        return ImageList(standardised, [tuple(standardised.shape[2:])] * len(images)), targets

    def postprocess(self, detections: Any, *_: Any) -> Any:
        return detections


class Detector(FasterRCNN):  # type: ignore[misc]
    """Faster R-CNN; with ``masks``, Mask R-CNN.

    ``images`` are uint8 [N, S, S, 3]. In training mode ``model(images, targets)`` returns torchvision's dict of losses.
    In evaluation mode ``model(images)`` returns a list of dicts: "boxes" [M, 4] in pixels, "labels" [M] from 1,
    "scores" [M] and "masks" [M, 1, 28, 28]. Each mask covers its box. torchvision would paste the masks into the image,
    which takes M * S * S values.

    The heads are those of ViTDet: two convolutions for region proposals; four convolutions and a linear layer for
    boxes; four convolutions for masks. The heads of boxes and masks have layer norm. The side of the anchors is 8 times
    the stride of their map. Regression losses and RoIAlign are torchvision's. ViTDet's published code uses L1 losses
    and a different half-pixel offset.

    Pyramid and heads have 256 channels, or half the width of the encoder if that is less. Images of fewer than 64 x 64
    patches get fewer proposals.

    Args:
        encoder: a classifier or an autoencoder. The detector shares its blocks.
        num_classes: K, without the background.
        size: S, a multiple of 4 patches, because the pyramid halves the grid twice.
        window: see ``DenseEncoder``.

    Raises:
        ValueError: if the size is not a multiple of 4 patches, or the window is below 1.
    """

    def __init__(
        self, encoder: Backbone, num_classes: int, size: int, masks: bool = True, window: int | None = 14
    ) -> None:
        net = DenseEncoder(encoder, window=window)
        patch = max(net.patch_embed.patch_size)
        if size % (4 * patch):
            raise ValueError(f"the image size must be a multiple of 4 patches of {patch} pixels, got {size}")
        share = min(1.0, max(1 / 8, (size / patch / 64) ** 2))  # of the default number of proposals
        channels = min(256, net.cls_token.shape[2] // 2)
        strides = [patch / 4, patch / 2, patch, patch * 2, patch * 4]
        anchors = AnchorGenerator(tuple((8 * s,) for s in strides), ((0.5, 1.0, 2.0),) * len(strides))

        def pooled(side: int) -> MultiScaleRoIAlign:
            pool = MultiScaleRoIAlign(["p2", "p3", "p4", "p5"], side, sampling_ratio=2)
            # Set here, because torchvision infers scales from the first images, for strides that are powers of 2 only.
            pool.scales = [1 / s for s in strides[:4]]
            pool.map_levels = LevelMapper(2, 5, canonical_scale=14 * patch, canonical_level=4)
            return pool

        super().__init__(
            SimpleFeaturePyramid(net, channels),
            rpn_anchor_generator=anchors,
            rpn_head=RPNHead(channels, 3, conv_depth=2),
            rpn_pre_nms_top_n_train=int(2000 * share),
            rpn_post_nms_top_n_train=int(2000 * share),
            rpn_pre_nms_top_n_test=int(1000 * share),
            rpn_post_nms_top_n_test=int(1000 * share),
            box_batch_size_per_image=int(512 * share),
            box_roi_pool=pooled(7),
            box_head=FastRCNNConvFCHead((channels, 7, 7), [channels] * 4, [4 * channels], norm_layer=NORM),
            box_predictor=FastRCNNPredictor(4 * channels, 1 + num_classes),
        )
        self.transform = IdentityTransform(encoder)
        outputs = [self.backbone, self.rpn.head, self.roi_heads.box_predictor]
        if masks:
            self.roi_heads.mask_roi_pool = pooled(14)
            self.roi_heads.mask_head = MaskRCNNHeads(channels, [channels] * 4, 1, norm_layer=NORM)
            self.roi_heads.mask_predictor = MaskRCNNPredictor(channels, channels, 1 + num_classes)
            outputs.append(self.roi_heads.mask_predictor)
        for module in outputs:
            module.register_forward_hook(_to_fp32)

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks of the encoder."""
        blocks: nn.ModuleList = self.backbone.net.blocks
        return blocks

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers for timm's layer-wise decay: embedding, each block, everything after the blocks."""
        return layer_groups("backbone.net.")

    def no_weight_decay(self) -> set[str]:
        """Parameters with more than one dimension that get no weight decay."""
        return {"backbone.net.pos_embed", "backbone.net.cls_token"}


def _to_fp32(_module: nn.Module, _inputs: Any, output: Any) -> Any:
    """A forward hook that casts 16-bit outputs to fp32.

    torchvision computes coordinates in the dtype of its input, and 16 bits are too few for them.
    """
    return tree_map_only(Tensor, lambda x: x.float() if x.element_size() == 2 else x, output)
