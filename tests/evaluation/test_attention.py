"""Pictures of attention: the maps equal those of the model and are drawn at the right places."""

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support import command

import mae_fast
from mae_fast.data.loader import centred_image
from mae_fast.data.sources import Files
from mae_fast.errors import UserError
from mae_fast.evaluation import attention as attention_module
from mae_fast.models import attention_maps
from mae_fast.models.mae import build
from mae_fast.models.rollout import AttentionMaps
from mae_fast.models.vit import build as build_vit


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Weights of an autoencoder and of a classifier, and three images."""
    place = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    save_file(build("mae_vit_tiny_patch4", depth=2, decoder_depth=1).state_dict(), place / "mae.safetensors")
    save_file(build_vit("vit_tiny_patch4", depth=2, global_pool=True).state_dict(), place / "vit.safetensors")
    rng = np.random.default_rng(0)
    for i, size in enumerate([(40, 48), (64, 36), (32, 32)]):
        (place / "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(place / "images" / f"{i}.png")
    return place


@pytest.mark.parametrize("weights", ["mae", "vit"])
def test_maps_equal_those_of_the_model(place, tmp_path, weights):
    build_it = build if weights == "mae" else build_vit
    options = {"decoder_depth": 1} if weights == "mae" else {"global_pool": True}
    name = "mae_vit_tiny_patch4" if weights == "mae" else "vit_tiny_patch4"
    model = build_it(name, depth=2, **options).eval()
    model.load_state_dict(load_file(place / f"{weights}.safetensors"))
    path = place / "images" / "1.png"
    found = mae_fast.attention(path, weights=place / f"{weights}.safetensors", output=tmp_path / "x.png")
    ((told, maps),) = found
    assert told == str(path)
    pixels = centred_image(Files(path.parent, [path.name]), 0, (32, 32))
    expected = attention_maps(model, pixels[None])
    assert maps.heads.shape == (1, 4, 8, 8)
    for got, wanted in zip(maps, expected, strict=True):
        torch.testing.assert_close(got, wanted)
    with Image.open(tmp_path / "x.png") as picture:
        assert picture.width > 7 * 112  # image, rollout, mean, four heads


def test_an_overlay_is_brightest_at_the_maximum_of_its_map():
    values = torch.zeros(4, 8)
    values[3, 6] = 1
    overlay = np.asarray(attention_module._overlay(Image.new("RGB", (80, 40), (90, 90, 90)), values)).sum(2)
    row, column = np.unravel_index(overlay.argmax(), overlay.shape)
    assert (row // 10, column // 10) == (3, 6)
    assert overlay[:20].max() == overlay.min()  # dark where the map is lowest
    flat = attention_module._overlay(Image.new("RGB", (80, 40)), torch.full((4, 8), 0.3))
    assert np.ptp(np.asarray(flat).astype(int), axis=(0, 1)).max() <= 10  # rounding errors are not visible


def test_the_command_takes_images_and_folders(place, tmp_path, monkeypatch, capsys):
    (tmp_path / "bad.png").write_bytes(b"no image")
    images = [tmp_path / "bad.png", place / "images" / "0.png", place / "images"]
    line = ["attention", *images, "--weights", place / "mae.safetensors", "--output", tmp_path / "new" / "x.jpg"]
    done = command(monkeypatch, capsys, *line, "--whole")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("\n") == 1
    assert "bad.png" in done.stderr
    assert f"wrote {tmp_path / 'new' / 'x.jpg'}" in done.stdout
    few = command(monkeypatch, capsys, *line, "--show", 2)
    assert "of 5 images are shown; use --show 5" in few.stdout


def test_whole_images_have_maps_of_their_own_shape(place, tmp_path):
    found = mae_fast.attention(
        place / "images", weights=place / "mae.safetensors", output=tmp_path / "x.png", whole=True
    )
    assert [tuple(maps.rollout.shape) for _, maps in found] == [(1, 10, 12), (1, 16, 9), (1, 8, 8)]


def test_misuse_is_refused(place, tmp_path):
    weights = place / "mae.safetensors"
    (tmp_path / "bad.png").write_bytes(b"no image")
    for images, flags, message in (
        ([tmp_path / "bad.png"], {}, "no image can be used"),
        ([], {}, "give image files or folders"),
        ([place / "images" / "0.png"], {"show": 0}, "--show 0"),
        ([place / "images" / "0.png"], {"output": tmp_path / "x.html"}, "give the name of a picture"),
        ([place / "images" / "0.png"], {"output": place / "images" / "0.png"}, "is one of the images"),
    ):
        with pytest.raises(UserError, match=message):
            mae_fast.attention(images, **{"weights": weights, "output": tmp_path / "x.png", **flags})
    assert [path.name for path in tmp_path.iterdir()] == ["bad.png"]


def test_pictures_of_many_heads_are_wrapped():
    maps = AttentionMaps(torch.rand(1, 12, 4, 4), torch.rand(1, 4, 4))
    tiles = attention_module._tiles(torch.zeros(32, 32, 3, dtype=torch.uint8), maps)
    assert [name for name, _ in tiles][:4] == ["image", "rollout", "mean of heads", "head 0"]
    sheet = attention_module._sheet([tiles])
    assert sheet.width < 9 * 150
    assert sheet.height > 2 * 128
