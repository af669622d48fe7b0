"""Candidates side by side: partial success, differences with intervals, the report, the table, the judge's word."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.datasets import DatasetVersion
from configs.endpoints import Deployment, Endpoint, Gateway
from configs.errors import UserError
from configs.judging import COMPARE_PROMPT, Judge
from configs.records import now
from configs.scoring import ScoringOptions
from tasks import models, tracking
from tasks.asking import GIVE_UP_AFTER, ask_endpoint
from tasks.candidates import Candidate, find_candidates
from tasks.datasets import add_dataset
from tasks.inference import Generation
from tasks.side_by_side import (
    REPORT_FILE,
    ROWS_FILE,
    SideBySide,
    as_csv,
    best,
    evaluate_side_by_side,
    most_changed,
    preview,
)
from tests.chat_servers import ChatServer, chat_server
from tests.tiny_models import make_tiny_chat_model

OPTIONS = ScoringOptions(by=("room",))
GENERATION = Generation(max_new_tokens=4)


@pytest.fixture
def version(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> DatasetVersion:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    rows = [
        {"prompt": f"light {number}", "completion": f"on {number}", "room": "hall" if number < 4 else "attic"}
        for number in range(8)
    ]
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return add_dataset(path)


@contextmanager
def showing(name: str) -> Iterator[Any]:
    yield lambda events: None


def endpoint(server: ChatServer, tmp_path: Path, name: str = "lamps") -> Endpoint:
    """An endpoint whose address is that of a server that is already there."""
    address = httpx.URL(server.address)
    deployment = Deployment(
        model=f"{name}_d_1234",
        model_name=name,
        model_path=tmp_path,
        python=Path("python"),
        log=tmp_path / "log",
        state="current",
        created_at=now(),
    )
    gateway = Gateway(host=address.host, port=address.port or 0, log=tmp_path / "log")
    return Endpoint(name=name, gateway=gateway, deployments=[deployment], current=deployment.model)


def served(server: ChatServer, tmp_path: Path, name: str = "lamps") -> Candidate:
    return Candidate(f"endpoint:{name}", endpoint=endpoint(server, tmp_path, name))


def right(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"]).replace("light", "on")


def wrong_in_the_attic(body: dict[str, Any]) -> str | int:
    number = int(body["messages"][-1]["content"].split()[1])
    return right(body) if number < 4 else f"<script>alert({number})</script>"


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    """What is deployed at the endpoints of these tests is a registered model."""
    base = models.find_model(str(tiny_model))
    monkeypatch.setattr("tasks.evaluation.models.find_model", lambda _: base)


def test_the_first_is_compared_with_each_other_and_the_changed_rows_are_shown(
    version: DatasetVersion, tmp_path: Path, known: None
) -> None:
    with chat_server(wrong_in_the_attic) as one, chat_server(right) as two, chat_server(lambda _: 400) as three:
        candidates = [served(each, tmp_path, name) for each, name in ((one, "old"), (two, "new"), (three, "off"))]
        found, folder = evaluate_side_by_side(candidates, version, GENERATION, -1, OPTIONS, "f1", None, showing)
    assert [(each.name, each.error is None) for each in found.outcomes] == [
        ("endpoint:old", True),
        ("endpoint:new", True),
        ("endpoint:off", False),
    ]
    assert list(found.differences) == ["endpoint:new"]
    accuracy = next(each for each in found.differences["endpoint:new"] if each.metric == "accuracy")
    assert (accuracy.first, accuracy.second, accuracy.better, accuracy.verdict) == (50, 100, 4, "better")
    assert most_changed(found, 20) == [5, 6, 7, 8]
    assert best(found) == "endpoint:new"

    page = (folder / REPORT_FILE).read_text(encoding="utf-8")
    assert "<script>" not in page
    assert "alert(7)" in page
    assert "endpoint:off" in page
    assert "failed: " in page
    assert "http" not in page.split("<body>")[1].split("the endpoint")[0]  # nothing is fetched
    assert "attic" in page
    rows = list(csv.DictReader((folder / ROWS_FILE).read_text(encoding="utf-8-sig").splitlines()))
    assert [row["endpoint:old: answer"] for row in rows[3:5]] == ["on 3", "<script>alert(4)</script>"]
    assert (rows[0]["room"], rows[0]["reference"], rows[0]["endpoint:new: accuracy"]) == ("hall", "on 0", "100.0")

    client = tracking.mlflow_client()
    kept = {path.path for path in client.list_artifacts(str(found.run_id), "side_by_side")}
    assert {f"side_by_side/{name}" for name in (REPORT_FILE, ROWS_FILE)} <= kept
    children = client.search_runs(
        [client.get_run(str(found.run_id)).info.experiment_id], f"tags.mlflow.parentRunId = '{found.run_id}'"
    )
    assert {run.data.tags["tuneline.endpoint"] for run in children} == {"old", "new"}
    assert SideBySide.model_validate_json((folder / "side_by_side.json").read_bytes()) == found


def test_rows_that_fail_are_left_out_of_the_scores_and_told(
    version: DatasetVersion, tmp_path: Path, known: None
) -> None:
    def some(body: dict[str, Any]) -> str | int:
        return 400 if "light 2" in body["messages"][-1]["content"] else right(body)

    with chat_server(wrong_in_the_attic) as one, chat_server(some) as two:
        candidates = [served(one, tmp_path, "old"), served(two, tmp_path, "new")]
        found, _ = evaluate_side_by_side(candidates, version, GENERATION, -1, OPTIONS, "f1", None, showing)
    (_, old), (_, new) = found.answered
    assert (old.rows, new.rows, new.scores.accuracy, list(new.failed)) == (8, 7, 100, [3])
    accuracy = next(each for each in found.differences["endpoint:new"] if each.metric == "accuracy")
    assert (accuracy.rows, accuracy.better) == (7, 4)  # the pairs are those rows that both answered
    assert "400" in as_csv(found).splitlines()[3]


def test_a_server_that_is_gone_is_asked_no_more(tmp_path: Path) -> None:
    talks = [{"messages": [{"role": "user", "content": f"light {number}"}]} for number in range(60)]
    with chat_server(lambda _: 400) as server:
        answers = ask_endpoint(endpoint(server, tmp_path), talks, GENERATION)
        assert len(answers) == 60
        assert all(isinstance(answer, UserError) for answer in answers)
        assert GIVE_UP_AFTER <= len(server.asked) < GIVE_UP_AFTER + 5


def test_a_preview_shows_five_rows_and_records_nothing(version: DatasetVersion, tmp_path: Path) -> None:
    with chat_server(right) as server, chat_server(lambda _: "Score: 4") as wise:
        judge = Judge(address=wise.address, model="wise")
        found = preview([served(server, tmp_path)], version, GENERATION, ScoringOptions(), "f1", judge, showing)
    assert [row["prediction"] for row in found.answered[0][1].predictions] == [f"on {number}" for number in range(5)]
    assert len(wise.asked) == 5
    assert not (tmp_path / "mlflow.db").exists()
    assert not list((tmp_path / "home").glob("evaluations/*"))
    with chat_server(lambda _: 400) as server, pytest.raises(UserError, match="none of them answered"):
        preview([served(server, tmp_path)], version, GENERATION, ScoringOptions(), "f1", None, showing)


def test_a_judge_of_pairs_judges_each_other_against_the_first(
    version: DatasetVersion, tmp_path: Path, known: None
) -> None:
    def wise(body: dict[str, Any]) -> str:
        text = body["messages"][-1]["content"].split("Answer A:\n")[1]
        return f"Winner: {'B' if 'alert' in text.splitlines()[0] else 'A' if 'alert' in text else 'tie'}"

    with chat_server(wrong_in_the_attic) as one, chat_server(right) as two, chat_server(wise) as three:
        candidates = [served(one, tmp_path, "old"), served(two, tmp_path, "new")]
        judge = Judge(address=three.address, model="wise", prompt=COMPARE_PROMPT)
        found, folder = evaluate_side_by_side(candidates, version, GENERATION, -1, OPTIONS, "f1", judge, showing)
    old, new = found.outcomes
    assert old.judged is None
    assert new.judged is not None
    told = new.judged.model_dump()
    assert (told["wins"], told["losses"], told["ties"], told["by_order"]) == (4, 0, 4, 0)
    assert "judge: other" in (folder / REPORT_FILE).read_text(encoding="utf-8")
    assert "wise" in (folder / REPORT_FILE).read_text(encoding="utf-8")


def test_models_answer_side_by_side(version: DatasetVersion, tmp_path: Path, tiny_model: Path) -> None:
    other = make_tiny_chat_model(tmp_path / "other", seed=3)
    candidates = find_candidates([str(tiny_model), str(other)])
    found, folder = evaluate_side_by_side(
        candidates,
        version,
        GENERATION,
        3,
        ScoringOptions(),
        "rouge_l",
        None,
        showing,
        perplexity=True,
        folder=tmp_path / "mine",
    )
    assert folder == tmp_path / "mine"
    assert [evaluation.rows for _, evaluation in found.answered] == [3, 3]
    perplexities = [evaluation.perplexity for _, evaluation in found.answered]
    assert perplexities[0] != perplexities[1]
    assert "Perplexity" in (folder / REPORT_FILE).read_text(encoding="utf-8")


def test_candidates_are_told_apart(home: Path, tiny_model: Path) -> None:
    with pytest.raises(UserError, match="named twice"):
        find_candidates([str(tiny_model), str(tiny_model)])
    with pytest.raises(UserError, match="too many"):
        find_candidates(["a", "b", "c", "d", "e", "f"])
    with pytest.raises(UserError, match="no such model"):
        find_candidates(["nobody"])
    with pytest.raises(UserError, match="endpoint"):
        find_candidates(["endpoint:nobody"])
