"""A self-contained HTML page of reconstructions, without scripts."""

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape

from PIL import Image
from torch import Tensor

from ..models.reconstruction import SMALLEST, Reconstruction, psnr, tile

# The security policy prevents browsers from fetching anything, whatever the page contains.
_HEAD = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 1rem/1.4 system-ui, sans-serif; margin: 1rem; overflow-wrap: anywhere }}
h1 {{ font-size: 1.3rem }}
h2 {{ font-size: 1rem; margin: 0 0 .4rem }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; max-width: 60rem; margin-bottom: 2rem }}
dt {{ font-weight: 600 }}
dd {{ margin: 0 }}
@media (max-width: 40rem) {{ dl {{ display: block }} dt {{ margin-top: .4rem }} }}
main {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 24rem), 1fr)); gap: 1.5rem 2rem }}
.tiles {{ display: grid; grid-template-columns: repeat(3, 1fr); gap: .5rem }}
figure {{ margin: 0 }}
figcaption {{ font-size: .8rem }}
img {{ display: block; width: 100%; height: auto }}
.small {{ image-rendering: pixelated }}
</style>
</head>
<body>
"""


def page(
    title: str,
    facts: Mapping[str, str],
    images: Sequence[tuple[str, Sequence[Reconstruction]]],
    labels: Sequence[str],
    peak: Tensor,
) -> str:
    """The HTML of the page.

    Args:
        facts: name -> text about all images.
        images: the name of each image and its reconstructions (N = 1), one per label.
        peak: peak of the PSNR, see ``psnr``.
        labels: labels of the reconstructions, such as "75%". Each has a row with the masked image and the
            reconstruction. The original is shown once per image.
    """
    parts = [_HEAD.format(title=escape(title)), f"<h1>{escape(title)}</h1>\n<dl>\n"]
    parts += [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in facts.items()]
    parts.append("</dl>\n<main>\n")
    for name, made in images:
        parts.append(f'<article>\n<h2>{escape(name)}</h2>\n<div class="tiles">\n')
        for i, (label, part) in enumerate(zip(labels, made, strict=True)):
            ours, fill = psnr(part.squared_error, peak), psnr(part.fill_error, peak)
            figures = f"reconstruction {ours:.1f} dB (fill {fill:.1f})"
            removed, patches = int(part.mask.sum()), part.mask.numel()
            hidden = f"{name}: {removed} of {patches} patches are masked in grey"
            parts.append(_figure(tile(part.masked[0]), hidden, f"{label} masked"))
            parts.append(_figure(tile(part.predicted[0]), f"{name}: reconstruction", figures))
            if i == 0:
                parts.append(_figure(tile(part.original[0]), f"{name}: original", "original", len(labels)))
        parts.append("</div>\n</article>\n")
    return "".join([*parts, "</main>\n</body>\n</html>\n"])


def _figure(image: Image.Image, alt: str, caption: str, rows: int = 1) -> str:
    data = io.BytesIO()
    image.save(data, "png")
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    style = f' style="grid-column: 3; grid-row: 1 / span {rows}"' if rows > 1 else ""
    small = ' class="small"' if max(image.size) < 2 * SMALLEST else ""
    return (
        f'<figure{style}><img{small} src="{source}" alt="{escape(alt)}" width="{image.width}" height="{image.height}">'
        f"<figcaption>{escape(caption)}</figcaption></figure>\n"
    )
