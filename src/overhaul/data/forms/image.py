"""Images with a class."""

from __future__ import annotations

from typing import Any

from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples
from overhaul.data.forms import Options, Row, Rows, form

IMAGE_POSITIONS = 64
"""Patches of an image, before its model is known."""


def patches(options: Options, row: Row) -> list[int]:
    """As many for each image."""
    return [IMAGE_POSITIONS]


@form(columns=("image", "label"), kind="images", positions=patches, needs="image processor", told=50)
def image(rows: Rows, options: Options, processor: Any) -> Examples:
    """Pixel values [c, h, w] and the number of the class, or the list of those that count as right."""
    return encode_images(rows, processor, options.column("image"), options.column("label"))
