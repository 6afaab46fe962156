"""Results of the paper (He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022).

Top-1 accuracy in per cent of ViT-L/16 on ImageNet-1K, pre-trained for 800 epochs unless a row says otherwise.
"""

from typing import NamedTuple


class Published(NamedTuple):
    """Top-1 accuracy in per cent after fine-tuning and of a linear probe; None: not reported."""

    finetune: float | None = None
    linprobe: float | None = None


DEFAULT = Published(84.9, 73.5)  # decoder of 8 blocks, 512 wide; pixels not normalised, random crops, 75 % random masks

# By table and row, with the names of ``mae-fast ablate``.
PAPER: dict[str, dict[str, Published]] = {
    "decoder-depth": {
        "1": Published(84.8, 65.5),
        "2": Published(84.9, 70.0),
        "4": Published(84.9, 71.9),
        "8": DEFAULT,
        "12": Published(84.4, 73.3),
    },
    "decoder-width": {  # relative to the default of 512
        "1/4": Published(84.9, 69.1),
        "1/2": Published(84.8, 71.3),
        "1": DEFAULT,
        "3/2": Published(84.4, 73.1),
        "2": Published(84.3, 73.1),
    },
    "mask-token": {"with": Published(84.2, 59.6), "without": DEFAULT},
    "target": {
        "pixel": DEFAULT,
        "pixel-norm": Published(85.4, 73.9),
        "pca": Published(84.6, 72.3),
        "dvae": Published(85.3, 71.6),
    },
    "augmentation": {
        "none": Published(84.0, 65.7),
        "crop-fixed": Published(84.7, 73.1),
        "crop": DEFAULT,
        "crop-jitter": Published(84.3, 71.9),
    },
    "mask-sampling": {
        "random-75": DEFAULT,
        "block-50": Published(83.9, 72.3),
        "block-75": Published(82.8, 63.9),
        "grid-75": Published(84.0, 66.0),
    },
    "mask-ratio": {
        "0.1": Published(83.2, 54.6),
        "0.2": Published(83.4, 58.9),
        "0.3": Published(83.4, 61.7),
        "0.4": Published(84.7, 67.0),
        "0.5": Published(84.9, 69.9),
        "0.6": Published(85.0, 71.8),
        "0.7": Published(84.9, 73.2),
        "0.75": DEFAULT,
        "0.8": Published(84.5, 71.8),
        "0.9": Published(83.0, 66.1),
    },
    "schedule": {  # relative to the default of 800 epochs
        "1/8": Published(82.3, 57.3),
        "1/4": Published(83.3, 64.4),
        "1/2": Published(84.3, 69.7),
        "1": DEFAULT,
        "2": Published(85.1, 75.1),
    },
    "partial": {  # number of fine-tuned blocks, of 24; 0 is the linear probe
        "0": Published(73.5),
        "0.5": Published(79.1),
        "1": Published(81.0),
        "2": Published(83.1),
        "4": Published(84.2),
        "6": Published(84.4),
        "12": Published(84.6),
        "18": Published(84.7),
        "all": Published(84.9),
    },
}
SOURCES = {
    "decoder-depth": "Table 1a",
    "decoder-width": "Table 1b",
    "mask-token": "Table 1c",
    "target": "Table 1d",
    "augmentation": "Table 1e",
    "mask-sampling": "Table 1f",
    "mask-ratio": "Figure 5, labels of the points",
    "schedule": "Figure 7, labels of the points",
    "partial": "Figure 9, labels of the points; half a block: section 4.3",
}

# Table 1c: training FLOPs of ViT-L/16 with mask tokens in the encoder, divided by those without; decoder of 8 blocks.
MASK_TOKEN_FLOPS = 3.3
# Table 2: speedup of training without mask tokens in the encoder, by preset and decoder depth (wall-clock time on 128
# TPU-v3 cores; the baseline has mask tokens and 8 decoder blocks). The table does not include ViT-B.
SPEEDUP = {("large", 8): 2.8, ("large", 1): 3.7, ("huge", 8): 3.5, ("huge", 1): 4.1}
