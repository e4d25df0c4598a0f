"""Pictures as a model reads them, from files and from bytes, whatever Pillow opens.

1. They are turned as their EXIF data says.
2. What is 16 bits a channel is scaled to 8: 65535 becomes 255. 32-bit numbers have no scale that is known and are refused.
3. What is transparent shows white, as a page would. Palettes, CMYK and all other colours become RGB, black and white grey.
4. Of a moving picture, or a file of several, the first is read, and that is said.
5. What Pillow hands to other programs (EPS, WMF) is not read.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from overhaul.errors import RequestError


class Broken(RequestError):
    """A picture that cannot be read, which the material may leave out."""


@cache
def _kinds() -> tuple[tuple[str, ...], frozenset[str]]:
    """The formats that are read, and how names of such files end."""
    from PIL import Image

    Image.init()
    formats = tuple(name for name in Image.OPEN if name not in ("EPS", "WMF"))
    return formats, frozenset(end for end, name in Image.registered_extensions().items() if name in formats)


def is_picture(path: Path) -> bool:
    """Whether a file is one by its name."""
    return path.suffix.lower() in _kinds()[1]


def opened(value: Any, place: str) -> tuple[Any, bool]:
    """A picture from a path, a mapping of `bytes` and `path` as the hub has it, or an open one; and whether it has more.

    An array, or a list of numbers, is taken as it is.

    Raises:
        RequestError: it is no picture.
        Broken: it cannot be read; the file is named.
    """
    from PIL import Image

    if isinstance(value, Mapping):
        value = io.BytesIO(value["bytes"]) if value.get("bytes") else Path(str(value.get("path")))
    if value is None or isinstance(value, str):
        raise RequestError(
            f"{place}: {value!r} is no picture. A list of files is a metadata.csv or metadata.jsonl in their folder, with a "
            "column `file_name`."
        )
    if not isinstance(value, Path | io.BytesIO | Image.Image):
        return value, False
    if isinstance(value, Path):
        place = str(value)
        if not value.is_file():
            raise Broken(f"{place} is no file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is only odd about a file that can be read
            if isinstance(value, Image.Image):
                return _plain(value), False
            with Image.open(value, formats=_kinds()[0]) as image:
                image.load()
                return _plain(image), getattr(image, "n_frames", 1) > 1 and image.format != "MPO"
    except Exception as error:  # a decoder may raise anything on a damaged file
        why = (str(error) or type(error).__name__).rstrip(".")
        raise Broken(
            f"{place} is no picture that can be read: {why}. Replace it, take it out, or write `skip_broken: true`."
        ) from None


def _plain(image: Any) -> Any:
    """As "RGB" or "L", upright."""
    from PIL import Image, ImageOps

    known = image.format
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16") or (image.mode == "I" and known in ("PNG", "PPM")):
        levels = np.asarray(image).astype(np.int64)
        return Image.fromarray(((levels * 255 + 32767) // 65535).clip(0, 255).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError("it holds 32-bit numbers, whose scale is not known; save it with 8 or 16 bits a channel")
    if image.mode in ("1", "L") and "transparency" not in image.info:
        return image.convert("L")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        clear = image.convert("RGBA")
        white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, clear).convert("RGB")
    return image.convert("RGB")
