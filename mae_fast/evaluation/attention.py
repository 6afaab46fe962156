"""Draw the attention maps of an encoder over images: the heads of its last block, and attention rollout.

Shapes: N images, C channels, H x W pixels, h x w grid of patches.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

from ..data.loader import centred_image
from ..errors import UserError
from ..models.reconstruction import tile
from ..models.rollout import AttentionMaps, attention_maps
from ..weights.create import LoadedModel
from .images import PICTURES, UnusableImages, check_output, find_images, preprocessing_of, whole_image, write_file

logger = logging.getLogger(__name__)

COLUMNS = 8
OPACITY = 0.65  # of a map over its image
# The colours of a map, from its lowest to its highest value.
COLOURS = np.array([[0, 0, 4], [87, 16, 110], [188, 55, 84], [249, 142, 9], [252, 255, 164]])
CAPTION = (
    "rollout: attention through all blocks; heads: attention of the class token in the last block. "
    "Each map is scaled from its lowest value (dark) to its highest (bright)."
)


@dataclass(frozen=True)
class AttentionOptions:
    """Options of the picture.

    Attributes:
        whole: use images in their own size and aspect ratio, instead of center crops of the model's size.
        show: the number of images to show, evenly spaced.
    """

    whole: bool = False
    show: int = 12

    def __post_init__(self) -> None:
        if self.show < 1:
            raise UserError(f"--show {self.show} is out of range", "give 1 or more")


def draw_attention(
    loaded: LoadedModel, images: Sequence[Path], output: Path, options: AttentionOptions = AttentionOptions()
) -> list[tuple[str, AttentionMaps]]:
    """Write a picture of the attention maps of image files. Unusable images are skipped with a warning.

    Returns:
        The name and the maps (N = 1) of each image in the picture.

    Raises:
        UserError: if an option is invalid, no image can be used, or the model has no attention maps.
    """
    files = find_images(images)
    check_output(output, files, PICTURES)
    model, wanted = loaded.model, preprocessing_of(loaded).pixels
    unusable = UnusableImages()
    found: list[tuple[str, AttentionMaps]] = []
    rows = []
    for i in np.linspace(0, len(files) - 1, min(options.show, len(files))).round().astype(int).tolist():
        source, index = files[i]
        try:
            if options.whole:
                pixels, _ = whole_image(source, index, model.patch_embed.patch_size, wanted)
            else:
                pixels = centred_image(source, index, model.patch_embed.img_size, wanted)
        except UserError as error:
            unusable.add(error)
            continue
        try:
            maps = attention_maps(model, pixels[None])
        except ValueError as error:
            raise UserError(f"this model has no attention maps: {error}") from error
        found.append((str(source.root / source.names[index]), maps))
        rows.append(_tiles(pixels, maps))
    if not found:
        raise UserError("no image can be used: see the warnings above")
    if len(files) > options.show:
        logger.info(f"{len(found)} of {len(files)} images are shown; use --show {len(files)} to show all")
    picture = _sheet(rows)
    kind = Image.registered_extensions()[output.suffix.lower()]
    write_file(output, lambda file: picture.save(file, kind))
    logger.info(f"wrote {output}")
    return found


def _tiles(pixels: Tensor, maps: AttentionMaps) -> list[tuple[str, Image.Image]]:
    """The tiles of an image [H, W, C]: the image and its maps, each with its name."""
    image = tile(pixels.permute(2, 0, 1).float() / 255)
    heads = maps.heads[0]
    named = [("rollout", maps.rollout[0]), ("mean of heads", heads.mean(0))]
    named += [(f"head {i}", head) for i, head in enumerate(heads)]
    return [("image", image), *((name, _overlay(image, values)) for name, values in named)]


def _overlay(image: Image.Image, values: Tensor) -> Image.Image:
    """A map [h, w], interpolated and coloured, over a grey image."""
    size = (image.height, image.width)
    smooth = F.interpolate(values[None, None].float(), size, mode="bilinear")[0, 0].cpu().numpy()
    low, high = smooth.min(), smooth.max()
    share = (smooth - low) / max(high - low, 1e-5 * high)  # the minimum avoids that rounding errors show in a flat map
    places = np.linspace(0, 1, len(COLOURS))
    colours = np.stack([np.interp(share, places, channel) for channel in COLOURS.T], -1)
    over = Image.fromarray(colours.round().astype(np.uint8))
    return Image.blend(image.convert("L").convert("RGB"), over, OPACITY)


def _sheet(rows: Sequence[Sequence[tuple[str, Image.Image]]]) -> Image.Image:
    """A picture of the tiles of each image in rows of ``COLUMNS``, with their names above and a caption on top."""
    gap, line, font = 4, 18, ImageFont.load_default(14)
    lines = [row[i : i + COLUMNS] for row in rows for i in range(0, len(row), COLUMNS)]
    width = max(x.width for tiles in lines for _, x in tiles) + gap
    heights = [line + max(x.height for _, x in tiles) + gap for tiles in lines]
    across = max(len(tiles) for tiles in lines) * width + 2 * gap
    caption = _wrapped(CAPTION, font, max(across, 4 * width) - 2 * gap)
    top = line * len(caption) + 2 * gap
    canvas = Image.new("RGB", (max(across, 4 * width), top + sum(heights)), "white")
    draw = ImageDraw.Draw(canvas)
    draw.multiline_text((gap, gap), "\n".join(caption), fill="black", font=font)
    for tiles, height in zip(lines, heights, strict=True):
        for column, (name, x) in enumerate(tiles):
            draw.text((gap + column * width, top), name, fill="black", font=font)
            canvas.paste(x, (gap + column * width, top + line))
        top += height
    return canvas


def _wrapped(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Wrap ``text`` to lines of at most ``width`` pixels."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > width and lines[-1]:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines
