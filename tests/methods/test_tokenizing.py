"""Rows for training: what is kept, what is cut, what is refused, in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from methods.contract import Refused
from methods.toolkit import chat, tokenizing
from methods.toolkit.chat_template import PLAIN_TEMPLATE
from methods.toolkit.tokenizing import Limits, Turns, tokenise

LONG = "switch the light in the kitchen on and off " * 5


@pytest.fixture
def tokenizer(tiny_model: Path) -> Any:
    return chat.load_tokenizer(str(tiny_model))[0]


def write_rows(folder: Path, *pairs: tuple[str, str]) -> Path:
    path = folder / "rows.jsonl"
    rows = [
        {"line": 10 * number, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for number, (q, a) in enumerate(pairs, start=1)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lengths(tokenizer: Any, question: str, answer: str) -> tuple[int, int]:
    """Tokens of prompt and answer."""
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    rendered = chat.render_conversation(tokenizer, messages)
    return rendered.prompt_length, len(rendered.input_ids) - rendered.prompt_length


def test_every_row_is_kept_and_counted_when_nothing_is_over(tokenizer: Any, tiny_rows: Path) -> None:
    rows, report = tokenise(tokenizer, tiny_rows, Limits(1024, None, None, "error"), -1)
    assert (report.read, report.kept, len(rows)) == (21, 21, 21)
    assert report.tokens == sum(map(len, rows["input_ids"])) == sum(rows["length"])
    assert report.supervised_tokens == sum(label != -100 for labels in rows["labels"] for label in labels)
    assert report.longest == max(rows["length"])
    assert report.as_dict()["supervised_share"] == pytest.approx(report.supervised_tokens / report.tokens)
    assert all(labels[-1] == tokenizer.eos_token_id for labels in rows["labels"])


def test_max_samples_takes_the_first_rows(tokenizer: Any, tiny_rows: Path) -> None:
    rows, report = tokenise(tokenizer, tiny_rows, Limits(1024, None, None, "error"), 3)
    every, _ = tokenise(tokenizer, tiny_rows, Limits(1024, None, None, "error"), -1)
    assert report.read == 3
    assert rows["input_ids"] == every["input_ids"][:3]


@pytest.mark.parametrize("limit", ["sequence", "prompt", "answer"])
def test_a_row_over_each_limit_is_dropped_with_its_line_and_counted(tokenizer: Any, tmp_path: Path, limit: str) -> None:
    long = ("on", LONG) if limit == "answer" else (LONG, "on")
    path = write_rows(tmp_path, ("on", "on"), long)
    limits = Limits(1024, None, None, "drop")
    setattr(limits, limit, 40)
    rows, report = tokenise(tokenizer, path, limits, -1)
    assert (len(rows), report.read, report.kept, report.dropped_over_length) == (1, 2, 1, 1)
    names = {"sequence": "max_seq_length", "prompt": "max_input_length", "answer": "max_content_length"}
    assert report.notes[0].startswith("line 20 dropped: ")
    assert f"{names[limit]} is 40" in report.notes[0]
    limits.over_length = "error"
    with pytest.raises(Refused, match=f"line 20: .*{names[limit]} is 40"):
        tokenise(tokenizer, path, limits, -1)


def test_a_limit_is_reached_exactly_without_being_over(tokenizer: Any, tmp_path: Path) -> None:
    prompt, answer = lengths(tokenizer, "switch", "it is on")
    path = write_rows(tmp_path, ("switch", "it is on"))
    _, report = tokenise(tokenizer, path, Limits(prompt + answer, prompt, answer, "error"), -1)
    assert report.kept == 1
    for limits in ((prompt + answer - 1, None, None), (999, prompt - 1, None), (999, None, answer - 1)):
        with pytest.raises(Refused):
            tokenise(tokenizer, path, Limits(*limits, "error"), -1)


def test_truncation_cuts_the_question_and_keeps_template_and_answer(tokenizer: Any, tmp_path: Path) -> None:
    prompt, answer = lengths(tokenizer, LONG, "it is on")
    rows, report = tokenise(tokenizer, write_rows(tmp_path, (LONG, "it is on")), Limits(60, None, None, "truncate"), -1)
    text = tokenizer.decode(rows["input_ids"][0])
    assert rows["length"][0] <= 60
    assert text.startswith("<|im_start|>user\nswitch the light")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\nit is on<|im_end|>")
    assert (report.truncated, report.tokens_cut) == (1, prompt + answer - rows["length"][0])


def test_a_cut_answer_loses_its_end_token_so_that_the_model_does_not_learn_to_stop(
    tokenizer: Any, tmp_path: Path
) -> None:
    path = write_rows(tmp_path, ("on", LONG))
    for limits in (Limits(40, None, None, "truncate"), Limits(1024, None, 20, "truncate")):
        rows, report = tokenise(tokenizer, path, limits, -1)
        assert report.truncated == 1
        assert tokenizer.eos_token_id not in [label for label in rows["labels"][0] if label != -100]
    assert report.supervised_tokens == 20


def test_truncation_keeps_to_max_input_length_or_drops_the_row(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path, (LONG, "it is on"), ("on", "on"))
    rows, report = tokenise(tokenizer, path, Limits(1024, 40, None, "truncate"), -1)
    assert lengths(tokenizer, LONG, "it is on")[0] > 40
    assert [ids.index(-100) for ids in rows["labels"]] == [0, 0]
    assert all(sum(label == -100 for label in labels) <= 40 for labels in rows["labels"])
    assert report.truncated == 1
    empty = lengths(tokenizer, "", "on")[0]
    with pytest.raises(Refused, match=f"max_input_length is {empty - 1} even without its question"):
        tokenise(tokenizer, path, Limits(1024, empty - 1, None, "truncate"), -1)


def test_a_conversation_that_the_template_rewrites_becomes_a_row_for_each_answer(
    tokenizer: Any, tiny_rows: Path
) -> None:
    tokenizer.chat_template = "{{ messages | length }}" + PLAIN_TEMPLATE
    free = Limits(1024, None, None, "drop")
    rows, report = tokenise(tokenizer, tiny_rows, free, -1)
    assert (report.read, report.split, report.added) == (21, 1, 1)
    assert (report.kept, report.lost, report.not_renderable) == (22, 0, 0)
    assert "1 conversations became a row for each answer" in report.in_words()
    last, report = tokenise(tokenizer, tiny_rows, free, -1, Turns(rewritten="last"))
    assert (report.kept, report.split, report.added, report.answers_untrained) == (21, 1, 0, 1)
    found = {tuple(row) for row in last["input_ids"]}
    assert found < {tuple(row) for row in rows["input_ids"]}


def test_a_row_that_the_template_refuses_is_counted_and_named(tokenizer: Any, tmp_path: Path) -> None:
    path = write_rows(tmp_path, ("refuse me", "on"), ("switch", "on"))
    tokenizer.chat_template = "{% if 'refuse' in messages[0].content %}{{ messages + 1 }}{% endif %}" + PLAIN_TEMPLATE
    _, report = tokenise(tokenizer, path, Limits(1024, None, None, "drop"), -1)
    assert (report.kept, report.not_renderable) == (1, 1)
    assert "line 10: the chat template refuses the conversation" in report.notes[0]


def test_only_the_answers_that_are_to_be_trained_have_labels(tokenizer: Any, tmp_path: Path) -> None:
    talk = [
        {"role": "user", "content": "lamp"},
        {"role": "assistant", "content": "first"},
        {"role": "user", "content": "fan"},
        {"role": "assistant", "content": "second", "weight": 0},
        {"role": "user", "content": "heater"},
        {"role": "assistant", "content": "third"},
    ]
    path = tmp_path / "weights.jsonl"
    path.write_text(json.dumps({"line": 1, "messages": talk}) + "\n")
    free = Limits(1024, None, None, "drop")

    def trained(turns: Turns) -> str:
        rows, report = tokenise(tokenizer, path, free, -1, turns)
        assert report.answers_untrained == (1 if turns.train_on == "all" else 2)
        return str(tokenizer.decode([label for label in rows["labels"][0] if label != chat.IGNORED]))

    assert trained(Turns()) == "first<|im_end|>third<|im_end|>"
    assert trained(Turns(train_on="last")) == "third<|im_end|>"


def test_a_dataset_without_a_token_to_train_on_is_refused_with_the_counts(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="of 1 rows 1 are over a length limit"):
        tokenise(tokenizer, write_rows(tmp_path, (LONG, "on")), Limits(20, None, None, "drop"), -1)
    with pytest.raises(Refused, match="the dataset has no rows"):
        tokenise(tokenizer, write_rows(tmp_path), Limits(20, None, None, "drop"), -1)
    system = [{"role": "system", "content": LONG}, {"role": "user", "content": "on"}]
    path = tmp_path / "long_system.jsonl"
    path.write_text(json.dumps({"line": 1, "messages": [*system, {"role": "assistant", "content": "on"}]}) + "\n")
    with pytest.raises(Refused, match="1 have no answer token left"):
        tokenise(tokenizer, path, Limits(40, None, None, "truncate"), -1)


def test_messages_are_read_with_the_line_of_their_source(tmp_path: Path) -> None:
    path = write_rows(tmp_path, ("a", "b"), ("c\u2028d", "e"))
    assert [line for line, _ in tokenizing.read_messages(path, -1)] == [10, 20]
    assert [m[0]["content"] for _, m in tokenizing.read_messages(path, -1)] == ["a", "c\u2028d"]
