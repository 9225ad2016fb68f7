"""A browser without a window, in which tests open the report as its readers do."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
