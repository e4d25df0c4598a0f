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


class Picture:
    """A picture in a file, or in a file's bytes, that was looked at once and is read again when it is asked for.

    A folder of photographs takes hundreds of times its size when all are held as pixels.
    """

    def __init__(self, source: Path | bytes, place: str) -> None:
        self._source, self._place = source, place

    @property
    def image(self) -> Any:
        """As Pillow has it: "RGB" or "L", upright."""
        return _read(self._source, self._place)[0]

    def convert(self, mode: str) -> Any:
        """In another mode, as Pillow does it."""
        return self.image.convert(mode)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.image, dtype=dtype)


def opened(value: Any, place: str) -> tuple[Any, bool]:
    """A picture from a path, a mapping of `bytes` and `path` as the hub has it, or an open one; and whether it has more.

    An array, or a list of numbers, is taken as it is.

    Raises:
        RequestError: it is no picture.
        Broken: it cannot be read; the file is named.
    """
    from PIL import Image

    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") else Path(str(value.get("path")))
    if value is None or isinstance(value, str):
        raise RequestError(
            f"{place}: {value!r} is no picture. A list of files is a metadata.csv or metadata.jsonl in their folder, with a "
            "column `file_name`."
        )
    if isinstance(value, Image.Image):
        return _read(value, place)
    if not isinstance(value, Path | bytes):
        return value, False
    place = str(value) if isinstance(value, Path) else place
    return Picture(value, place), _read(value, place)[1]


def _read(source: Any, place: str) -> tuple[Any, bool]:
    """A picture, and whether its file has more frames."""
    from PIL import Image

    if isinstance(source, Path) and not source.is_file():
        raise Broken(f"{place} is no file.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is only odd about a file that can be read
            if isinstance(source, Image.Image):
                return _plain(source), False
            file = io.BytesIO(source) if isinstance(source, bytes) else source
            with Image.open(file, formats=_kinds()[0]) as image:
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
