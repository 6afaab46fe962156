"""The page of reconstructions: its elements, and no external resources."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from mae_fast.evaluation.page import page
from mae_fast.models.reconstruction import Reconstruction

VOID = {"meta", "img"}


class Parsed(HTMLParser):
    """The elements in order, with the text after their start tags. Asserts that elements are closed correctly."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        assert len(dict(attrs)) == len(attrs), "an attribute twice"
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if data.strip():
            self.elements[-1][2].append(data.strip())

    def texts(self, tag):
        return [" ".join(text) for name, _, text in self.elements if name == tag]

    def attributes(self, tag):
        return [attributes for name, attributes, _ in self.elements if name == tag]


def made(seed: int, note: str = "", side: int = 32, channels: int = 3) -> Reconstruction:
    """A reconstruction of random pixels with 48 of 64 patches removed, and errors with simple PSNRs."""
    torch.manual_seed(seed)
    original, masked, predicted = torch.rand(3, 1, channels, side, side)
    mask = (torch.arange(64)[None] < 48).float()
    ours, fill, low, high = (torch.full((1, channels), x) for x in (10**-2.5, 10**-1.75, 0.0, 1.0))
    return Reconstruction(original, masked, predicted, mask, ours, fill, low, high, note)


def pixels(attributes: dict[str, str]) -> np.ndarray:
    """The pixels of an image of the page."""
    kind, _, data = attributes["src"].partition(",")
    assert kind == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
        assert (image.format, image.mode) == ("PNG", "RGB")
        assert (str(image.width), str(image.height)) == (attributes["width"], attributes["height"])
        return np.asarray(image)


def assert_needs_nothing_else(parsed: Parsed, text: str) -> None:
    """Assert that the page has no scripts, links or addresses, and loads no style sheets, fonts or images."""
    tags = {tag for tag, *_ in parsed.elements}
    assert not tags & {"script", "link", "iframe", "object", "embed", "base", "form", "a", "video", "source"}
    for _, attributes, _ in parsed.elements:
        assert not {"href", "srcset", "data", "action", "background"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    [style] = parsed.texts("style")
    assert "url(" not in style
    assert "@import" not in style
    assert not re.search(r"(?:https?:)?//", re.sub(r'src="data:[^"]*"', "", text))
    policies = [m["content"] for m in parsed.attributes("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


@pytest.mark.parametrize("labels", [["75%"], ["75%", "85%", "95%"]], ids=len)
def test_the_page_has_all_images_metrics_and_texts(labels: list[str]) -> None:
    names = ["one.png", "two.png"]
    images = [(name, [made(10 * i + k) for k in range(len(labels))]) for i, name in enumerate(names)]
    text = page("A title", {"run": "a run", "masks": "random"}, images, labels, torch.ones(1))
    parsed = Parsed(text)
    assert_needs_nothing_else(parsed, text)
    assert text.startswith("<!DOCTYPE html>")
    assert parsed.attributes("html") == [{"lang": "en"}]
    assert {"charset": "utf-8"} in parsed.attributes("meta")
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in parsed.attributes("meta")
    assert parsed.texts("title") == parsed.texts("h1") == ["A title"]
    assert dict(zip(parsed.texts("dt"), parsed.texts("dd"), strict=True)) == {"run": "a run", "masks": "random"}
    assert parsed.texts("h2") == names

    expected, alts, captions = [], [], []
    for name, parts in images:
        for k, part in enumerate(parts):
            shown = [part.masked, part.predicted, *([parts[0].original] if k == 0 else [])]
            expected += [np.round(x[0].permute(1, 2, 0).numpy() * 255) for x in shown]
            hidden = f"{name}: 48 of 64 patches are masked in grey"
            alts += [hidden, f"{name}: reconstruction", *([f"{name}: original"] if k == 0 else [])]
            captions += [f"{labels[k]} masked", "reconstruction 25.0 dB (fill 17.5)", *(["original"] if k == 0 else [])]
    found = parsed.attributes("img")
    assert len(found) == len(expected) == 2 * (2 * len(labels) + 1)
    for attributes, array in zip(found, expected, strict=True):
        shown = pixels(attributes)
        scale = len(shown) // 32
        assert np.array_equal(shown, np.kron(array, np.ones((scale, scale, 1))))
    assert [attributes["alt"] for attributes in found] == alts
    assert parsed.texts("figcaption") == captions
    # The original spans all rows of the third column.
    styles = [attributes.get("style") for attributes in parsed.attributes("figure")]
    spans = [f"grid-column: 3; grid-row: 1 / span {len(labels)}"] if len(labels) > 1 else []
    assert [style for style in styles if style] == spans * 2


def test_names_are_escaped() -> None:
    nasty = """<script>alert(1)</script>" onerror='x' & &amp; ]]>.png"""
    text = page(nasty, {nasty: nasty}, [(nasty, [made(0)])], [nasty], torch.ones(1))
    parsed = Parsed(text)
    assert_needs_nothing_else(parsed, text)
    for tag in ("title", "h1", "h2", "dt", "dd"):
        assert parsed.texts(tag) == [nasty]
    assert [attributes["alt"].startswith(f"{nasty}: ") for attributes in parsed.attributes("img")] == [True] * 3
    assert parsed.texts("figcaption")[0] == f"{nasty} masked"


def test_only_enlarged_images_are_pixelated() -> None:
    """Browsers should not scale photographs down by dropping pixels."""
    sides = [32, 224]
    found = Parsed(page("", {}, [("x", [made(0, side=side)]) for side in sides], ["75%"], torch.ones(1))).attributes(
        "img"
    )
    assert [attributes.get("class") for attributes in found] == ["small"] * 3 + [None] * 3


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_channels(channels: int) -> None:
    found = Parsed(page("", {}, [("x", [made(0, channels=channels)])], ["75%"], torch.ones(1))).attributes("img")
    assert [pixels(attributes).shape[2] for attributes in found] == [3] * 3
