"""The report of a dataset: overlap, scripts, exact prompts, token lengths, and the pages that show them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from configs.datasets import DatasetReport, DatasetVersion
from configs.errors import UserError
from methods.toolkit.chat import load_tokenizer, render_conversation
from tasks.dataset_report import as_html, as_markdown, write_report
from tasks.dataset_tokens import RowSample
from tasks.datasets import add_dataset, check_dataset, describe_datasets, describe_version
from tests.tiny_models import make_tiny_chat_model


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return "tiny", make_tiny_chat_model(tmp_path_factory.mktemp("model") / "tiny", seed=1)


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


# Overlap


def test_rows_and_prompts_of_another_dataset_are_found(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "a.jsonl", *(pair(str(number), "x") for number in range(10)))
    other = write_lines(tmp_path / "b.jsonl", pair("3", "x"), pair("5", "y"), pair("99", "x"))
    version = add_dataset(other)
    for against in (other, version.reference):
        overlap = check_dataset(train, against=against).overlap
        assert overlap is not None
        assert (overlap.dataset, overlap.rows, overlap.prompts, overlap.lines) == (str(against), 1, 2, [4, 6])
    apart = check_dataset(train, against=write_lines(tmp_path / "c.jsonl", pair("99", "x"))).overlap
    assert apart is not None
    assert (apart.rows, apart.prompts, apart.lines) == (0, 0, [])


def test_preference_pair_and_conversation_share_their_prompt(tmp_path: Path) -> None:
    pairs = write_lines(tmp_path / "a.jsonl", {"prompt": "灯?", "chosen": "开", "rejected": "关"})
    overlap = check_dataset(pairs, against=write_lines(tmp_path / "b.jsonl", pair("灯?", "开"))).overlap
    assert overlap is not None
    assert (overlap.rows, overlap.prompts) == (0, 1)


def test_training_rows_that_are_evaluated_on_are_warned_of(tmp_path: Path) -> None:
    rows = [pair(str(number), "x") for number in range(10)]
    versions = {
        "dataset": add_dataset(write_lines(tmp_path / "a.jsonl", *rows)),
        "validation_dataset": add_dataset(write_lines(tmp_path / "b.jsonl", *rows[:5])),
        "evaluation_dataset": add_dataset(write_lines(tmp_path / "c.jsonl", *rows[7:])),
    }
    reports, warnings = describe_datasets(versions, None, None)
    overlap = reports["dataset"].overlap
    assert overlap is not None
    assert overlap.lines == [8, 9, 10]
    assert len(warnings) == 1
    assert "3 of 10 rows ask what a row of c@" in warnings[0]
    versions["evaluation_dataset"] = add_dataset(write_lines(tmp_path / "d.jsonl", pair("new", "x")))
    assert describe_datasets(versions, None, None)[1] == []


# Scripts


@pytest.mark.parametrize(
    ("prompt", "script"),
    [
        ("打开 the light", "han"),
        ("客厅的灯 {room: kitchen, on: 1}", "han"),
        ("the word 灯 means light", "latin"),
        ("電気をつけてください", "kana"),
        ("불을 켜세요", "hangul"),
        ("включи свет", "cyrillic"),
        ("2 + 2 = 4", "none"),
    ],
)
def test_script_of_a_row_is_told(tmp_path: Path, prompt: str, script: str) -> None:
    report = check_dataset(write_lines(tmp_path / "a.jsonl", pair(prompt, "1"), pair(prompt, "2")))
    assert report.scripts == {script: 2}


# Lengths


def test_lengths_of_each_field_are_counted_in_bins(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * size, "chosen": "ab", "rejected": "c"} for size in (1, 2, 3, 4, 5, 9)]
    fields = check_dataset(write_lines(tmp_path / "a.jsonl", *rows)).fields
    assert list(fields) == ["prompt", "chosen", "rejected"]
    assert [(bar.upto, bar.rows) for bar in fields["prompt"].histogram] == [(1, 1), (2, 1), (4, 2), (8, 1), (16, 1)]
    assert fields["chosen"].characters.model_dump() == {"min": 2, "mean": 2.0, "p50": 2, "p95": 2, "max": 2}


# Prompts and tokens


def shown(report: DatasetReport) -> list[list[tuple[str, bool]]]:
    assert report.tokens is not None
    return [[(part.text, part.trained) for part in example.parts] for example in report.tokens.examples]


def test_prompt_is_exactly_what_training_reads(tmp_path: Path, base: tuple[str, Path]) -> None:
    talk = [
        {"role": "user", "content": "打开灯"},
        {"role": "assistant", "content": "好"},
        {"role": "user", "content": "off"},
        {"role": "assistant", "content": "off <now>"},
    ]
    report = check_dataset(write_lines(tmp_path / "a.jsonl", {"messages": talk}), base=base)
    assert shown(report) == [
        [
            ("<|im_start|>user\n打开灯<|im_end|>\n<|im_start|>assistant\n", False),
            ("好<|im_end|>", True),
            ("\n<|im_start|>user\noff<|im_end|>\n<|im_start|>assistant\n", False),
            ("off <now><|im_end|>", True),
        ]
    ]
    tokens = report.tokens
    assert tokens is not None
    rendered = render_conversation(load_tokenizer(str(base[1]))[0], talk)
    assert tokens.tokens is not None
    assert tokens.trained_tokens is not None
    assert tokens.examples[0].tokens == tokens.tokens.max == len(rendered.input_ids)
    assert tokens.trained_tokens.max == rendered.supervised
    assert (tokens.model, tokens.rows, tokens.of_rows) == ("tiny", 1, 1)


def test_only_the_better_answer_is_marked_as_trained(tmp_path: Path, base: tuple[str, Path]) -> None:
    asked = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ]
    rows = write_lines(tmp_path / "a.jsonl", {"prompt": asked, "chosen": "good", "rejected": "bad"})
    report = check_dataset(rows, base=base)
    head = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    head += "<|im_start|>assistant\n"
    assert shown(report) == [[(head, False), ("good<|im_end|>", True)], [(f"{head}bad<|im_end|>", False)]]
    assert report.tokens is not None
    assert [example.label for example in report.tokens.examples] == ["chosen", "rejected"]
    ranked = write_lines(tmp_path / "b.jsonl", {"prompt": "a", "answers": ["bad", "good"], "scores": [0, 2]})
    start = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    expected = [[(f"{start}bad<|im_end|>", False)], [(start, False), ("good<|im_end|>", True)]]
    assert shown(check_dataset(ranked, base=base)) == expected


def test_tools_are_part_of_the_prompt(tmp_path: Path, base: tuple[str, Path]) -> None:
    folder = make_tiny_chat_model(tmp_path / "tools", seed=1)
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ tools[0].function.name }}\n" + template, encoding="utf-8")
    row = {
        "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
        "tools": [{"name": "weather"}],
    }
    report = check_dataset(write_lines(tmp_path / "a.jsonl", row), base=("tools", folder))
    text, trained = (part[0] for part in shown(report)[0])
    assert "weather" in text
    assert trained.startswith("b<|im_end|>")


def test_texts_of_pairs_are_measured_each(tmp_path: Path, base: tuple[str, Path]) -> None:
    report = check_dataset(write_lines(tmp_path / "a.jsonl", {"anchor": "a", "positive": "b c d"}), base=base)
    assert report.tokens is not None
    assert [(example.label, example.parts[0].text) for example in report.tokens.examples] == [
        ("anchor", "a"),
        ("positive", "b c d"),
    ]


def test_row_that_the_template_refuses_is_counted(tmp_path: Path) -> None:
    folder = make_tiny_chat_model(tmp_path / "strict", seed=1)
    strict = "{% if messages[0]['content'] == 'bad' %}{{ raise_exception('not this one') }}{% endif %}"
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(strict + template, encoding="utf-8")
    rows = [{"instruction": "bad", "output": "b"}, {"instruction": "a", "output": "b"}]
    tokens = check_dataset(write_lines(tmp_path / "a.jsonl", *rows), base=("strict", folder)).tokens
    assert tokens is not None
    assert tokens.not_renderable == {"the chat template refuses the conversation: not this one": 1}
    assert [example.line for example in tokens.examples] == [2]


def test_model_without_a_tokenizer_is_told(tmp_path: Path) -> None:
    (tmp_path / "bare").mkdir()
    path = write_lines(tmp_path / "a.jsonl", pair("a", "b"))
    with pytest.raises(UserError, match="the prompts cannot be rendered with the tokenizer of bare: ") as caught:
        check_dataset(path, base=("bare", tmp_path / "bare"))
    assert caught.value.field == "model"
    version = add_dataset(path)
    reports, warnings = describe_datasets({"dataset": version}, "bare", tmp_path / "bare")
    assert reports["dataset"].tokens is None
    assert len(warnings) == 1


def test_sample_is_of_the_content_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.dataset_tokens.MAX_ROWS", 100)
    rows = [json.dumps({"messages": str(number)}).encode() for number in range(5000)]
    samples = []
    for order in (rows, [*rows[:3], *rows[:2:-1]]):
        sample = RowSample()
        for row in order:
            sample.take(row)
        assert sample.seen == 5000
        samples.append(sample.rows())
    assert samples[0][:3] == rows[:3]
    assert sorted(samples[0]) == sorted(samples[1])
    assert 40 <= len(samples[0]) <= 100
    assert max(rows.index(row) for row in samples[0]) > 4000


def test_huge_rows_do_not_fill_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.dataset_tokens.MAX_BYTES", 10_000)
    sample = RowSample()
    for number in range(200):
        sample.take(b"%d" % number + b"x" * 1000)
    assert sum(map(len, sample.rows()[3:])) <= 10_000


# Pages


HOSTILE = "</pre><script>alert(1)</script> | `x` *y* [z](javascript:a) ![i](http://h/p.png)\n# head"


@pytest.fixture
def version(tmp_path: Path) -> DatasetVersion:
    rows: list[dict[str, Any]] = [{**pair(HOSTILE, f"好{number}"), HOSTILE: 1} for number in range(4)]
    path = write_lines(tmp_path / "a.jsonl", *rows, pair(HOSTILE, ""))
    return add_dataset(path, allow_refused=True)


def test_page_needs_nothing_beside_it_and_shows_text_as_text(version: DatasetVersion, base: tuple[str, Path]) -> None:
    page = as_html(describe_version(version, version.reference, base), f"a {HOSTILE}")
    plain = as_html(version.report, version.reference)
    for tag in ("<script", "<a ", "<link", "<iframe", "http://h/p.png'"):
        assert tag not in page + plain
    assert "<mark>好0</mark>" in plain
    assert set(re.findall(r'src=[\'"]?(.{10})', page)) == {"data:image"}
    assert "&lt;script&gt;alert(1)" in page
    assert "<mark>好0&lt;|im_end|&gt;</mark>" in page
    assert "4 of 4 rows ask what a row of a@" in page
    assert "empty answer" in page


def test_markdown_shows_text_as_text(version: DatasetVersion, base: tuple[str, Path]) -> None:
    from markdown_it import MarkdownIt

    for report in (version.report, describe_version(version, version.reference, base)):
        page = MarkdownIt("commonmark", {"html": True}).enable("table").render(as_markdown(report, HOSTILE))
        assert "<script" not in page
        assert "<a " not in page
        assert set(re.findall(r'<img src="(.{10})', page)) <= {"data:image"}
        assert page.count("<h1>") == 1
        assert "line 5, completion" in page


def test_report_is_written_as_page_record_and_picture(
    version: DatasetVersion, base: tuple[str, Path], tmp_path: Path
) -> None:
    report = describe_version(version, None, base)
    files = write_report(tmp_path, "dataset", version.reference, report)
    names = ["dataset_report.json", "dataset_report.html", "dataset_report.md", "dataset_tokens.png"]
    assert [file.name for file in files] == names
    assert DatasetReport.model_validate_json(files[0].read_text(encoding="utf-8")) == report
    assert files[3].read_bytes().startswith(b"\x89PNG")
