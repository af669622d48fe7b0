"""The page of a train: three parts, every parameter with its origin, and text that stays text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.records import TrainRecord
from configs.scoring import ScoringOptions
from configs.train import Hyperparameters, TrainConfig
from methods import contract
from tasks.evaluation import kept_evaluation
from tasks.files import write_record
from tasks.pages import as_html
from tasks.train_report import train_report
from tests.evaluations import evaluation_of

HOSTILE = "<script>alert(1)</script> | **bold** ![x](http://x/y.png)"


@pytest.fixture
def record() -> TrainRecord:
    config = TrainConfig(
        name="lights",
        description="a | test",
        base_model="tiny",
        dataset="rows",
        hyperparameters=Hyperparameters(learning_rate=5e-4),
    )
    return TrainRecord(
        id="lights_20260101_ab12",
        config=config,
        origins={"name": "file lights.yaml:1", "hyperparameters.learning_rate": "command line"},
        status="failed",
        reason="a\nb",
        run_id="0" * 32,
        evaluation={"base": {"f1": 1.0}, "tuned": {"f1": 90.25}},
        outcome={"steps": 6, "seconds": 2.5, "loss": 0.25},
    )


def write_training(folder: Path) -> None:
    training = folder / "training"
    training.mkdir(parents=True)
    events = [
        {"type": "metrics", "time": 1.0, "step": step, "values": {"loss": 1 / step, "learning_rate": 1e-4}}
        for step in (1, 2, 3)
    ]
    (training / contract.EVENTS_FILE).write_text("".join(json.dumps(event) + "\n" for event in events))
    (training / contract.LOG_FILE).write_text(f"loading\r50%\r100%\n```\n{HOSTILE}\n")


def test_page_has_overview_evaluation_and_log(record: TrainRecord, tmp_path: Path) -> None:
    write_training(tmp_path)
    page = train_report(record, "failed", tmp_path, {"MLflow run": "http://127.0.0.1:5000/run"})
    headings = [line for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["## Overview", "## Evaluation", "## Log"]
    assert "| Status | failed: a<br>b |" in page
    assert "| Description | a \\| test |" in page
    assert "| learning\\_rate | 0.0005 | command line |" in page.replace("| learning_rate |", "| learning\\_rate |")
    assert "| F1 | 1.00 | 90.25 | +89.25 |" in page
    assert "[MLflow run](http://127.0.0.1:5000/run)" in page
    assert "data:image/png;base64," in page
    assert "100%" in page
    assert "50%" not in page


def test_a_running_train_shows_its_parameters_only(record: TrainRecord, tmp_path: Path) -> None:
    page = train_report(record, "running", tmp_path, {})
    assert "## Overview" in page
    assert "## Log" not in page


def test_text_from_outside_never_becomes_markup(record: TrainRecord, tmp_path: Path) -> None:
    write_training(tmp_path)
    options = ScoringOptions(by=(HOSTILE,))
    kept = evaluation_of([(HOSTILE, HOSTILE, f"{HOSTILE}…")], [{HOSTILE: HOSTILE}], options=options)
    write_record(kept_evaluation(tmp_path, "tuned"), kept)
    hostile = record.model_copy(update={"reason": HOSTILE, "config": record.config.model_copy(update={"name": "x"})})
    page = as_html(train_report(hostile, "failed", tmp_path, {}), "a train")
    assert "<script>" not in page
    assert "<strong>" not in page
    assert 'http://x/y.png"' not in page
    assert page.count("<img") == 1  # the curves
    assert page.count("alert(1)") == 7
    assert "(cut at the limit)" in page


def test_a_change_has_its_interval_and_every_slice_its_figures(record: TrainRecord, tmp_path: Path) -> None:
    rows = [(f"light {number}", "on", "zh" if number < 10 else "en") for number in range(30)]
    for which, answer in (("base", "off"), ("tuned", "on")):
        answers = [(prompt, reference, answer if lang == "zh" else "off") for prompt, reference, lang in rows]
        kept = evaluation_of(answers, [{"lang": lang} for _, _, lang in rows], options=ScoringOptions(by=("lang",)))
        write_record(kept_evaluation(tmp_path, which), kept)
    scored = {"base": {"accuracy": 0.0}, "tuned": {"accuracy": 100 / 3}}
    page = train_report(record.model_copy(update={"evaluation": scored}), "completed", tmp_path, {})
    accuracy = next(line for line in page.splitlines() if line.startswith("| Exact accuracy"))
    assert "| 0.00 | 33.33 | +33.33 (95 %: +16.67 to +50.00, better) |" in accuracy
    assert "| zh | 10 | 0.00 | 100.00 |" in page
    assert "| en | 20 | 0.00 | 0.00 |" in page
    assert "jieba" in page
