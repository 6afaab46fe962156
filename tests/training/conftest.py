"""Images and folders shared by the tests of training."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty smooth pictures of 40 x 36 pixels: five steps of eight."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(40):
        small = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        small.resize((36, 40), Image.Resampling.BICUBIC).save(root / f"{i:02}.jpg")
    return root


@pytest.fixture(scope="session")
def labelled_images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of three classes that differ in colour: 24 per class in train/, and 7, 8 and 9 in val/."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for split, counts in (("train", (24, 24, 24)), ("val", (7, 8, 9))):
        for colour, count in enumerate(counts):
            folder = root / split / "rgb"[colour]
            folder.mkdir(parents=True)
            for i in range(count):
                small = rng.integers(0, 160, (4, 4, 3), dtype=np.uint8)
                small[..., colour] += 60
                Image.fromarray(small).resize((36, 40), Image.Resampling.BICUBIC).save(folder / f"{i:02}.jpg")
    return root
