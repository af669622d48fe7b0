"""What somebody does who writes no code, in a real browser on real servers: the stations of the README, one by one.

Each station leaves a picture in build/e2e/. The tests stand in the order in which a person goes through the pages,
and each goes on from what the one before it has done. Run by `make test-e2e`.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from configs.records import TrainRecord
from configs.settings import PROJECT_ROOT, Settings
from deployments import services
from tests.deployments.server import free_ports
from tests.e2e.conftest import PICTURES, picture
from tests.flows.tiny_trains import processes_naming, wait_for
from tests.tiny_models import make_tiny_chat_model

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.e2e

FIRST, SECOND, THIRD = 0.01, 0.002, 0.003
STEPS = 40


class Site:
    """An installation with its servers and worker, and the page that a person has open."""

    def __init__(self, settings: Settings, root: Path, page: Page) -> None:
        self.settings, self.root, self.page = settings, root, page
        self.prefect = f"http://127.0.0.1:{settings.prefect_port}"
        self.mlflow = f"http://127.0.0.1:{settings.mlflow_port}"
        self.api = httpx.Client(base_url=f"{self.prefect}/api", trust_env=False, timeout=30)

    def picture(self, name: str, height: int = 1000) -> None:
        picture(self.page, name, height)

    def form(self) -> None:
        """Go to the form of customized/sft the way one clicks there."""
        self.page.goto(f"{self.prefect}/")
        self.page.get_by_role("link", name="Deployments").click()
        self.page.get_by_placeholder("Search deployments").fill("sft")  # there are pages of them
        deployment = self.api.get("/deployments/name/customized/sft").raise_for_status().json()["id"]
        self.page.locator(f"a[href$='/deployments/deployment/{deployment}']").first.click()
        self.page.get_by_role("button", name="Run", exact=True).click()
        self.page.get_by_role("menuitem", name="Custom run").click()
        self.field("Name").wait_for()

    def field(self, label: str) -> Any:
        return self.page.get_by_label(re.compile(rf"^{re.escape(label)}( \(Optional\))?$"))

    def fill(self, **values: object) -> None:
        for label, value in values.items():
            self.field(label.replace("_", " ")).fill(str(value))

    def submit(self) -> None:
        self.page.get_by_role("button", name="Submit").click()

    def submitted(self) -> str:
        """Submit; the id of the flow run whose page opens, or that the page's message leads to."""
        before = {run["id"] for run in self.runs()}
        self.submit()
        wait_for(lambda: {run["id"] for run in self.runs()} - before)
        (new,) = {run["id"] for run in self.runs()} - before
        return str(new)

    def runs(self) -> list[dict[str, Any]]:
        answer = self.api.post("/flow_runs/filter", json={"deployments": {"name": {"any_": ["sft"]}}})
        return list(answer.raise_for_status().json())

    def run(self, run: str) -> dict[str, Any]:
        return dict(self.api.get(f"/flow_runs/{run}").raise_for_status().json())

    def open_run(self, run: str) -> None:
        self.page.goto(f"{self.prefect}/v2/runs/flow-run/{run}")

    def menu(self, entry: str) -> None:
        self.page.get_by_role("button", name="Open menu").click()
        self.page.get_by_role("menuitem", name=entry).click()

    def tuneline(self, *arguments: str) -> str:
        """What a command has printed."""
        command = [sys.executable, "-m", "flows.cli", *arguments]
        done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout

    def record(self, name: str) -> TrainRecord:
        (path,) = self.settings.trains.glob(f"{name}_*/train.json")
        return TrainRecord.model_validate_json(path.read_bytes())


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, page: Page) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("pages")
    make_tiny_chat_model(root / "tiny", seed=1)
    rooms = ("kitchen", "hall", "cellar", "garden", "attic", "office", "bath")
    rows = [
        {"prompt": f"switch the light {n} in the {rooms[n * 5 % 7]}", "completion": f"on {n % 7}"} for n in range(150)
    ]
    for name, part in {"rows": rows[:100], "validation": rows[100:110], "test": rows[110:]}.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        for variable in [name for name in os.environ if name.startswith(("PREFECT_", "MLFLOW_", "TUNELINE_"))]:
            patch.delenv(variable)
        patch.setenv("TUNELINE_HOME", str(root / "home"))
        patch.setenv("OMP_NUM_THREADS", "1")  # a model this small is only slowed down by a second thread
        before = dict(os.environ)
        prefect, mlflow = free_ports()
        settings = Settings(prefect_port=prefect, mlflow_port=mlflow, grace_seconds=20)
        services.up(settings)
        try:
            yield Site(settings, root, page)
        finally:
            services.down(settings)
            os.environ.clear()
            os.environ.update(before)
        assert processes_naming(str(root)) == []


