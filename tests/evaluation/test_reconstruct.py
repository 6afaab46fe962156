"""Reconstructions: errors against loops over pixels, pixels of the pictures, the command line."""

import itertools
import json
import logging
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import command

from mae_fast.data.pixel_format import PixelFormat
from mae_fast.data.rng import mask_noise
from mae_fast.errors import UserError
from mae_fast.evaluation import images as images_module
from mae_fast.evaluation import reconstruct as reconstruct_module
from mae_fast.evaluation.reconstruct import Masking, ReconstructOptions, reconstruct_files, whole_image
from mae_fast.models.mae import MaskedAutoencoderViT, build
from mae_fast.models.pos_embed import resize_pos_embed
from mae_fast.models.reconstruction import (
    GREY,
    LARGEST,
    SMALLEST,
    Reconstruction,
    picture,
    psnr,
    reconstruct,
    resized_copy,
    sheet,
    tile,
)
from mae_fast.training import checkpoint
from mae_fast.training.optim import adamw
from mae_fast.weights import convert
from mae_fast.weights.convert_files import save_weights
from mae_fast.weights.metadata import ModelMetadata

MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
SCALE = -(-SMALLEST // 32)  # enlargement of 32-pixel images in a picture


def tiny(norm_pix_loss: bool = False, **kwargs: object) -> MaskedAutoencoderViT:
    torch.manual_seed(0)
    return build("mae_vit_tiny_patch4", norm_pix_loss=norm_pix_loss, depth=1, decoder_depth=1, **kwargs).eval()


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randint(0, 256, (3, 32, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def patches(image: np.ndarray, p: int = 4) -> np.ndarray:
    """[H, W, C] -> [L, p, p, C], by slicing."""
    h, w = (side // p for side in image.shape[:2])
    return np.stack([image[i * p : i * p + p, j * p : j * p + p] for i in range(h) for j in range(w)])


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
        expected = ((predicted - original) ** 2)[removed].mean(0)
        assert parts.squared_error[n].numpy() == pytest.approx(expected, rel=1e-5)
        fill = original[~removed].mean(0)
        assert parts.fill_error[n].numpy() == pytest.approx(((fill - original) ** 2)[removed].mean(0), rel=1e-5)
        assert np.allclose(masked[~removed], original[~removed], atol=1e-6)
        assert (masked[removed] == GREY).all()
        shown = pasted.predicted[n].permute(1, 2, 0).numpy()
        assert np.allclose(shown[~removed], original[~removed], atol=1e-6)
        assert np.array_equal(shown[removed], predicted[removed])
        one = parts[n]
        assert torch.equal(one.predicted, parts.predicted[n : n + 1])
        assert torch.equal(one.squared_error, parts.squared_error[n : n + 1])
        assert one.predicted.untyped_storage().nbytes() == one.predicted.nbytes  # not a view of the batch
    assert torch.equal(parts.squared_error, pasted.squared_error)
    assert psnr(torch.tensor([[0.01], [0.03]]), torch.ones(1)) == pytest.approx(10 * math.log10(1 / 0.02))
    assert psnr(torch.tensor([[1.0, 9.0]]), torch.tensor([10.0, 30.0])) == pytest.approx(20)


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_a_perfect_prediction_gives_the_image_back(
    images: torch.Tensor, monkeypatch: pytest.MonkeyPatch, norm_pix_loss: bool
) -> None:
    """For normalised pixels, the mean and variance of the original patches are restored."""
    model = tiny(norm_pix_loss)
    standard = (images.permute(0, 3, 1, 2) / 255 - model.pixel_mean[:, None, None]) / model.pixel_std[:, None, None]
    target = model.patchify(standard)
    if norm_pix_loss:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6) ** 0.5
    monkeypatch.setattr(model, "forward", lambda *_: (None, target, torch.ones(3, 64)))
    parts = reconstruct(model, images, torch.rand(3, 64))
    assert torch.allclose(parts.predicted, parts.original, atol=1e-5)


def test_normalised_pixels_and_their_fill_by_hand(images: torch.Tensor) -> None:
    """Patches get the mean and the unbiased variance of their standardised values. The fill gets the mean."""
    model, noise = tiny(norm_pix_loss=True), torch.rand(3, 64)
    parts = reconstruct(model, images, noise)
    with torch.no_grad():
        _, pred, mask = model(images, 0.75, noise)
    for n in range(3):
        original = patches(images[n].numpy() / 255)
        shown = patches(parts.predicted[n].permute(1, 2, 0).numpy())
        errors, fills = [], []
        for i, rows in enumerate(original):
            standard = (rows - MEAN) / STD
            back = pred[n, i].double().numpy().reshape(4, 4, 3) * np.sqrt(standard.var(ddof=1) + 1e-6) + standard.mean()
            expected = np.clip(back * STD + MEAN, 0, 1)
            assert np.allclose(shown[i], expected, atol=1e-5)
            if mask[n, i]:
                errors.append(np.square(expected - rows).mean())
                fills.append(np.square(standard.mean() * STD + MEAN - rows).mean())
        assert len(errors) == 48
        assert parts.squared_error[n].mean() == pytest.approx(np.mean(errors), rel=1e-4)
        assert parts.fill_error[n].mean() == pytest.approx(np.mean(fills), rel=1e-4)
    assert parts.note == "normalised pixels: shown with the mean and variance of the original patches"


def test_principal_components_are_shown_as_pixels(images: torch.Tensor) -> None:
    model, noise = tiny(target={"kind": "pca", "components": 5}), torch.rand(3, 64)
    model.target.centre.copy_(torch.randn(48) / 10)
    model.target.basis.copy_(torch.linalg.qr(torch.randn(48, 5))[0])
    parts = reconstruct(model, images, noise)
    with torch.no_grad():
        _, pred, _ = model(images, 0.75, noise)
    standard = pred.double() @ model.target.basis.double().T + model.target.centre.double()
    expected = np.clip(standard.numpy().reshape(3, 64, 4, 4, 3) * STD + MEAN, 0, 1)
    for n in range(3):
        assert np.allclose(patches(parts.predicted[n].permute(1, 2, 0).numpy()), expected[n], atol=1e-5)
    assert "5 principal components" in parts.note


def test_a_model_of_tokens_cannot_be_shown(images: torch.Tensor) -> None:
    model = tiny(target={"kind": "dvae", "vocab_size": 16, "hidden": 8, "groups": 3, "blocks_per_group": 1})
    with pytest.raises(ValueError, match="predicts tokens"):
        reconstruct(model, images, torch.rand(3, 64))


@pytest.mark.parametrize("kwargs", [{}, {"encoder_mask_token": True, "decoder_depth": 0}], ids=["plain", "mask tokens"])
def test_a_model_of_another_size_shares_its_weights(kwargs: dict[str, object]) -> None:
    """It equals a model that is built in that size with these weights and resized position tables."""
    torch.manual_seed(0)
    model = build("mae_vit_tiny_patch4", **{"depth": 1, "decoder_depth": 1, **kwargs}).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sized = resized_copy(model, (20, 48))
    other = build("mae_vit_tiny_patch4", img_size=(20, 48), **{"depth": 1, "decoder_depth": 1, **kwargs}).eval()
    tables = {name: resize_pos_embed(before[name], (8, 8), (5, 12)) for name in ("pos_embed", "decoder_pos_embed")}
    other.load_state_dict({**before, **tables})
    images = torch.randint(0, 256, (2, 20, 48, 3), dtype=torch.uint8)
    noise = torch.rand(2, 60)
    with torch.no_grad():
        for ours, theirs in zip(sized(images, 0.75, noise), other(images, 0.75, noise), strict=True):
            assert torch.equal(ours, theirs)
    assert sized.decoder_pred.weight is model.decoder_pred.weight
    assert model.patch_embed.grid_size == (8, 8)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def solid(colours: list[tuple[float, float, float]], height: int = 32, width: int = 32) -> Reconstruction:
    """A reconstruction whose masked, predicted and original images have one colour each."""
    masked, predicted, original = (torch.tensor(c)[None, :, None, None].expand(1, 3, height, width) for c in colours)
    figures = [torch.ones(1, 3)] * 4
    return Reconstruction(original, masked, predicted, torch.ones(1, 64), *figures)


def colours_along(array: np.ndarray) -> list[tuple[int, ...]]:
    """The sequence of colours on a line of pixels [n, 3], without white."""
    runs = [tuple(array[0])]
    for pixel in map(tuple, array):
        if pixel != runs[-1]:
            runs.append(pixel)
    return [run for run in runs if run != (255, 255, 255)]


def test_each_cell_shows_the_image_of_its_heading() -> None:
    """With one ratio, rows have three images. With several, they have the original, then two images per ratio."""
    values = iter(range(1, 250))

    def fresh() -> tuple[float, float, float]:
        return (next(values) / 255, 0.0, 1.0)

    def seen(colour: tuple[float, float, float]) -> tuple[int, ...]:
        return tuple(round(c * 255) for c in colour)

    many = [[fresh() for _ in range(3)] for _ in range(9)]  # masked, predicted, original of each image
    array = np.asarray(sheet([[solid(c)] for c in many], [""], "a caption\nof two lines"))
    side = 32 * SCALE + 4
    rows = [colours_along(array[y]) for y in (-side // 2, -side // 2 - side, -side // 2 - 2 * side)]
    wanted = [[seen(c) for block in many[i : i + 3] for c in block] for i in (6, 3, 0)]
    assert rows == wanted

    original = fresh()
    pairs = [[(fresh(), fresh()) for _ in range(3)] for _ in range(2)]
    images = [[solid([m, p, original]) for m, p in each] for each in pairs]
    array = np.asarray(sheet(images, ["75%", "85%", "95%"], ""))
    for row, each in ((-side // 2 - side, pairs[0]), (-side // 2, pairs[1])):
        assert colours_along(array[row]) == [seen(original), *(seen(c) for pair in each for c in pair)]


def test_pictures_state_how_normalised_pixels_are_shown(images: torch.Tensor) -> None:
    """Pictures of training state it, too, in an additional line."""
    plain, normal = (picture(reconstruct(tiny(norm), images, torch.rand(3, 64)), "caption") for norm in (False, True))
    assert normal.height > plain.height


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_tiles_keep_pixels_or_shrink(channels: int) -> None:
    image = torch.rand(channels, 5, 9)
    made = np.asarray(tile(image))
    scale = -(-SMALLEST // 9)
    kept = image[:3] if channels >= 3 else image[[0, 0, 0]]
    expected = np.round(kept.permute(1, 2, 0).numpy() * 255)
    assert np.array_equal(made, np.kron(expected, np.ones((scale, scale, 1))))
    assert np.array_equal(np.asarray(tile(torch.ones(3, 200, 300) * 0.2)), np.full((200, 300, 3), 51))
    assert tile(torch.rand(channels, LARGEST, 2 * LARGEST)).size == (LARGEST, LARGEST // 2)


def saved_run(
    folder: Path, model: MaskedAutoencoderViT, state: dict[str, object] | None = None, **kwargs: object
) -> Path:
    found = {
        "model": {"name": "mae_vit_tiny_patch4", "depth": 1, "decoder_depth": 1, **kwargs},
        "mask_ratio": 0.75,
        **(state or {}),
    }
    saved = checkpoint.snapshot(7, model, adamw(model, 0.1, 0.05), json.loads(json.dumps(found)))
    checkpoint.write(folder / "checkpoints", saved)
    return folder


def photographs(folder: Path, count: int = 5) -> Path:
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, level in (("dark", 40), ("light", 200)):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(level, 20, (40, 48, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / split / name / f"{i}.jpg")
    return folder


def noisy(path: Path, height: int = 32, width: int = 32, seed: int = 0) -> np.ndarray:
    """Write random pixels, none of them grey or white, as a PNG, and return them. Pictures must have exactly these."""
    pixels = np.random.default_rng(seed).integers(0, 120, (height, width, 3), dtype=np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return pixels


def mask_of(noise: np.ndarray, ratio: float, grid: tuple[int, int]) -> np.ndarray:
    """The mask of the patches, bool [h, w]."""
    mask = np.ones(noise.size, bool)
    mask[np.argsort(noise, kind="stable")[: int(noise.size * (1 - ratio))]] = False
    return mask.reshape(grid)


def greyed(pixels: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(np.kron(mask, np.ones((4, 4), bool))[:, :, None], round(GREY * 255), pixels)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    scale = max(1, -(-SMALLEST // max(pixels.shape[:2])))
    return np.kron(pixels, np.ones((scale, scale, 1), np.uint8))


def places(array: np.ndarray, block: np.ndarray) -> list[tuple[int, int]]:
    """The positions (y, x) of exact copies of ``block`` in a picture."""
    h, w = block.shape[:2]
    starts = (array[: len(array) - h + 1, : array.shape[1] - w + 1] == block[0, 0]).all(-1)
    return [(y, x) for y, x in np.argwhere(starts).tolist() if np.array_equal(array[y : y + h, x : x + w], block)]


@pytest.fixture(autouse=True)
def log_all(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "mae_fast")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_command_writes_the_picture(tmp_path: Path, caplog: pytest.LogCaptureFixture, norm_pix_loss: bool) -> None:
    run = saved_run(tmp_path / "run", tiny(norm_pix_loss), norm_pix_loss=norm_pix_loss)
    data = photographs(tmp_path / "data")
    output = tmp_path / "new" / "picture.png"
    reconstruct_files(run, [data, data / "train" / "dark" / "0.jpg"], output, options=ReconstructOptions(show=4))
    said = caplog.text
    assert f"11 images, {run}, step 7" in said
    assert ("normalised pixels: shown with the mean and variance of the original" in said) == norm_pix_loss
    assert ("dB" in said) == (not norm_pix_loss)
    with Image.open(output) as shown:
        assert shown.width > 3 * 96
        assert shown.height > 4 * 96
    assert [path.name for path in output.parent.iterdir()] == ["picture.png"]


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_cells_of_the_written_picture(tmp_path: Path, norm_pix_loss: bool) -> None:
    """The cells are the masked image, the prediction with the original visible patches, and the original image."""
    model = tiny(norm_pix_loss)
    run = saved_run(tmp_path / "run", model, norm_pix_loss=norm_pix_loss)
    files = [tmp_path / f"{i}.png" for i in range(3)]
    for i, file in enumerate(files):
        noisy(file, seed=i)
    reconstruct_files(run, files, tmp_path / "out.png", Masking(seed=3), options=ReconstructOptions(paste_visible=True))
    array = np.asarray(Image.open(tmp_path / "out.png"))
    side = 32 * SCALE + 4
    for i, file in enumerate(files):
        pixels = np.asarray(Image.open(file))
        noise = mask_noise(3, 0, i, 64)
        mask = mask_of(noise, 0.75, (8, 8))
        [(y, x)] = places(array, enlarged(greyed(pixels, mask)))
        assert places(array, enlarged(pixels)) == [(y, x + 2 * side)]
        shown = array[y : y + side - 4, x + side : x + 2 * side - 4][::SCALE, ::SCALE]
        removed = np.kron(mask, np.ones((4, 4), bool))
        assert np.array_equal(shown[~removed], pixels[~removed])
        with torch.no_grad():
            _, pred, _ = model(torch.from_numpy(pixels.copy())[None], 0.75, torch.from_numpy(noise)[None])
        for k, rows in enumerate(patches(pixels / 255)):
            if mask.flat[k]:
                back, standard = pred[0, k].double().numpy().reshape(4, 4, 3), (rows - MEAN) / STD
                if norm_pix_loss:
                    back = back * np.sqrt(standard.var(ddof=1) + 1e-6) + standard.mean()
                expected = np.clip(back * STD + MEAN, 0, 1) * 255
                assert np.abs(patches(shown)[k] - expected).max() <= 0.51


def test_several_ratios_side_by_side(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = saved_run(tmp_path / "run", tiny())
    pixels = noisy(tmp_path / "a.png")
    ratios = (0.75, 0.85, 0.95)
    found = reconstruct_files(run, [tmp_path / "a.png"], tmp_path / "out.png", Masking((*ratios, 0.75)))
    array = np.asarray(Image.open(tmp_path / "out.png"))
    side = 32 * SCALE + 4
    masks = [mask_of(mask_noise(0, 0, 0, 64), ratio, (8, 8)) for ratio in ratios]
    [(y, x)] = places(array, enlarged(pixels))
    assert [places(array, enlarged(greyed(pixels, mask))) for mask in masks] == [[(y, x + side * i)] for i in (1, 3, 5)]
    said = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[1] for line in said[:3]] == [f"{r} removed patches" for r in ("75%", "85%", "95%")]
    assert list(found) == list(ratios)  # a repeated ratio is shown once
    one = reconstruct_files(run, [tmp_path / "a.png"], tmp_path / "one.png", Masking((0.85,)))
    assert one[0.85] == found[0.85]
    assert len({*found.values()}) == 3


def test_the_kind_of_masks_follows_flags_then_the_run(tmp_path: Path) -> None:
    """The kind follows the flag, else the run, else it is random. Masks of a file are drawn by the key of the image."""
    pixels = noisy(tmp_path / "a.png")
    plain, block = (saved_run(tmp_path / name, tiny(), state) for name, state in (
        ("plain", {}), ("block", {"mask_sampling": "block", "mask_ratio": 0.5})))  # fmt: skip

    def mask_shown(run: Path, masking: Masking) -> np.ndarray:
        reconstruct_files(run, [tmp_path / "a.png"], tmp_path / "out.png", masking)
        array = np.asarray(Image.open(tmp_path / "out.png"))
        [(y, x)] = places(array, enlarged(pixels))
        side = 32 * SCALE + 4
        cell = array[y : y + side - 4, x - 2 * side : x - side - 4][::SCALE, ::SCALE]
        mask = (cell == round(GREY * 255)).all(-1)[::4, ::4]
        assert np.array_equal(cell, greyed(pixels, mask))
        return mask

    random = mask_of(mask_noise(0, 0, 0, 64), 0.75, (8, 8))
    assert np.array_equal(mask_shown(plain, Masking()), random)
    assert np.array_equal(mask_shown(block, Masking((0.75,), "random")), random)
    grid = np.ones((8, 8), bool)
    grid[::2, ::2] = False
    assert np.array_equal(mask_shown(plain, Masking(kind="grid")), grid)
    for ratio, run, masking in ((0.5, block, Masking()), (0.75, plain, Masking((0.75,), "block"))):
        mask = mask_shown(run, masking)
        assert mask.mean() == ratio
        borders = (mask[1:] != mask[:-1]).sum() + (mask[:, 1:] != mask[:, :-1]).sum()
        assert borders < 24  # random masks of these ratios have 42 to 56 of 112 borders
    given = np.zeros((1, 8, 8), np.uint8)
    given[0, 2:5, 1:7] = 1
    np.save(tmp_path / "masks.npy", given)
    assert np.array_equal(mask_shown(plain, Masking(file=tmp_path / "masks.npy")), given[0] == 1)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (40, 12), (7, 90), (64, 96), (5, 9)])
def test_whole_images(tmp_path: Path, height: int, width: int) -> None:
    """Images of any size are cropped to whole patches at the center, and not resized."""
    run = saved_run(tmp_path / "run", tiny())
    pixels = noisy(tmp_path / "a.png", height, width)
    h, w = height // 4 * 4, width // 4 * 4
    top, left = (height - h) // 2, (width - w) // 2
    pixels = pixels[top : top + h, left : left + w]
    reconstruct_files(
        run, [tmp_path / "a.png"], tmp_path / "out.png", Masking((0.5,)), options=ReconstructOptions(whole=True)
    )
    array = np.asarray(Image.open(tmp_path / "out.png"))
    assert len(places(array, enlarged(pixels))) == 1
    mask = mask_of(mask_noise(0, 0, 0, h * w // 16), 0.5, (h // 4, w // 4))
    assert len(places(array, enlarged(greyed(pixels, mask)))) == 1


def test_whole_images_of_the_models_size_are_the_crops(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", tiny())
    for i in range(3):
        noisy(tmp_path / "data" / f"{i}.png", seed=i)
    found = [
        reconstruct_files(run, [tmp_path / "data"], tmp_path / "a.png", options=ReconstructOptions(whole=whole))
        for whole in (False, True)
    ]
    assert found[0][0.75] == pytest.approx(found[1][0.75], abs=1e-4)  # batches of three images and of one


def test_whole_images_side_by_side_though_their_sizes_differ(tmp_path: Path) -> None:
    run = saved_run(tmp_path / "run", tiny())
    sizes = [(32, 32), (24, 64), (200, 48), (16, 120), (64, 64)]
    originals = [noisy(tmp_path / "data" / f"{i}.png", *size, seed=i) for i, size in enumerate(sizes)]
    reconstruct_files(run, [tmp_path / "data"], tmp_path / "out.png", options=ReconstructOptions(whole=True))
    array = np.asarray(Image.open(tmp_path / "out.png"))
    assert all(len(places(array, enlarged(pixels))) == 1 for pixels in originals)


@pytest.mark.parametrize(
    ("size", "expected"), [((80, 40), (20, 8)), ((4, 400), (4, 64)), ((1000, 12), (64, 4)), ((64, 64), (16, 16))]
)
def test_very_large_images_are_scaled_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, size, expected
) -> None:
    """They have at most the maximum number of patches and about the same aspect ratio. The page states it."""
    for module in (images_module, reconstruct_module):
        monkeypatch.setattr(module, "MAX_PATCHES", 16)
    noisy(tmp_path / "a.png", *size)
    source, index = images_module.find_images([tmp_path / "a.png"])[0]
    pixels, reduced = whole_image(source, index, (4, 4), PixelFormat())
    assert (tuple(pixels.shape), reduced) == ((*expected, 3), True)
    noisy(tmp_path / "b.png", 16, 16)
    run = saved_run(tmp_path / "run", tiny())
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    reconstruct_files(run, files, tmp_path / "page.html", Masking((0.5,)), options=ReconstructOptions(whole=True))
    assert "; 1 scaled down to 16 patches" in (tmp_path / "page.html").read_text()


def test_scaled_down_images_show_the_whole_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (images_module, reconstruct_module):
        monkeypatch.setattr(module, "MAX_PATCHES", 64)
    halves = np.repeat(np.array([[[250, 0, 0], [0, 0, 250]]], np.uint8), 128, 1).repeat(256, 0)
    Image.fromarray(halves).save(tmp_path / "a.png")
    pixels, _ = whole_image(*images_module.find_images([tmp_path / "a.png"])[0], (4, 4), PixelFormat())
    assert pixels.shape == (32, 32, 3)
    assert (pixels[:, :14] == torch.tensor([250, 0, 0])).all()
    assert (pixels[:, 18:] == torch.tensor([0, 0, 250])).all()


def test_images_that_cannot_be_used_are_named_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, data = saved_run(tmp_path / "run", tiny()), tmp_path / "data"
    for i in range(4):
        noisy(data / f"{i}.png", seed=i)
    (data / "0.png").write_bytes(b"no image")
    (data / "3.png").write_bytes((data / "2.png").read_bytes()[:500])
    wanted = reconstruct_files(run, [data / "1.png", data / "2.png"], tmp_path / "x.png")
    caplog.clear()
    reconstruct_files(run, [data], tmp_path / "out.png", options=ReconstructOptions(show=1))
    assert f"2 of 4 images (2 cannot be used), {run}, step 7" in caplog.text
    warnings = warnings_of(caplog)
    assert [x.startswith("cannot use image") for x in warnings] == [True, True]
    assert "data/0.png' (not an image" in warnings[0]
    array = np.asarray(Image.open(tmp_path / "out.png"))
    assert len(places(array, enlarged(np.asarray(Image.open(data / "1.png"))))) == 1  # replaces the first one
    assert set(wanted) == {0.75}
    with pytest.raises(UserError, match="none of 1 images can be used"):
        reconstruct_files(run, [data / "0.png"], tmp_path / "y.png")
    assert not (tmp_path / "y.png").exists()


def test_only_ten_images_that_cannot_be_used_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run, data = saved_run(tmp_path / "run", tiny()), tmp_path / "data"
    noisy(data / "good.png")
    for i in range(15):
        (data / f"{i}.png").write_bytes(b"")
    reconstruct_files(run, [data], tmp_path / "out.png")
    warnings = warnings_of(caplog)
    assert len(warnings) == 10
    assert warnings[-1].endswith("no more warnings of this kind")
    assert "1 of 16 images" in caplog.text


def test_whole_images_that_cannot_be_masked_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Images of one patch, smaller than a patch, and with an odd grid for a grid mask."""
    run, data = saved_run(tmp_path / "run", tiny()), tmp_path / "data"
    for i, size in enumerate([(7, 7), (3, 40), (20, 20), (32, 32)]):
        noisy(data / f"{i}.png", *size, seed=i)
    reconstruct_files(run, [data], tmp_path / "out.png", Masking(kind="grid"), options=ReconstructOptions(whole=True))
    lines = warnings_of(caplog)
    assert "1 of 4 images" in caplog.text
    assert [f"{i}.png" in line for i, line in enumerate(lines)] == [True] * 3
    assert "images of one patch cannot be masked" in lines[0]
    assert "3 x 40 pixels are smaller than a patch of 4 x 4" in lines[1]
    assert "5 x 5 patches have no grid mask" in lines[2]


def test_wrong_arguments_are_errors(tmp_path: Path) -> None:
    run, data = saved_run(tmp_path / "run", tiny()), photographs(tmp_path / "data")
    with pytest.raises(
        UserError, match=r"give the name of a picture, such as .*x\.png, or of a page, such as .*x\.html"
    ):
        reconstruct_files(run, [data], tmp_path / "x.pdf")
    with pytest.raises(UserError, match="no visible patch"):
        reconstruct_files(run, [data], tmp_path / "x.png", Masking((0.999,)))
    with pytest.raises(UserError, match="does not exist"):
        reconstruct_files(run, [tmp_path / "nowhere"], tmp_path / "x.png")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--mask-ratio", "0.5", "nan"], "hint: give shares above 0 and below 1"),
        (["--mask-ratio", "1"], "hint: give shares"),
        (["--mask-ratio", "-0.5"], "hint: give shares"),
        (["--mask-ratio", "1e-20"], "leaves no removed patch of 64"),
        (["--mask-ratio", "0.8", "--mask-sampling", "grid"], "--mask-sampling grid: 8 x 8 patches"),
        (["--mask-sampling", "stripes"], "stripes"),
        (["--masks", "{tmp}/none.npy"], "none.npy: cannot be read"),
        (["--masks", "{tmp}/m.npy", "--mask-ratio", "0.5"], "leave --mask-ratio and --mask-sampling out"),
        (["--masks", "{tmp}/m.npy", "--mask-sampling", "block"], "leave --mask-ratio and --mask-sampling out"),
        (["--masks", "{tmp}/m.npy", "--whole"], "hint: leave --whole out"),
        (["--output", "{tmp}/data/a.png"], "hint: give another name"),
        (["--output", "{tmp}/data/../data/a.png"], "hint: give another name"),
        (["--output", "{tmp}/folder.png"], "hint: give the name of a file"),
        (["--output", "{tmp}/picture"], "give the name of a picture, such as"),
        (["--output", "{tmp}/data/a.png/x.png"], "data/a.png"),
        (["--show", "0"], "hint: give 1 or more"),
        (["--seed", "-1"], "hint: give 0 to"),
        (["--seed", "9" * 40], "give 0 to 9223372036854775807"),
        (["--ema"], "has no averaged weights"),
    ],
    ids=lambda x: " ".join(x) if isinstance(x, list) else "",
)
def test_bad_flags_are_reported_in_two_lines(tmp_path, monkeypatch, capsys, words, expected) -> None:
    run = saved_run(tmp_path / "run", tiny())
    before = noisy(tmp_path / "data" / "a.png")
    (tmp_path / "folder.png").mkdir()
    np.save(tmp_path / "m.npy", np.eye(8, dtype=bool)[None])
    monkeypatch.chdir(tmp_path)
    words = [word.format(tmp=tmp_path) for word in words]
    done = command(monkeypatch, capsys, "reconstruct", run, "--images", tmp_path / "data", *words)
    assert done.returncode == 2
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 2
    assert np.array_equal(np.asarray(Image.open(tmp_path / "data" / "a.png")), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "folder.png", "m.npy", "run"]


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ({"target": {"kind": "dvae", "vocab_size": 16, "hidden": 8, "groups": 3, "blocks_per_group": 1}}, "tokens"),
        ({"name": "dvae"}, "cannot build the model of"),
    ],
    ids=["tokens", "dvae"],
)
def test_runs_without_pixel_predictions_are_errors(tmp_path, monkeypatch, capsys, model, expected) -> None:
    run = saved_run(tmp_path / "run", tiny(**{k: v for k, v in model.items() if k != "name"}), **model)
    noisy(tmp_path / "a.png")
    done = command(monkeypatch, capsys, "reconstruct", run, "--images", tmp_path / "a.png")
    assert done.returncode == 2
    assert expected in done.stderr
    assert len(done.stderr.splitlines()) == 2


def test_no_images(tmp_path, monkeypatch, capsys) -> None:
    run = saved_run(tmp_path / "run", tiny())
    (tmp_path / "empty").mkdir()
    assert "no images in" in command(monkeypatch, capsys, "reconstruct", run, "--images", tmp_path / "empty").stderr
    done = command(monkeypatch, capsys, "reconstruct", run, "--images")
    assert done.returncode == 2
    assert "no images are given" in done.stderr


def test_flags_affect_the_picture(tmp_path, monkeypatch, capsys) -> None:
    run = saved_run(tmp_path / "run", tiny())
    noisy(tmp_path / "data" / "a.png", 40, 24)
    words = ["--mask-ratio", 0.5, 0.75, "--mask-sampling", "grid", "--whole", "--paste-visible", "--seed", 5]
    output = tmp_path / "page.html"
    done = command(monkeypatch, capsys, "reconstruct", run, "--images", tmp_path / "data", "--output", output, *words)
    assert (done.returncode, done.stderr) == (0, "")
    text = output.read_text()
    for said in (
        "50%, 75% of the patches removed by grid masks, seed 5",
        "visible patches: original",
        "whole images",
    ):
        assert said in text


def test_a_failure_keeps_the_existing_picture(tmp_path, monkeypatch, capsys) -> None:
    run = saved_run(tmp_path / "run", tiny())
    noisy(tmp_path / "data" / "a.png")
    output = tmp_path / "out.webp"
    output.write_bytes(b"of another day")

    def too_long(*_: object) -> Image.Image:
        return Image.new("RGB", (8, 20_000))

    monkeypatch.setattr(reconstruct_module, "sheet", too_long)
    done = command(monkeypatch, capsys, "reconstruct", run, "--images", tmp_path / "data", "--output", output)
    assert done.returncode == 2
    assert "cannot be written" in done.stderr
    assert "use .png, or a lower --show" in done.stderr
    assert output.read_bytes() == b"of another day"
    assert sorted(os.listdir(tmp_path)) == ["data", "out.webp", "run"]
    monkeypatch.undo()
    reconstruct_files(run, [tmp_path / "data"], output)
    with Image.open(output) as made:
        assert made.format == "WEBP"


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_the_page_of_a_run(tmp_path: Path, norm_pix_loss: bool) -> None:
    """The page has the metrics of each image and of all, a note about normalised pixels, and escaped names."""
    run = saved_run(tmp_path / "run", tiny(norm_pix_loss), norm_pix_loss=norm_pix_loss)
    names = ["<b>bold.png", b"\xff&.png".decode(errors="surrogateescape")]
    for i, name in enumerate(names):
        noisy(tmp_path / name, seed=i)
    (tmp_path / "bad.png").write_bytes(b"")
    output = tmp_path / "page.HTML"
    files = [tmp_path / name for name in ("bad.png", *names)]
    found = reconstruct_files(run, files, output, Masking(seed=5))
    text = output.read_bytes().decode()
    assert text.count("<img ") == 6
    assert f"<h2>{tmp_path}/&lt;b&gt;bold.png</h2>" in text
    assert f"<h2>{tmp_path}/\\udcff&amp;.png</h2>" in text
    assert "<b>" not in text
    assert "2 of 3 images (1 cannot be used), 2 of them shown; center crops of 32 x 32 pixels" in text
    assert "75% of the patches removed by random masks, seed 5" in text
    assert "step 7<" in text
    figures = [tuple(map(float, x)) for x in re.findall(r"reconstruction (\S+) dB \(fill (\S+)\)", text)]
    pooled = [10 * math.log10(1 / np.mean([10 ** (-x / 10) for x in each])) for each in zip(*figures, strict=True)]
    assert found[0.75] == pytest.approx(tuple(pooled), abs=0.1)
    assert f"75% {found[0.75][0]:.2f} dB (fill {found[0.75][1]:.2f})" in text
    assert ("shown with the mean and variance of the original patches" in text) == norm_pix_loss
    assert ("which the model does not know and which improves the PSNR" in text) == norm_pix_loss
    assert ("mean colour of the visible ones" in text) == (not norm_pix_loss)
    assert "visible patches: predicted" in text


def test_averaged_weights_are_shown_and_named(tmp_path: Path) -> None:
    model = tiny()
    averages = {name: torch.zeros_like(x) for name, x in model.named_parameters() if x.requires_grad}
    state = {"model": {"name": "mae_vit_tiny_patch4", "depth": 1, "decoder_depth": 1}, "mask_ratio": 0.75}
    saved = checkpoint.snapshot(7, model, adamw(model, 0.1, 0.05), state, averages)
    checkpoint.write(tmp_path / "run" / "checkpoints", saved)
    noisy(tmp_path / "a.png")
    files, page = [tmp_path / "a.png"], tmp_path / "page.html"
    plain = reconstruct_files(tmp_path / "run", files, page)
    assert "averaged weights" not in page.read_text()
    averaged = reconstruct_files(tmp_path / "run", files, page, options=ReconstructOptions(ema=True))
    assert "averaged weights" in page.read_text()
    # Weights of 0 predict 0, ImageNet's mean colour.
    pixels = np.asarray(Image.open(tmp_path / "a.png")) / 255
    removed = np.kron(mask_of(mask_noise(0, 0, 0, 64), 0.75, (8, 8)), np.ones((4, 4), bool))
    assert averaged[0.75][0] == pytest.approx(-10 * math.log10(np.square(pixels - MEAN)[removed].mean()), abs=1e-3)
    assert plain != averaged


NO_RECORD = "does not record whether it was trained with --norm-pix-loss"


@pytest.mark.parametrize("form", ["file of ours", "transformers folder", "legacy file of mmpretrain", "published file"])
def test_weights_of_any_origin_reconstruct_as_their_run(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, form: str
) -> None:
    model = tiny().eval()
    run, data = saved_run(tmp_path / "run", model), photographs(tmp_path / "data") / "val"
    expected = reconstruct_files(run, [data], tmp_path / "run.png")
    path, state = tmp_path / "weights", model.state_dict()
    caplog.clear()
    if form in ("file of ours", "transformers folder"):
        layout = "transformers" if form == "transformers folder" else "ours"
        path = path if layout == "transformers" else path.with_suffix(".safetensors")
        converted = convert(state, "ours", layout).weights
        save_weights(path, layout, converted, ModelMetadata.from_model(model), model)
    else:
        path, layout = path.with_suffix(".pth"), "mmpretrain" if "mmpretrain" in form else "ours"
        content = {f"module.{name}": x for name, x in convert(state, "ours", layout).weights.items()}
        torch.save({"model": content, "path": Path("x")}, path, _use_new_zipfile_serialization=False)
    found = reconstruct_files(str(path), [data], tmp_path / "other.png")
    assert found[0.75] == pytest.approx(expected[0.75], abs=1e-4)
    assert (NO_RECORD in caplog.text) == (path.suffix == ".pth")
    assert f"wrote {tmp_path / 'other.png'}" in caplog.text


def test_weights_without_a_decoder_are_refused(tmp_path: Path) -> None:
    data = photographs(tmp_path / "data") / "val"
    state = build("mae_vit_tiny_patch4").state_dict()
    encoder = {name: x for name, x in state.items() if not name.startswith(("decoder", "mask_token"))}
    torch.save({"model": encoder}, tmp_path / "encoder.pth")
    for model in None, "mae_vit_tiny_patch4":
        options = ReconstructOptions(model=model)
        with pytest.raises(UserError, match=r"encoder\.pth has no decoder and cannot reconstruct"):
            reconstruct_files(tmp_path / "encoder.pth", [data], tmp_path / "x.png", options=options)
    options = ReconstructOptions(model="vit_tiny_patch4")
    with pytest.raises(UserError, match="--model vit_tiny_patch4 is a classifier, which cannot reconstruct"):
        reconstruct_files(tmp_path / "encoder.pth", [data], tmp_path / "x.png", options=options)


@pytest.mark.parametrize("whole", [False, True])
def test_images_are_rotated_as_in_the_run(tmp_path: Path, whole: bool) -> None:
    """An image with an EXIF orientation, and the same image stored upright."""
    pixels = np.random.default_rng(0).integers(0, 255, (40, 48, 3), dtype=np.uint8)
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.fromarray(pixels).save(tmp_path / "turned.webp", lossless=True, exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.webp", lossless=True)
    run, options = saved_run(tmp_path / "run", tiny()), ReconstructOptions(whole=whole)
    for exif_of_run in (True, False):
        (run / "config.json").write_text(json.dumps({"exif": exif_of_run}))
        one, other = (
            reconstruct_files(run, [tmp_path / f"{name}.webp"], tmp_path / "x.html", options=options)
            for name in ("turned", "upright")
        )
        assert (one == other) == exif_of_run


def test_errors_of_16_bits_are_in_their_own_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors are per channel, without missing pixels. The peak is the range of the values."""
    stats = {"in_chans": 2, "pixel_mean": (2000, 500), "pixel_std": (100, 50), "pixel_dtype": "uint16", "nodata": 0}
    model = tiny(**stats)
    pixels = torch.randint(1, 4000, (3, 32, 32, 2), generator=torch.Generator().manual_seed(0)).to(torch.uint16)
    pixels[0, :6] = 0
    pred, mask = torch.randn(3, 64, 32), (torch.rand(3, 64) < 0.5).float()
    monkeypatch.setattr(model, "forward", lambda *_: (None, pred, mask))
    parts = reconstruct(model, pixels, torch.rand(3, 64))
    for n, c in itertools.product(range(3), range(2)):
        truth, removed = patches(pixels[n, :, :, c : c + 1].numpy())[..., 0].astype(float), mask[n].bool().numpy()
        found = pred[n].reshape(64, 4, 4, 2)[..., c].numpy() * (100, 50)[c] + (2000, 500)[c]
        known = truth > 0
        errors = (found - truth)[removed][known[removed]]
        assert parts.squared_error[n, c] == pytest.approx(np.square(errors).mean(), rel=1e-4)
        fill = truth[~removed][known[~removed]].mean()
        assert parts.fill_error[n, c] == pytest.approx(
            np.square(fill - truth)[removed][known[removed]].mean(), rel=1e-4
        )
        assert (parts.lowest[n, c], parts.highest[n, c]) == pytest.approx((truth[known].min(), truth.max()), rel=1e-4)


def test_psnr_of_many_bands_is_given_for_each(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    stats = {"in_chans": 5, "pixel_mean": (1000,) * 5, "pixel_std": (300,) * 5, "pixel_dtype": "uint16"}
    tiny(**stats).save_pretrained(tmp_path / "model")
    (tmp_path / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 2000, (3, 32, 32, 5)).astype(np.uint16)
    pixels[:, :, :, 4] //= 100
    for i, image in enumerate(pixels):
        np.save(tmp_path / "images" / f"{i}.npy", image)
    output, options = tmp_path / "x.html", ReconstructOptions(show_bands=(5,))
    ((ours, _),) = reconstruct_files(tmp_path / "model", [tmp_path / "images"], output, options=options).values()
    line = re.search(r"PSNR in dB by band: 1: (\S+), 2: (\S+), 3: (\S+), 4: (\S+), 5: (\S+)", caplog.text)
    bands = [float(x) for x in line.groups()]
    assert bands[4] < min(bands[:4]) - 20  # large errors on its small values
    assert ours == pytest.approx(-10 * math.log10(np.mean([10 ** (-x / 10) for x in bands])), abs=0.1)
    page = output.read_text()
    assert line[0].removeprefix("PSNR in dB by band: ") in page
    assert "the range of the values of these images: 199" in page
