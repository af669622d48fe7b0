"""Two trains of the demo's task that differ in one parameter: which is better, told in terminal, page and MLflow.

Minutes of CPU. The pictures in build/e2e/ begin with `demo-`. Run by `make test-e2e`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.deployments.server import free_ports
from tests.e2e.conftest import PICTURES, picture
from tests.e2e.test_demo import TUNELINE, tuneline

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(3600)]

FIRST, SECOND = 0.001, 0.0001


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """An installation with its servers."""
    mine = ("PREFECT_", "MLFLOW_", "TUNELINE_")
    ports = dict(zip(("TUNELINE_PREFECT_PORT", "TUNELINE_MLFLOW_PORT"), map(str, free_ports()), strict=True))
    made = {name: value for name, value in os.environ.items() if not name.startswith(mine)} | ports
    made.pop("OMP_NUM_THREADS", None)  # one train at a time, of a model that is not tiny: with every core
    made["TUNELINE_HOME"] = str(tmp_path_factory.mktemp("demo") / "home")
    tuneline(made, "up")
    yield made
    subprocess.run([TUNELINE, "down"], env=made, capture_output=True, check=True)


@pytest.fixture(scope="module")
def trains(environment: dict[str, str]) -> tuple[str, str]:
    """The demo's train, and its copy with another learning rate."""
    tuneline(environment, "train", "configs/examples/demo.yaml", "--through", "customized")
    (first,) = json.loads(tuneline(environment, "trains", "list", "--json"))
    tuneline(environment, "trains", "copy", first["id"], "--set", f"learning_rate={SECOND}", "--run")
    ids = {each["id"] for each in json.loads(tuneline(environment, "trains", "list", "--json"))}
    (second,) = ids - {first["id"]}
    return first["id"], second


def test_two_trains_of_the_demo_are_compared_everywhere_with_the_interval(
    environment: dict[str, str], trains: tuple[str, str], page: Page
) -> None:
    first, second = trains
    told = tuneline(environment, "trains", "compare", first, second)
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / "demo-compare.txt").write_text(told, encoding="utf-8")
    table = told.split("\n\n")[0].splitlines()
    assert table[-1].split() == ["learning_rate", str(FIRST), str(SECOND)]
    assert len(table) == 3  # its title, the trains, and the one parameter
    (verdict,) = re.findall(
        rf"^{second} is worse than {first} by F1: .* points, 95 % interval \[-[\d.]+, -[\d.]+\].*$", told, re.MULTILINE
    )

    (report,) = re.findall(r"^With the curves: (.*)$", told, re.MULTILINE)
    page.goto(Path(report).as_uri())
    assert verdict in page.locator("body").inner_text()
    parameters = page.get_by_role("table").first.get_by_role("row")
    assert parameters.all_inner_texts() == [f"\t{first}\t{second}", f"learning_rate\t{FIRST}\t{SECOND}"]
    picture(page, "demo-compare-page", height=3400)

    page.get_by_role("link", name="The same in MLflow").click()
    page.get_by_text("Comparing 2 Runs").wait_for()
    page.get_by_role("switch").first.click()  # show what differs only, of the parameters
    page.get_by_role("row").filter(has_text="weight_decay").first.wait_for(state="detached")
    differing = page.get_by_role("table").filter(has_text="learning_rate")
    assert differing.get_by_role("row").all_inner_texts() == [f"learning_rate\t{FIRST}\t{SECOND}"]
    if page.get_by_role("button", name="Close").count():
        page.get_by_role("button", name="Close").first.click()  # the assistant takes a third of the page
    differing.scroll_into_view_if_needed()
    picture(page, "demo-compare-mlflow")
    page.get_by_text(verdict).first.scroll_into_view_if_needed()
    picture(page, "demo-compare-mlflow-verdict")
