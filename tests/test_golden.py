"""The published weights give the numbers with which transformers checked its conversion.

These tests need two environment variables:

MAE_FAST_GOLDEN_WEIGHTS: ViT-MAE base, large or huge with its decoder, trained without normalised pixels: the published
mae_visualize_vit_{base,large,huge}.pth, or a folder with facebook/vit-mae-{base,large,huge}.
MAE_FAST_GOLDEN_IMAGE: the fox in the demo of github.com/facebookresearch/mae, asset 147738734 of its issues.
"""

import os
import re
from pathlib import Path

import pytest
import torch

import mae_fast
from mae_fast.weights.files import load_weights

# By width of the encoder: the first predictions [3, 3] of the first image, with noise of torch.manual_seed(2).
GOLDEN = {
    768: (
        "mae_vit_base_patch16",
        [[-0.9192, -0.8481, -1.1259], [-1.1349, -1.0034, -1.2599], [-1.1757, -1.0429, -1.2726]],
    ),
    1024: (
        "mae_vit_large_patch16",
        [[-0.7309, -0.7128, -1.0169], [-1.0161, -0.9058, -1.1878], [-1.0478, -0.9411, -1.1911]],
    ),
    1280: (
        "mae_vit_huge_patch14",
        [[-1.1599, -0.9199, -1.2221], [-1.1952, -0.9269, -1.2307], [-1.2143, -0.9337, -1.2262]],
    ),
}
WEIGHTS, IMAGE = (os.environ.get(f"MAE_FAST_GOLDEN_{what}") for what in ("WEIGHTS", "IMAGE"))


def standardised(path):
    """As ViTMAEImageProcessor: 224 x 224 pixels for any aspect ratio, bicubic, ImageNet mean and standard deviation."""
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        pixels = np.array(image.convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((torch.from_numpy(pixels) / 255 - mean) / std).permute(2, 0, 1)[None]


def first_predictions(model, image):
    torch.manual_seed(2)
    with torch.inference_mode():
        _, pred, _ = model.eval()(image)
    return pred[0, :3, :3]


@pytest.mark.slow
@pytest.mark.skipif(
    not (WEIGHTS and IMAGE),
    reason="set MAE_FAST_GOLDEN_WEIGHTS (ViT-MAE with its decoder, file or folder) and MAE_FAST_GOLDEN_IMAGE (the fox)",
)
def test_golden_numbers():
    width = max(x.shape[2] for name, x in load_weights(Path(WEIGHTS)).items() if re.search(r"(^|\.)cls_token$", name))
    name, expected = GOLDEN[width]
    found = first_predictions(mae_fast.create_model(name, WEIGHTS), standardised(IMAGE))
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=1e-4)


def test_preprocessing_matches_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    import numpy as np
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((300, 260)).save(tmp_path / "x.png")  # lossless, for both decoders
    processor = transformers.ViTImageProcessorPil(
        size={"height": 224, "width": 224}, resample=3,
        image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225],
    )  # fmt: skip
    with Image.open(tmp_path / "x.png") as image:
        theirs = processor(image, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(standardised(tmp_path / "x.png"), theirs)


def test_masking_noise_matches_transformers():
    """The same seed and weights give the same predictions, so no other random numbers precede the noise."""
    pytest.importorskip("transformers")
    from support import inputs, tiny

    from mae_fast.bench.contenders import transformers_mae

    model = tiny()
    image, _ = inputs(model, 1)
    theirs = transformers_mae(model, 0.75).eval()
    torch.manual_seed(2)
    with torch.inference_mode():
        logits = theirs(image).logits
    torch.testing.assert_close(first_predictions(model, image), logits[0, :3, :3])
