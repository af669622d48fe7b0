"""The browser of a module's tests, and a picture of the page that a test has failed on."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from configs.settings import PROJECT_ROOT
from tests.e2e.chromium import find_chromium, flags

if TYPE_CHECKING:
    from playwright.sync_api import Page

PICTURES = PROJECT_ROOT / "build" / "e2e"


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    from playwright.sync_api import sync_playwright

    chromium = find_chromium()
    assert chromium is not None, "there is no Chromium: run `make test-e2e`, or set CHROMIUM=/path/to/chromium"
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags())
        made = browser.new_page(viewport={"width": 1440, "height": 1000})
        made.set_default_timeout(30_000)
        yield made
        browser.close()


def picture(page: Page, name: str, height: int = 1000) -> Path:
    """Keep what the page shows, of this many pixels' height."""
    PICTURES.mkdir(parents=True, exist_ok=True)
    page.set_viewport_size({"width": 1440, "height": height})
    page.wait_for_timeout(500)  # a taller page is drawn again
    page.screenshot(path=PICTURES / f"{name}.png")
    page.set_viewport_size({"width": 1440, "height": 1000})
    return PICTURES / f"{name}.png"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    shown: Any = getattr(item, "funcargs", {}).get("page")
    if report.failed and shown is not None:
        picture(shown, f"failed-{item.name}")
    return report
