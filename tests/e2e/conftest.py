"""Keeps a picture of the page that a test has failed on."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

import pytest


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    site: Any = getattr(item, "funcargs", {}).get("site")
    if report.failed and site is not None:
        site.picture(f"failed-{item.name}")
    return report
