"""A page in this machine's own Chromium, without a screen, driven by Playwright."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def problem() -> str | None:
    """What is missing to open a page; None: nothing."""
    if importlib.util.find_spec("playwright") is None:
        return "pip install playwright"
    return None if any(map(shutil.which, NAMES)) else "no Chromium here: apt-get install chromium"


@contextmanager
def opened(path: Path) -> Iterator[tuple[Any, list[str], list[str]]]:
    """The page of a file once its scripts have run, what it asks for, and what goes wrong in it."""
    from playwright.sync_api import sync_playwright

    requests: list[str] = []
    errors: list[str] = []
    with sync_playwright() as playwright:
        program = next(filter(None, map(shutil.which, NAMES)))
        browser = playwright.chromium.launch(executable_path=program, chromium_sandbox=False)
        page = browser.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(path.resolve().as_uri())
        yield page, requests, errors
        browser.close()