@pytest.fixture(scope="module")
def first(site: Site) -> str:
    """The first train, started from the form with two values changed besides what every train must have."""
    site.form()
    site.fill(Name="lights", Description="light switches, the first try", Base_model=site.root / "tiny")
    site.fill(Dataset=site.root / "rows.jsonl", Validation_dataset=site.root / "validation.jsonl")
    site.fill(Evaluation_dataset=site.root / "test.jsonl", Answer_length=8)
    site.fill(Learning_rate=FIRST, Training_steps=STEPS)
    site.picture("02-form-filled")
    run = site.submitted()
    site.open_run(run)
    return run


@pytest.fixture(scope="module")
def second(site: Site, first: str) -> str:
    """A copy of the first with another learning rate, from the menu of its run."""
    wait_for(lambda: site.run(first)["state"]["type"] == "COMPLETED", 180)
    site.open_run(first)
    site.menu("Copy to new run")
    site.field("Learning rate").wait_for()
    site.page.wait_for_timeout(1000)
    site.picture("07-copy-to-new-run")
    assert site.field("Learning rate").input_value() == str(FIRST)
    site.fill(Name="lights-slow", Learning_rate=SECOND)
    run = site.submitted()
    wait_for(lambda: site.run(run)["state"]["type"] in ("COMPLETED", "FAILED", "CRASHED"), 180)
    return run


def test_form_asks_common_fields_first_and_tells_what_they_are(site: Site) -> None:
    site.form()
    labels = [text.removesuffix(" (Optional)") for text in site.page.locator("label").all_inner_texts()]
    asked = labels[labels.index("Train") + 1 : labels.index("Training method")]
    assert asked[:4] == ["Name", "Description", "Base model", "Dataset"]
    assert asked.index("Learning rate") < asked.index("LoRA dropout") < asked.index("Dataset shape")
    assert site.field("Learning rate").input_value() == "0.0001"
    assert site.page.get_by_text("Size of an update at the peak of the schedule.").is_visible()
    site.picture("01-form", height=4600)


def test_impossible_value_is_refused_before_anything_runs(site: Site) -> None:
    site.form()
    site.fill(Name="refused", Base_model=site.root / "tiny", Dataset=site.root / "rows.jsonl", Validation_split=5)
    site.submit()
    refusal = site.page.get_by_text(re.compile("greater than or equal to the maximum of 1"))
    refusal.first.wait_for()
    refusal.first.scroll_into_view_if_needed()
    site.picture("03-refusal")
    assert [run["name"] for run in site.runs()] == []


