"""A picture of boxes and labels, written as SVG or PNG by the suffix of the file."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from xml.sax.saxutils import escape

Anchor = Literal["start", "middle", "end"]

BACKGROUND, INK = "#ffffff", "#1f2328"
FONT_PX = 12


@dataclass(frozen=True)
class Box:
    """A filled rectangle in pixels from the top left. ``tip``: shown under the mouse in an SVG."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    tip: str = ""


@dataclass(frozen=True)
class Label:
    """A line of text. ``x``: its start, middle or end by ``anchor``. ``y``: its vertical centre."""

    x: float
    y: float
    text: str
    anchor: Anchor = "start"
    colour: str = INK
    bold: bool = False


@dataclass(frozen=True)
class Picture:
    """Boxes, and labels drawn over them."""

    width: int
    height: int
    title: str
    boxes: tuple[Box, ...]
    labels: tuple[Label, ...]


class PictureError(ValueError):
    """The picture cannot be written; the text says why."""


def save(picture: Picture, path: Path) -> None:
    """Write ``path``, a .png or .svg. Raises PictureError as ``check`` does, and OSError if it cannot be written."""
    check(path)
    if path.suffix.lower() == ".svg":
        path.write_text(to_svg(picture), encoding="utf-8")
    else:
        _save_png(picture, path)


def check(path: Path) -> None:
    """Raise PictureError if ``save`` cannot write such a file: another suffix, or .png without pillow."""
    suffix = path.suffix.lower()
    if suffix not in (".svg", ".png"):
        raise PictureError(f"{path}: pictures are .png or .svg, not {suffix or 'without a suffix'}")
    if suffix == ".png" and find_spec("PIL") is None:
        raise PictureError(f"{path}: PNG needs the package pillow; install it, or name an .svg file")


def to_svg(picture: Picture) -> str:
    """Return a self-contained SVG document."""
    size = f'width="{picture.width}" height="{picture.height}" viewBox="0 0 {picture.width} {picture.height}"'
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">',
        f"<title>{escape(picture.title)}</title>",
        f"<style>text {{ font: {FONT_PX}px system-ui, sans-serif; dominant-baseline: central }}</style>",
        f'<rect width="100%" height="100%" fill="{BACKGROUND}"/>',
    ]
    for box in picture.boxes:
        place = f'x="{box.x:.2f}" y="{box.y:.2f}" width="{box.width:.2f}" height="{box.height:.2f}"'
        tip = f"<title>{escape(box.tip)}</title>" if box.tip else ""
        lines.append(f'<rect {place} fill="{box.colour}">{tip}</rect>')
    for label in picture.labels:
        weight = ' font-weight="600"' if label.bold else ""
        place = f'x="{label.x:.1f}" y="{label.y:.1f}" text-anchor="{label.anchor}"'
        lines.append(f'<text {place} fill="{label.colour}"{weight}>{escape(label.text)}</text>')
    return "\n".join([*lines, "</svg>\n"])


def _save_png(picture: Picture, path: Path) -> None:
    from PIL import Image, ImageDraw, ImageFont

    scale = 2  # sharp on dense screens
    image = Image.new("RGB", (picture.width * scale, picture.height * scale), BACKGROUND)
    draw = ImageDraw.Draw(image)
    for box in picture.boxes:
        right, bottom = (box.x + box.width) * scale, (box.y + box.height) * scale
        # Pillow includes the last pixel.
        draw.rectangle(
            (box.x * scale, box.y * scale, max(right - 1, box.x * scale), max(bottom - 1, box.y * scale)),
            fill=box.colour,
        )
    font = ImageFont.load_default(FONT_PX * scale)
    anchors = {"start": "lm", "middle": "mm", "end": "rm"}
    for label in picture.labels:
        place = (label.x * scale, label.y * scale)
        stroke = 0.5 if label.bold else 0
        draw.text(place, label.text, label.colour, font, anchors[label.anchor], stroke_width=stroke)
    image.save(path)
