"""``create_model`` loads the weights of runs, with their image size and number of channels."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import one_thread  # noqa: F401

import mae_fast
from mae_fast.weights.run_reader import MODEL, find_checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")

CHANNELS, SIZE = 4, 16
FLAGS: dict[str, Any] = {"preset": "tiny", "input_size": SIZE, "in_chans": CHANNELS, "epochs": 1, "warmup_epochs": 0,
                         "batch_size": 4, "num_workers": 0, "device": "cpu", "dtype": "fp32"}  # fmt: skip
# For each verb: its flags, the prefix of the encoder's weights in checkpoints, and a factory.
VERBS: dict[str, tuple[dict[str, Any], str, str]] = {
    "pretrain": ({}, "", "mae_vit_tiny_patch4"),
    "finetune": ({}, "", "vit_tiny_patch4"),
    "segment": ({"head_channels": 8}, "net.", "vit_tiny_patch4"),
}


def save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


@pytest.fixture
def data(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Random uint8 images [20, 20, 4] in two class folders; for segmentation, with masks."""
    rng, root = np.random.default_rng(0), tmp_path / "data"
    for split in ("train", "val"):
        for i in range(4):
            image = rng.integers(256, size=(20, 20, CHANNELS), dtype=np.uint8)
            if request.param == "segment":
                save(root / split / "images" / f"{i}.npy", image)
                save(root / split / "masks" / f"{i}.npy", rng.integers(2, size=(20, 20), dtype=np.uint8))
            else:
                save(root / split / f"class{i % 2}" / f"{i}.npy", image)
    return root


@pytest.mark.parametrize(("verb", "data"), [(verb, verb) for verb in VERBS], indirect=["data"])
def test_a_run_gives_its_image_size_and_channels(
    verb: str, data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags, prefix, factory = VERBS[verb]
    run = tmp_path / "run"
    getattr(mae_fast, verb)(data_path=data, output_dir=run, **FLAGS, **flags)
    caplog.clear()
    caplog.set_level(logging.WARNING, "mae_fast")
    model = mae_fast.create_model(factory, run)
    assert (model.in_chans, model.patch_embed.img_size) == (CHANNELS, (SIZE, SIZE))
    saved = load_file(find_checkpoint(run).path / MODEL)
    own = model.state_dict()
    shared = [name for name in own if prefix + name in saved]
    assert len(shared) >= len(list(model.blocks.parameters()))
    assert all(torch.equal(own[name], saved[prefix + name]) for name in shared)
    notes = [record.getMessage() for record in caplog.records]
    assert len(notes) == (2 if verb == "segment" else 0)  # no last norm, no head
    other = mae_fast.create_model(factory, run, img_size=24, in_chans=3)  # arguments replace those of the run
    assert (other.in_chans, other.patch_embed.img_size) == (3, (24, 24))