def test_progress_is_followed_on_the_page_to_the_end(site: Site, first: str) -> None:
    site.page.get_by_role("tab", name="Logs").click()
    site.page.get_by_text(re.compile("training: reading the data")).first.wait_for(timeout=120_000)
    site.picture("04-run-while-it-trains")
    # The page draws only the lines in sight: with the newest on top, one sees what happens without scrolling.
    site.page.get_by_role("combobox").filter(has_text="Oldest to newest").click()
    site.page.get_by_role("option", name="Newest to oldest").click()
    # Nothing is reloaded: name, log and state change under the eyes of whoever looks.
    site.page.get_by_text(re.compile(rf"training: {STEPS}/{STEPS}  loss .* tokens/s .*done")).first.wait_for(
        timeout=120_000
    )
    site.page.get_by_text("Completed", exact=True).first.wait_for(timeout=120_000)
    record = site.record("lights")
    site.page.get_by_text(record.id).first.wait_for()
    site.picture("05-run-at-its-end")
    hyper = record.config.hyperparameters
    assert (hyper.learning_rate, hyper.max_steps) == (FIRST, STEPS)
    assert (record.status, record.outcome["steps"], record.flow_run_id) == ("completed", STEPS, first)
    assert record.origins["hyperparameters.learning_rate"] == "form"
    artifacts = site.api.post("/artifacts/filter", json={"artifacts": {"flow_run_id": {"any_": [first]}}}).json()
    progress = [item for item in artifacts if item["key"] == "training-progress"]
    assert [item["data"] for item in progress] == [100.0]


def test_one_artifact_has_overview_evaluation_and_log(site: Site, first: str) -> None:
    wait_for(lambda: site.run(first)["state"]["type"] == "COMPLETED", 180)
    site.open_run(first)
    site.page.get_by_role("tab", name="Artifacts").click()
    shown = site.page.get_by_text("train-report")
    shown.first.wait_for()
    assert shown.count() == 1
    shown.click()
    site.page.get_by_role("link", name=re.compile("^[0-9a-f]{8}$")).first.click()
    for heading in ("Overview", "Evaluation", "Log"):
        site.page.get_by_role("heading", name=heading, exact=True).wait_for()
    picture = site.page.get_by_role("img", name="Curves of the training")
    assert picture.evaluate("image => image.complete && image.naturalWidth > 300")
    rate = site.page.get_by_role("row").filter(has_text="learning_rate")
    assert rate.get_by_role("cell").all_inner_texts() == ["learning_rate", str(FIRST), "form"]
    accuracy = site.page.get_by_role("row").filter(has_text="Exact accuracy").get_by_role("cell").all_inner_texts()
    assert float(accuracy[2]) == pytest.approx(site.record("lights").evaluation["tuned"]["accuracy"], abs=0.005)
    assert site.page.get_by_role("row").filter(has_text="switch the light 110 in the").count() == 1
    site.page.get_by_text("parameters at their defaults").click()
    assert site.page.get_by_text("weight_decay").is_visible()
    site.page.get_by_text("parameters at their defaults").click()
    site.picture("06-artifact", height=3600)


def test_copy_is_the_same_train_but_for_the_change(site: Site, first: str, second: str) -> None:
    assert site.run(second)["state"]["type"] == "COMPLETED"
    one, other = site.record("lights"), site.record("lights-slow")
    changed = {"name": "lights-slow", "hyperparameters": {"learning_rate": SECOND}}
    hyper = one.config.hyperparameters.model_copy(update=changed["hyperparameters"])
    assert other.config == one.config.model_copy(update={"name": "lights-slow", "hyperparameters": hyper})
    assert other.dataset == one.dataset
    assert other.origins["dataset"] == f"copied from {one.id}"
    assert other.origins["hyperparameters.learning_rate"] == "form"
    assert f"train:{one.id}" not in site.run(second)["tags"]


