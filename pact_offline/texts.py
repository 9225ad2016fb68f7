"""Text of others for a terminal: on one line, and with nothing that plays with it."""

from __future__ import annotations

import re


def visible(text: str) -> str:
    """A token's text on one line, with its spaces shown as dots."""
    return text.replace(" ", "\u00b7").encode("unicode_escape").decode().replace("\\xb7", "\u00b7")


def printable(text: str) -> str:
    """A text of many lines with other control characters written out."""
    odd = r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]"
    return re.sub(odd, lambda found: repr(found[0])[1:-1], text)
