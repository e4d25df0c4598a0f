"""Images without a class, or with one that is kept but not learnt: for groups, pairs and generators."""

from __future__ import annotations

from typing import Any

from overhaul.data.encode import encode_images
from overhaul.data.examples import Examples
from overhaul.data.forms import Options, Rows, form
from overhaul.data.forms.image import patches


@form(columns=("image",), kind="images", positions=patches, needs="image processor", told=70)
def images(rows: Rows, options: Options, processor: Any) -> Examples:
    """Pixel values [c, h, w] and nothing else; all other columns, a label or a group, stay in the rows."""
    return encode_images(rows, processor, options.column("image"), None)