def test_mlflow_shows_both_trains_and_both_curves(site: Site, first: str, second: str) -> None:
    runs = {name: site.record(name) for name in ("lights", "lights-slow")}
    page = site.page
    page.goto(f"{site.mlflow}/#/experiments/1/runs?viewStateShareKey=tuneline-trains")
    page.get_by_role("link", name=runs["lights-slow"].id).wait_for()
    if page.get_by_role("button", name="Close").count():
        page.get_by_role("button", name="Close").first.click()  # the assistant takes a third of the page
    page.get_by_text("accuracy_tuned").first.wait_for()
    site.picture("08-mlflow-table")

    page.goto(f"{site.mlflow}/#/experiments/1/runs?compareRunsMode=CHART")
    page.reload()
    # The page draws only the charts in sight; the search takes a regular expression.
    page.get_by_placeholder("Search metric charts").fill("^(eval_)?loss$")
    chart = page.locator("[data-testid='experiment-view-compare-runs-card']").filter(
        has=page.get_by_text("loss", exact=True)
    )
    chart.first.wait_for()
    chart.first.scroll_into_view_if_needed()
    wait_for(lambda: chart.first.locator(".scatterlayer .trace").count() >= 2)
    for record in runs.values():
        assert page.get_by_text(record.id).first.is_visible()
    site.picture("10-mlflow-curves")


def test_comparison_tells_what_differs_and_which_is_better_in_terminal_page_and_mlflow(
    site: Site, first: str, second: str
) -> None:
    fast, slow = (site.record(name) for name in ("lights", "lights-slow"))
    told = site.tuneline("trains", "compare", "lights", "lights-slow")
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / "13-compare.txt").write_text(told, encoding="utf-8")
    differing = told.split("\n\n")[0]
    assert re.findall(r"^(\S+) +(\S+) +(\S+)$", differing, re.MULTILINE)[-1] == ("learning_rate", "0.01", "0.002")
    assert len(differing.splitlines()) == 3  # its title, the trains, and the one parameter
    (verdict,) = re.findall(
        rf"^{slow.id} is worse than {fast.id} by F1: .* points, 95 % interval \[-[\d.]+, -[\d.]+\].*$",
        told,
        re.MULTILINE,
    )

    page = site.page
    (report,) = re.findall(r"^With the curves: (.*)$", told, re.MULTILINE)
    page.goto(Path(report).as_uri())
    assert verdict in page.locator("body").inner_text()
    parameters = page.get_by_role("table").first.get_by_role("row")
    assert parameters.all_inner_texts() == [f"\t{fast.id}\t{slow.id}", f"learning_rate\t{FIRST}\t{SECOND}"]
    curves = page.get_by_role("img", name="Curves of the trains")
    assert curves.evaluate("image => image.complete && image.naturalWidth > 300")
    site.picture("13-compare-page", height=3400)

    page.get_by_role("link", name="The same in MLflow").click()
    page.get_by_text("Comparing 2 Runs").wait_for()
    rate = page.get_by_role("row").filter(has_text="learning_rate")
    rate.first.scroll_into_view_if_needed()
    assert {str(FIRST), str(SECOND)} <= set(re.split(r"\s+", " ".join(rate.all_inner_texts())))
    page.get_by_role("switch").first.click()  # show what differs only, of the parameters
    page.get_by_role("row").filter(has_text="weight_decay").first.wait_for(state="detached")
    page.get_by_text(verdict).first.wait_for()
    site.picture("09-mlflow-compare", height=3000)


def test_train_cancelled_on_the_page_stops_with_all_its_processes(site: Site, second: str) -> None:
    site.open_run(second)
    site.menu("Copy to new run")
    site.field("Training steps").wait_for()
    site.page.wait_for_timeout(1000)
    site.fill(Name="endless", Learning_rate=THIRD, Training_steps=100_000, Checkpoint_every=50)
    run = site.submitted()
    wait_for(lambda: list(site.settings.trains.glob("endless_*/training/checkpoints/*")), 120)
    folder = next(iter(site.settings.trains.glob("endless_*")))
    assert processes_naming(str(folder)) != []
    site.open_run(run)
    site.menu("Cancel")
    site.picture("11-cancel")
    site.page.get_by_role("button", name="Cancel Flow Run").click()
    site.page.get_by_text("Cancelled", exact=True).first.wait_for(timeout=90_000)
    site.picture("12-cancelled")
    wait_for(lambda: processes_naming(str(folder)) == [])
    wait_for(lambda: site.record("endless").status == "cancelled")
    assert list(folder.glob("training/checkpoints/*"))
