"""Policies, new rows and the history of a line: what a retraining reads and writes, without a train."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from configs.retraining import RetrainOutcome, RetrainPolicy
from configs.train import TrainConfig
from tasks import retraining
from tasks.datasets import add_dataset

pytestmark = pytest.mark.usefixtures("home")
ROW = '{"prompt": "switch the light", "completion": "on"}\n'


def policy(dataset: str = "rows", line: str = "lights") -> RetrainPolicy:
    return RetrainPolicy(line=line, dataset=dataset, evaluation_dataset="test@0123456789ab")


def config(**changes: str) -> TrainConfig:
    return TrainConfig.model_validate({"name": "lights", "base_model": "tiny", "dataset": "rows", **changes})


def test_a_policy_comes_back_as_it_was_kept_and_a_wrong_file_is_named() -> None:
    kept = policy(line="灯光").model_copy(update={"margin": 2.5, "then": "deployed", "endpoint": "lights"})
    path = retraining.save_policy(kept)
    assert retraining.load_policy("灯光") == kept
    assert retraining.list_policies() == [kept]
    assert retraining.load_policy("another") is None
    path.write_text(path.read_text(encoding="utf-8").replace("2.5", "-1"), encoding="utf-8")
    with pytest.raises(UserError, match="margin") as refused:
        retraining.load_policy("灯光")
    assert refused.value.file == str(path)


@pytest.mark.parametrize("line", ["../models", "a/b", "..", ""])
def test_a_line_cannot_leave_its_folder(line: str) -> None:
    with pytest.raises(UserError, match="no name of a line"):
        retraining.line_folder(line)


@pytest.mark.parametrize("content", ["", " \n\n", "\ufeff", "\n" * 10_000, "[]", "[ \n ]\n"])
def test_an_empty_file_has_no_version(tmp_path: Path, content: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(content, encoding="utf-8")
    assert retraining.newest_version(policy(str(path)), config()) is None


def test_a_file_is_read_again_with_the_columns_of_the_train_and_a_name_followed(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(ROW.replace("prompt", "ask").replace("completion", "say") * 2, encoding="utf-8")
    train = config(prompt_column="ask", completion_column="say")
    first = retraining.newest_version(policy(str(path)), train)
    path.write_text(path.read_text() + '{"ask": "and now", "say": "off"}\n')
    second = retraining.newest_version(policy(str(path)), train)
    assert first is not None
    assert second is not None
    assert (first.rows, second.rows) == (2, 3)
    assert retraining.newest_version(policy("rows"), train) == second
    path.write_text(ROW, encoding="utf-8")
    third = add_dataset(path, "rows")
    assert retraining.newest_version(policy("rows"), train) == third


def test_a_file_that_is_gone_or_broken_is_an_error_and_no_empty_dataset(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        retraining.newest_version(policy(str(tmp_path / "gone.jsonl")), config())
    broken = tmp_path / "broken.jsonl"
    broken.write_text("\n" * 5000 + "{", encoding="utf-8")
    with pytest.raises(UserError):
        retraining.newest_version(policy(str(broken)), config())


def test_held_out_documents_are_refused_before_anything_is_trained_again(tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("one\n\ntwo", encoding="utf-8")
    (tmp_path / "rows.txt").write_text("three\n\nfour", encoding="utf-8")
    given = {"dataset": str(tmp_path / "rows.txt"), "evaluation_dataset": str(tmp_path / "held.txt")}
    with pytest.raises(UserError, match="these are plain texts; champion and challenger are compared by their answers"):
        retraining.resolve_policy("lights", given)


def test_rows_of_documents_are_no_conversations_that_were_held_out() -> None:
    told = [b'{"line": 1, "text": "a"}', b'{"line": 9, "text": "a", "extra": {"b": 1}}', b'{"line": 1, "text": "b"}']
    first, again, other = map(retraining._row_key, told)
    assert first == again != other


def test_the_half_line_of_a_killed_process_is_no_outcome_and_no_obstacle() -> None:
    first = RetrainOutcome(line="lights", result="skipped", reason="nothing is new")
    second = RetrainOutcome(line="lights", result="refused", reason="worse")
    retraining._append(first)
    path = retraining.line_folder("lights") / "history.jsonl"
    with path.open("ab") as file:
        file.write(second.model_dump_json().encode()[:40])
    assert retraining.read_history("lights") == [first]
    retraining._append(second)
    assert retraining.read_history("lights") == [first, second]


def test_one_process_at_a_time_holds_a_line() -> None:
    with (
        retraining.holding("lights") as first,
        retraining.holding("lights") as second,
        retraining.holding("x") as other,
    ):
        assert (first, second, other) == (True, False, True)
    with retraining.holding("lights") as again:
        assert again
