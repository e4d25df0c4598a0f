"""Images with a text each: captions, prompts of an image generator."""

from __future__ import annotations

from typing import Any

import torch

from overhaul.data.encode import pixels
from overhaul.data.examples import Encoded, Examples
from overhaul.data.forms import CHARACTERS_PER_TOKEN, Options, Row, Rows, form
from overhaul.data.forms.image import IMAGE_POSITIONS
from overhaul.errors import RequestError


def both(options: Options, row: Row) -> list[int]:
    """The text beside the image's patches."""
    return [IMAGE_POSITIONS + len(str(row[options.column("text")])) // CHARACTERS_PER_TOKEN + 1]


@form(columns=("image", "text"), kind="image_text", positions=both, needs="processor", told=10)
def image_text(rows: Rows, options: Options, processor: Any) -> Examples:
    """Pixel values [c, h, w] and the text's tokens, with what the tokenizer puts around them; no labels."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not hasattr(tokenizer, "encode"):
        raise RequestError("`as: image_text` needs the model's tokenizer; the model folder has none.")
    image, text = options.column("image"), options.column("text")
    most = getattr(tokenizer, "model_max_length", None)
    said = tokenizer([str(row[text]) for row in rows], truncation=bool(most and most < 1e6))["input_ids"]
    items: list[Encoded] = [
        {"pixel_values": pixels(row[image], processor), "input_ids": torch.tensor(ids)}
        for row, ids in zip(rows, said, strict=True)
    ]
    return Examples(items, [{k: v for k, v in row.items() if k != image} for row in rows], processor)
