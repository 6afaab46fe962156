"""Reconstructions: errors against loops over pixels, pictures looked into, the command on real files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mae_fast.errors import UserError
from mae_fast.models.mae import MaskedAutoencoderViT, build
from mae_fast.models.reconstruction import GREY, psnr, reconstruct
from mae_fast.report.probe import probe
from mae_fast.report.reconstruct import reconstruct_files
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw


def tiny(norm_pix_loss: bool = False) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return build("mae_vit_tiny_patch4", norm_pix_loss=norm_pix_loss, depth=1, decoder_depth=1).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_errors_against_loops(images: torch.Tensor) -> None:
    model, noise = tiny(), torch.rand(3, 64)
    parts = reconstruct(model, images, noise, mask_ratio=0.75)
    pasted = reconstruct(model, images, noise, mask_ratio=0.75, paste_visible=True)
    for n in range(3):
        original = images[n].numpy() / 255
        predicted = parts.predicted[n].permute(1, 2, 0).numpy()
        masked = parts.masked[n].permute(1, 2, 0).numpy()
        removed = np.kron(parts.mask[n].numpy().reshape(8, 8), np.ones((4, 4))).astype(bool)
        assert removed.sum() == 48 * 16
        assert parts.squared_error[n] == pytest.approx(((predicted - original) ** 2)[removed].mean(), rel=1e-5)
        fill = original[~removed].mean(0)
        assert parts.mean_fill_error[n] == pytest.approx(((fill - original) ** 2)[removed].mean(), rel=1e-5)
        assert np.allclose(masked[~removed], original[~removed], atol=1e-6)
        assert (masked[removed] == GREY).all()
        shown = pasted.predicted[n].permute(1, 2, 0).numpy()
        assert np.allclose(shown[~removed], original[~removed], atol=1e-6)
        assert np.array_equal(shown[removed], predicted[removed])
    assert torch.equal(parts.squared_error, pasted.squared_error)
    assert psnr(torch.tensor([0.01, 0.03])) == pytest.approx(10 * math.log10(1 / 0.02))


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_gives_the_image_back(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, norm_pix_loss: bool
) -> None:
    """For standardised pixels: with the original patches' mean and variance put back."""
    model = tiny(norm_pix_loss)
    standard = (images.permute(0, 3, 1, 2) / 255 - model.pixel_mean[:, None, None]) / model.pixel_std[:, None, None]
    target = model.patchify(standard)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    monkeypatch.setattr(model, "forward", lambda *_: (None, target, torch.ones(3, 64)))
    parts = reconstruct(model, images, torch.rand(3, 64))
    assert torch.allclose(parts.predicted, parts.original, atol=1e-5)


def saved_run(folder: Path, model: MaskedAutoencoderViT, **kwargs: object) -> Path:
    state = {
        "model": {"name": "mae_vit_tiny_patch4", "depth": 1, "decoder_depth": 1, **kwargs},
        "mask_ratio": 0.75,
    }
    saved = checkpoint.snapshot(7, model, adamw(model, 0.1, 0.05), json.loads(json.dumps(state)))
    checkpoint.write(folder / "checkpoints", saved)
    return folder


def photographs(folder: Path, count: int = 5) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, level in (("dark", 40), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(level, 20, (40, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.png")
    return folder


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_command_writes_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str], norm_pix_loss: bool) -> None:
    run = saved_run(tmp_path / "run", tiny(norm_pix_loss), norm_pix_loss=norm_pix_loss)
    data = photographs(tmp_path / "data")
    output = tmp_path / "new" / "picture.png"
    reconstruct_files(run, [data, data / "train" / "dark" / "0.png"], output, show=4)
    said = capsys.readouterr().out
    assert "11 images, checkpoint step-00000007" in said
    assert ("normalised pixels: shown with the mean and variance of the original" in said) == norm_pix_loss
    assert ("dB" in said) == (not norm_pix_loss)
    with Image.open(output) as picture:
        assert picture.width > 3 * 96
        assert picture.height > 4 * 96


def test_command_says_what_is_wrong(tmp_path: Path) -> None:
    run, data = saved_run(tmp_path / "run", tiny()), photographs(tmp_path / "data")
    with pytest.raises(UserError, match=r"give a picture's name, such as .*x\.png"):
        reconstruct_files(run, [data], tmp_path / "x.pdf")
    with pytest.raises(UserError, match="no visible patch"):
        reconstruct_files(run, [data], tmp_path / "x.png", mask_ratio=0.999)
    with pytest.raises(UserError, match="does not exist"):
        reconstruct_files(run, [tmp_path / "nowhere"], tmp_path / "x.png")


def test_probe_separates_dark_from_light(tmp_path: Path) -> None:
    run, data = saved_run(tmp_path / "run", tiny()), photographs(tmp_path / "data", count=12)
    scores = probe(run, data)
    assert [name.split(" (")[0] for name in scores] == ["pre-trained encoder", "untrained encoder", "raw pixels"]
    assert all(score.accuracy == score.balanced == 1.0 for score in scores.values())
    (data / "val" / "light").rename(data / "val" / "other")
    with pytest.raises(UserError, match="same class folders"):
        probe(run, data)
