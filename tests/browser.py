"""A browser without a window, in which tests open the report as its readers do."""

from __future__ import annotations

import base64
import io
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

_NEAR = 4  # lines of a picture that is an eighth of the size

CHROMIUM_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def chromium() -> str:
    """The path of Chromium: that which CHROMIUM names, or one of the usual names.

    Raises:
        FileNotFoundError: there is none; says how to install it.
    """
    named = os.environ.get("CHROMIUM")
    found = next(filter(None, map(shutil.which, [named] if named else CHROMIUM_NAMES)), None)
    if found is None:
        looked = named or ", ".join(CHROMIUM_NAMES)
        raise FileNotFoundError(
            f"expected Chromium, found none of {looked}: apt-get install chromium, or set CHROMIUM "
            "to one"
        )
    return found


@contextmanager
def started() -> Iterator[Any]:
    """Yield playwright's `Browser`."""
    from playwright.sync_api import sync_playwright

    # No sandbox: it cannot be made by root, nor in many containers.
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium(), args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


class Reader:
    """A page that is open, and what happened to it.

    Attributes:
        page: playwright's.
        requests: addresses that it asked for, its own file aside; none was let through.
        complaints: of its console, and errors of its scripts.
    """

    def __init__(self, browser: Any, path: Path, width: int = 1280, **context: Any) -> None:
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self._context = browser.new_context(viewport={"width": width, "height": 900}, **context)
        self._own = path.resolve().as_uri()
        self.page = self._context.new_page()
        self.page.route("**/*", self._answer)
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", self._dismiss)
        self.page.goto(self._own)

    def close(self) -> None:
        self._context.close()

    def _answer(self, route: Any) -> None:
        if route.request.url.partition("#")[0] == self._own:
            route.continue_()
        else:
            self.requests.append(route.request.url)
            route.abort()

    def _dismiss(self, dialog: Any) -> None:
        self.complaints.append(f"dialog: {dialog.message}")
        dialog.dismiss()


def looks(page: Any) -> Image.Image:
    """A picture of a whole page, with every letter as the same box.

    So it does not depend on the fonts of a machine. An eighth of the size: a pixel more or less
    at the edge of something does not count. Needs a page that is open with `bypass_csp`.
    """
    font = base64.b64encode(_boxes()).decode()
    page.add_style_tag(
        content=f"@font-face {{ font-family: Boxes; src: url(data:font/ttf;base64,{font}) }}"
        "* { font-family: Boxes !important; }"
    )
    page.evaluate("document.fonts.load('1rem Boxes')")
    picture = Image.open(io.BytesIO(page.screenshot(full_page=True))).convert("RGB")
    return picture.reduce(8)


def unlike(picture: Image.Image, other: Image.Image) -> float:
    """The share of pixels that are visibly not the same; 1 where the pages have other sizes.

    Each line is looked for among those near it: another browser's buttons are a little higher.
    """
    first, second = (np.asarray(one, dtype=int) for one in (picture, other))
    if picture.width != other.width or abs(len(first) - len(second)) > _NEAR:
        return 1.0
    height = min(len(first), len(second))
    first, second = first[:height], second[:height]
    return max(_not_near(first, second), _not_near(second, first))


def _not_near(lines: np.ndarray, others: np.ndarray) -> float:
    padded = np.pad(others, ((_NEAR, _NEAR), (0, 0), (0, 0)), mode="edge")
    found = [
        (np.abs(lines - padded[shift : shift + len(lines)]).max(axis=2) > 40).mean(axis=1)
        for shift in range(2 * _NEAR + 1)
    ]
    return float(np.min(found, axis=0).mean())


def _boxes() -> bytes:
    """A font in which every letter is half an em wide."""
    from fontTools.fontBuilder import FontBuilder
    from fontTools.pens.ttGlyphPen import TTGlyphPen

    pen = TTGlyphPen(None)
    pen.moveTo((50, 0))
    for corner in ((50, 500), (450, 500), (450, 0)):
        pen.lineTo(corner)
    pen.closePath()
    box, nothing = pen.glyph(), TTGlyphPen(None).glyph()
    font = FontBuilder(1000, isTTF=True)
    font.setupGlyphOrder([".notdef", "box", "space"])
    letters = dict.fromkeys(range(0x21, 0x3000), "box")
    font.setupCharacterMap({**letters, 0x20: "space", 0xA0: "space"})
    font.setupGlyf({".notdef": box, "box": box, "space": nothing})
    font.setupHorizontalMetrics(dict.fromkeys((".notdef", "box", "space"), (500, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Boxes", "styleName": "Regular"})
    font.setupOS2(sTypoAscender=800, sTypoDescender=-200, usWinAscent=800, usWinDescent=200)
    font.setupPost()
    written = io.BytesIO()
    font.save(written)
    return written.getvalue()
