"""Text of others (rows, names, what a model says) as a terminal, a page or Markdown bears it: it steers nothing there."""

from __future__ import annotations

import re

_STEERING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
"""Control characters but for tab and newline (escape sequences begin with one), and what turns the direction of writing."""
_HALF = re.compile(r"[\ud800-\udfff]")
_MARKS = re.compile(r"[\\`*\[\]|~#$]|(?<!\w)_|_(?!\w)")
_TAG, _ENTITY = re.compile(r"<(?=[A-Za-z/!?])"), re.compile(r"&(?=\\?#?\w+;)")


def shown(text: str) -> str:
    """Text without what would steer a terminal and has no shape; half a character, which no file holds, as U+FFFD."""
    return _HALF.sub("\ufffd", _STEERING.sub("", re.sub("\r\n?", "\n", text)))


def _in_a_line(text: object) -> str:
    return " ".join(shown(str(text)).split())


def escaped(text: object) -> str:
    """Text that Markdown shows as it is, in one line: neither its own marks nor HTML's mean anything in it."""
    return _TAG.sub("&lt;", _ENTITY.sub("&amp;", _MARKS.sub(r"\\\g<0>", _in_a_line(text))))


def code(text: object) -> str:
    """Text as code in a line of Markdown, whatever backticks are in it."""
    words = _in_a_line(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", words)), default=0))
    pad = " " if "`" in words else ""
    return f"{fence}{pad}{words}{pad}{fence}"


def block(text: object) -> str:
    """Text as code in lines of its own in Markdown, whatever backticks are in it."""
    lines = shown(str(text)).rstrip()
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", lines)), default=0))
    return f"{fence}\n{lines}\n{fence}"
