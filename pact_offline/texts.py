"""Text of others for a terminal: on one line, and with nothing that plays with it."""

from __future__ import annotations

import re
import unicodedata


def visible(text: str) -> str:
    """A token's text on one line, with its spaces shown as dots."""
    return text.replace(" ", "\u00b7").encode("unicode_escape").decode().replace("\\xb7", "\u00b7")


def printable(text: str) -> str:
    """A text of many lines with other control characters written out."""
    odd = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(odd, lambda found: repr(found[0])[1:-1], text)


def fitted(text: str | None, columns: int, *, keeps_end: bool = False) -> str:
    """A text as a cell of so many columns of a terminal; cut, and filled up with spaces.

    Args:
        text: None: it is not known.
        columns: at least 1.
        keeps_end: cut the beginning, as of a path.
    """
    said = "?" if text is None else printable(" ".join(text.split()))
    if sum(map(_columns, said)) > columns:
        left, kept = columns - 1, ""
        for letter in reversed(said) if keeps_end else said:
            if (left := left - _columns(letter)) < 0:
                break
            kept += letter
        said = f"…{kept[::-1]}" if keeps_end else f"{kept}…"
    return said + " " * (columns - sum(map(_columns, said)))


def _columns(letter: str) -> int:
    if unicodedata.combining(letter):
        return 0
    return 2 if unicodedata.east_asian_width(letter) in "WF" else 1
