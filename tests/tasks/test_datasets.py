"""Datasets are read, refused, stored and split as told, on real files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from configs.datasets import Columns, DatasetReport, Problem
from configs.errors import UserError
from configs.settings import PROJECT_ROOT
from tasks.dataset_conversion import Row, read_rows
from tasks.dataset_images import ImageFolder
from tasks.dataset_reading import MAX_ROW_BYTES
from tasks.dataset_sources import open_source
from tasks.datasets import (
    add_dataset,
    check_dataset,
    find_dataset,
    list_datasets,
    resolve_dataset,
    write_split,
)

QUESTION = Columns(prompt="question", completion="answer")
GOOD = {"prompt": "2+2?", "completion": "4"}
SHARED = Path(os.environ.get("TUNELINE_SHARED_DATA", PROJECT_ROOT.parent / "shared" / "data"))
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the shared data is not at {SHARED}")


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def write_rows(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def items_of(path: Path, columns: Columns | None = None) -> list[Row | Problem]:
    with open_source(path) as source:
        return list(read_rows(source, ImageFolder(source.root), columns))


def messages_of(path: Path, columns: Columns | None = None) -> list[list[tuple[str, str]]]:
    rows = []
    for item in items_of(path, columns):
        assert not isinstance(item, Problem), item
        rows.append([(message["role"], message["content"]) for message in item.body["messages"]])
    return rows


def only_problem(report: DatasetReport, kind: str) -> Problem:
    assert not report.ok
    assert [problem.kind for problem in report.problems] == [kind]
    return report.problems[0]


def stored_files(home: Path) -> list[Path]:
    return [path for path in home.rglob("*") if path.is_file()]


# Shapes


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"question": "a", "answer": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "response": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"query": "a", "response": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": "i", "output": "b"}, [("user", "a\n\ni"), ("assistant", "b")]),
        ({"instruction": "a", "input": " ", "output": "b"}, [("user", "a"), ("assistant", "b")]),
        ({"instruction": "a", "input": None, "output": "b"}, [("user", "a"), ("assistant", "b")]),
        (
            {"instruction": "a", "output": "b", "system": "s", "history": [["q1", "a1"], ["q2", "a2"]]},
            [
                ("system", "s"),
                *[("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")],
                *[("user", "a"), ("assistant", "b")],
            ],
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": " b\n"}]},
            [("user", "a"), ("assistant", " b\n")],
        ),
        (
            {
                "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}],
                "system": "s",
            },
            [("system", "s"), ("user", "a"), ("assistant", "b")],
        ),
    ],
)
def test_shape_is_recognised_and_becomes_messages(
    tmp_path: Path, row: dict[str, object], expected: list[tuple[str, str]]
) -> None:
    assert messages_of(write_rows(tmp_path / "data.jsonl", row)) == [expected]
    array = tmp_path / "data.json"
    array.write_text(json.dumps([row], indent=1), encoding="utf-8")
    assert messages_of(array) == [expected]


def test_named_columns_are_read_among_others(tmp_path: Path) -> None:
    row = {"问题": "你好", "回答": "您好", "prompt": "x", "completion": "y"}
    path = write_rows(tmp_path / "data.jsonl", row)
    assert messages_of(path, Columns(prompt="问题", completion="回答")) == [[("user", "你好"), ("assistant", "您好")]]


def test_one_named_column_finds_the_other_by_its_usual_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", {"ask": "a", "answer": "b"})
    assert messages_of(path, Columns(prompt="ask")) == [[("user", "a"), ("assistant", "b")]]


def test_naming_the_alpaca_columns_does_not_lose_the_input(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", {"instruction": "a", "input": "i", "output": "b"})
    columns = Columns(prompt="instruction", completion="output")
    assert messages_of(path, columns)[0][0] == ("user", "a\n\ni")


def test_rows_that_fit_two_shapes_are_not_guessed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", {"prompt": "a", "completion": "b", "question": "c", "answer": "d"})
    with pytest.raises(UserError, match=r"more than one way.*prompt/completion.*question/answer"):
        check_dataset(path)
    assert messages_of(path, QUESTION) == [[("user", "c"), ("assistant", "d")]]


def test_unknown_shape_lists_the_columns(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", {"text": "a", "label": 1})
    with pytest.raises(UserError, match=r"not recognised; their columns are: text, label"):
        check_dataset(path)


def test_columns_of_one_name_or_for_another_shape_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="both name the column 'text'"):
        Columns(prompt="text", completion="text")
    with pytest.raises(UserError, match="columns of their own"):
        check_dataset(write_rows(tmp_path / "data.jsonl", GOOD), QUESTION, "messages")


def test_small_scalars_are_kept_as_extra_and_the_rest_is_reported(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a", "name": "Ann"}, {"role": "assistant", "content": "b"}]
    row = {"messages": turns, "id": 7, "score": 0.5, "tags": ["x"], "long": "y" * 5000, "none": None}
    version = add_dataset(write_rows(tmp_path / "data.jsonl", row))
    stored = json.loads(version.path.read_text(encoding="utf-8"))
    assert stored["extra"] == {"id": 7, "score": 0.5, "none": None}
    assert version.report.extra_kept == {"id": 1, "score": 1, "none": 1}
    assert version.report.extra_dropped == {"messages[].name": 1, "tags": 1, "long": 1}


# Bad rows: counted, located, explained


CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


@pytest.mark.parametrize(
    ("good", "bad", "kind", "field", "words"),
    [
        (
            GOOD,
            {"prompt": "a", "completoin": "b"},
            "missing_column",
            "completion",
            "did you mean 'completoin'",
        ),
        (GOOD, {"prompt": "a", "completion": 4}, "wrong_type", "completion", "the number 4 where text"),
        (GOOD, {"prompt": None, "completion": "b"}, "wrong_type", "prompt", "null where text"),
        (GOOD, {"prompt": ["a"], "completion": "b"}, "wrong_type", "prompt", "a list of 1 where text"),
        (GOOD, {"prompt": "a", "completion": " \n"}, "empty_answer", "completion", "answer is empty"),
        (GOOD, {"prompt": "", "completion": "b"}, "empty_prompt", "prompt", "prompt is empty"),
        (GOOD, [1, 2], "not_an_object", None, "a list of 2, not an object"),
        (GOOD, "text", "not_an_object", None, "not an object"),
        (GOOD, {"messages": CONVERSATION}, "other_shape", "prompt", "shape messages"),
        (
            GOOD,
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "preference_pairs",
            "chosen, rejected",
            "the row is a preference pair, the file's first rows are conversations",
        ),
        (GOOD, {**GOOD, "images": ["a.jpg"]}, "vision_language", "images", "vision-language data"),
        (GOOD, {"prompt": "a\ud83d", "completion": "b"}, "broken_text", "prompt", "surrogate"),
        ({"messages": CONVERSATION}, {"messages": []}, "empty_messages", "messages", "is empty"),
        ({"messages": CONVERSATION}, {"messages": "a"}, "wrong_type", "messages", "a list of messages"),
        ({"messages": CONVERSATION}, {"messages": ["a"]}, "wrong_type", "messages[0]", "role and content"),
        (
            {"messages": CONVERSATION},
            {"messages": CONVERSATION[:1]},
            "last_not_assistant",
            "messages[0].content",
            "no answer to learn",
        ),
        (
            {"messages": CONVERSATION},
            {"messages": CONVERSATION[1:]},
            "no_user_message",
            "messages[0].content",
            "no prompt",
        ),
        (
            {"messages": CONVERSATION},
            {"messages": [{"role": "asistant", "content": "b"}]},
            "unknown_role",
            "messages[0].role",
            "did you mean 'assistant'",
        ),
        (
            {"messages": CONVERSATION},
            {"messages": [*CONVERSATION, {"role": "system", "content": "s"}, *CONVERSATION]},
            "system_not_first",
            "messages[2].content",
            "only the first",
        ),
        (
            {"messages": CONVERSATION},
            {"messages": [{"role": "user", "text": "a"}]},
            "missing_key",
            "messages[0].content",
            "it has: role, text",
        ),
        (
            {"messages": CONVERSATION},
            {"messages": [CONVERSATION[0], {"role": "assistant", "content": None, "tool_calls": [{}]}]},
            "wrong_type",
            "messages[1].tool_calls",
            "a call with a name and its arguments",
        ),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {
                "conversations": [{"from": "human", "value": " "}, {"from": "gpt", "value": "b"}],
                "system": "s",
            },
            "empty_prompt",
            "conversations[0].value",
            "prompt is empty",
        ),
        (
            {"instruction": "a", "output": "b"},
            {"instruction": "a", "output": "b", "history": [["only one"]]},
            "wrong_type",
            "history[0]",
            "a pair",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_bad_row_is_one_problem_with_its_place(
    tmp_path: Path, good: object, bad: object, kind: str, field: str | None, words: str, suffix: str
) -> None:
    path = tmp_path / f"data.{suffix}"
    lines = [json.dumps(row) for row in (good, bad, good)]
    path.write_text("\n".join(lines) if suffix == "jsonl" else "[\n" + ",\n".join(lines) + "]")
    report = check_dataset(path)
    problem = only_problem(report, kind)
    assert (problem.line, problem.row, problem.field) == (2 if suffix == "jsonl" else 3, 2, field)
    assert words in problem.message
    assert problem.expected
    assert problem.mend
    assert (report.rows_read, report.rows_kept, report.refused) == (3, 2, {kind: 1})


@pytest.mark.parametrize(
    ("line", "kind", "words"),
    [
        (b'{"prompt": "a", "completion": }', "invalid_json", "column 31"),
        (b'{"prompt": "a", "completion": "b"', "invalid_json", "column 34"),
        (b'{"prompt": "a", "completion": "b"} {}', "invalid_json", "Extra data"),
        (b'{"prompt": "a", "completion": NaN}', "invalid_json", "NaN is not JSON"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "invalid_json", "invalid JSON"),
        (b'{"prompt": ' + b"[" * 100_000 + b"}", "invalid_json", "nested too deeply"),
        (b'{"prompt": "a", "completion": "b", "prompt": "c"}', "duplicate_key", "'prompt' is given twice"),
        (b'{"prompt": "caf\xe9", "completion": "b"}', "wrong_encoding", "byte 0xe9 at offset 53"),
    ],
)
def test_broken_line_is_refused_and_the_next_is_read(tmp_path: Path, line: bytes, kind: str, words: str) -> None:
    path = tmp_path / "data.jsonl"
    good = json.dumps(GOOD).encode()
    assert len(good) == 37
    path.write_bytes(b"\n".join([good, line, good]))
    report = check_dataset(path)
    problem = only_problem(report, kind)
    assert problem.line == 2
    assert words in problem.message
    assert report.rows_kept == 2
    assert report.complete


@pytest.mark.parametrize(
    ("text", "kind", "line", "row", "words"),
    [
        (b'[{"prompt":"a","completion":"b"},\n{"prompt": x}]', "invalid_json", 2, 2, "'x' at column 12"),
        (b'[{"prompt":"a","completion":"b"},\n{"prompt": "c"', "invalid_json", 2, 2, "Incomplete"),
        (b'[{"prompt":"a","completion":"b"},]', "invalid_json", 1, 2, "']' at column 34"),
        (b'[{"prompt":"a","completion":"b"}]\n{}', "invalid_json", 2, 2, "Additional data"),
        (b'[{"prompt":"a","completion":"b"},\n"\xff"]', "wrong_encoding", 2, 2, "byte 0xff at offset 35"),
    ],
)
def test_broken_array_stops_there_and_says_so(
    tmp_path: Path, text: bytes, kind: str, line: int, row: int, words: str
) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(text)
    report = check_dataset(path)
    problem = only_problem(report, kind)
    assert (problem.level, problem.line, problem.row) == ("fatal", line, row)
    assert words in problem.message
    assert not report.complete
    assert report.rows_kept == 1
    with pytest.raises(UserError, match="rest of the file could not be read"):
        add_dataset(path, allow_refused=True)


def test_key_given_twice_in_an_array_is_refused_and_the_rest_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[{"prompt":"a","completion":"b","prompt":"c"},\n{"prompt":"a","completion":"b"}]')
    report = check_dataset(path)
    assert only_problem(report, "duplicate_key").row == 1
    assert report.rows_kept == 1


def test_escaped_surrogate_pair_survives_and_half_of_one_is_refused_in_an_array(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(
        r'[{"prompt":"\ud83d\ude00","completion":"b"},{"prompt":"\ud83d","completion":"b"}]', encoding="utf-8"
    )
    items = items_of(path)
    assert not isinstance(items[0], Problem)
    assert items[0].body["messages"][0]["content"] == "😀"
    assert isinstance(items[1], Problem)
    assert items[1].kind == "broken_text"


def test_huge_line_is_refused_with_its_size_and_the_next_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    huge = json.dumps({"prompt": "a", "completion": "b" * (MAX_ROW_BYTES + 1000)})
    path.write_text(f"{huge}\n{json.dumps(GOOD)}\n")
    report = check_dataset(path)
    problem = only_problem(report, "row_too_long")
    assert (problem.line, problem.found) == (1, f"{len(huge) + 1:,} bytes")
    assert report.rows_kept == 1


def test_line_of_exactly_the_limit_is_read(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = json.dumps({"prompt": "a", "completion": ""})
    row = row.replace('""', '"' + "b" * (MAX_ROW_BYTES - len(row)) + '"')
    assert len(row) == MAX_ROW_BYTES
    path.write_text(row + "\n")
    assert check_dataset(path).ok


def test_huge_row_of_an_array_stops_the_reading(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, {"prompt": "a", "completion": "b" * (MAX_ROW_BYTES + 200_000)}, GOOD]))
    report = check_dataset(path)
    assert only_problem(report, "row_too_long").row == 2
    assert not report.complete


def test_blank_lines_are_skipped_and_counted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n\n  \n{json.dumps(GOOD)}\r\n")
    report = check_dataset(path)
    assert report.ok
    assert report.warnings == {"blank_line": 2}
    assert [problem.line for problem in report.problems] == [2, 3]
    version = add_dataset(path)
    assert [json.loads(line)["line"] for line in version.path.read_text().splitlines()] == [1, 4]


def test_problems_of_a_kind_are_counted_and_the_first_ones_told(tmp_path: Path) -> None:
    rows = [GOOD, *[{"prompt": "a", "completion": ""}] * 5, *[{"prompt": "a"}] * 2]
    report = check_dataset(write_rows(tmp_path / "data.jsonl", *rows))
    assert report.refused == {"empty_answer": 5, "missing_column": 2}
    assert [(p.kind, p.line, p.count) for p in report.problems] == [
        *[("empty_answer", line, 5) for line in (2, 3, 4)],
        *[("missing_column", line, 2) for line in (7, 8)],
    ]
    assert report.empty_answers == 5
    assert report.rows_refused == 7


def test_wrongly_named_column_names_the_nearest(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", {"question": "a", "answer": "b"})
    with pytest.raises(UserError, match=r"no column 'questoin' \(did you mean 'question'\?\).*question, answer"):
        add_dataset(path, columns=Columns(prompt="questoin", completion="answer"))
    with pytest.raises(UserError, match=r"no column 'questoin' \(did you mean 'question'\?\)"):
        add_dataset(path, columns=Columns(prompt="questoin"))


def test_statistics_and_duplicates_are_exact(tmp_path: Path) -> None:
    rows = [{"prompt": "p" * size, "completion": "c"} for size in range(1, 101)]
    report = check_dataset(write_rows(tmp_path / "data.jsonl", *rows, {**rows[4], "id": 3}, rows[4]))
    assert report.duplicate_rows == 2
    assert report.prompt_characters is not None
    assert report.prompt_characters.model_dump() == {
        "min": 1,
        "mean": 49.61,
        "p50": 49,
        "p95": 95,
        "max": 100,
    }
    assert report.columns_seen == {"prompt": 102, "completion": 102, "id": 1}


# Bad files


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.jsonl", b"", "is empty"),
        ("data.jsonl", b"\n \n\r\n", "only blank lines"),
        ("data.jsonl", "\ufeff\n".encode(), "only blank lines"),
        ("data.jsonl", '{"prompt": "a"}'.encode("utf-16"), "encoded in UTF-16"),
        ("data.jsonl", '{"prompt": "a"}'.encode("utf-16-le"), "encoded in UTF-16"),
        ("data.jsonl", '{"prompt": "a"}'.encode("utf-32"), "encoded in UTF-32"),
        ("data.csv", b"prompt\na\n", "no separator"),
        ("data.parquet", b"PAR1", "no Parquet file"),
        ("data.xlsx", b"PK", "no Excel file"),
        ("data.zip", b"PK", "archive is damaged"),
        ("data.xls", b"\xd0\xcf", "old Excel format is not read"),
        ("data.md", b"hello", "not JSON: it starts with the text 'h'"),
        ("data.txt", b"\n \n", "only blank lines"),
        ("data", b"\x80\x04", "not JSON"),
    ],
)
def test_unusable_file_is_told_with_a_way_to_mend_it(
    tmp_path: Path, home: Path, name: str, content: bytes, words: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for verb in (check_dataset, add_dataset):
        with pytest.raises(UserError, match=words) as caught:
            verb(path)
        assert caught.value.file == str(path)
        assert caught.value.mend or caught.value.expected
    assert not home.exists()


def test_missing_file_and_folder_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such dataset file"):
        check_dataset(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="no file of rows and no images"):
        check_dataset(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_unreadable_file_is_told(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", GOOD)
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read: Permission denied"):
        check_dataset(path)


def test_empty_array_cannot_be_added(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text("[]")
    assert not check_dataset(path).ok
    with pytest.raises(UserError, match="holds no rows"):
        add_dataset(path)


def test_byte_order_mark_is_skipped_and_noted(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    for content in (json.dumps(GOOD), json.dumps([GOOD])):
        path.write_text(content, encoding="utf-8-sig")
        report = check_dataset(path)
        assert report.ok
        assert "byte-order mark" in report.notes[0]


# Versions


def test_version_is_stored_read_only_and_named_by_its_content(tmp_path: Path, home: Path) -> None:
    version = add_dataset(write_rows(tmp_path / "My data (1).jsonl", GOOD, {"prompt": "问", "completion": "答"}))
    assert version.name == "My-data-1"
    assert version.digest == hashlib.sha256(version.path.read_bytes()).hexdigest()
    assert version.path == home / "datasets" / version.name / version.digest / "rows.jsonl"
    assert version.path.read_text(encoding="utf-8").splitlines()[1] == (
        '{"messages":[{"role":"user","content":"问"},{"role":"assistant","content":"答"}],"line":2}'
    )
    files = stored_files(home)
    assert sorted(file.name for file in files) == ["report.json", "rows.jsonl", "version.json"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o444}
    assert find_dataset(version.reference) == version


def test_rows_of_an_array_keep_their_row_number(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps([GOOD, GOOD]))
    stored = add_dataset(path).path.read_text().splitlines()
    assert [json.loads(line)["line"] for line in stored] == [1, 2]


def test_adding_the_same_rows_twice_is_one_version(tmp_path: Path, home: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", GOOD)
    first = add_dataset(path)
    assert add_dataset(path) == first
    assert len(list_datasets()) == 1
    assert len(stored_files(home)) == 3


def test_adding_the_same_rows_at_once_is_one_version(tmp_path: Path, home: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", *numbered(300))
    with ThreadPoolExecutor(8) as pool:
        versions = list(pool.map(add_dataset, [path] * 8))
    assert all(version == versions[0] for version in versions)
    assert len(stored_files(home)) == 3


def test_half_made_folder_of_a_killed_process_is_no_dataset(tmp_path: Path, home: Path) -> None:
    version = add_dataset(write_rows(tmp_path / "data.jsonl", GOOD))
    shutil.copytree(version.path.parent, home / "datasets" / ".adding-killed")
    assert list_datasets() == [version]


def test_name_finds_the_newest_and_a_digest_prefix_each(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    versions = [add_dataset(write_rows(path, {**GOOD, "id": number})) for number in range(3)]
    assert find_dataset("data") == versions[-1]
    assert [version.digest for version in list_datasets()] == [version.digest for version in versions]
    for version in versions:
        assert find_dataset(f"data@{version.digest[:12]}") == version
    with pytest.raises(UserError, match="no versions of the dataset 'data'"):
        find_dataset("data@ffffffffffffffff")


def test_digest_prefix_that_fits_several_versions_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    # Of 17 digests, two begin with the same of the 16 digits.
    versions = [add_dataset(write_rows(path, {**GOOD, "id": number})) for number in range(17)]
    digits = [version.digest[0] for version in versions]
    shared = next(digit for digit in digits if digits.count(digit) > 1)
    with pytest.raises(UserError, match=f"{digits.count(shared)} versions .* starts with '{shared}'"):
        find_dataset(f"data@{shared}")


def test_unknown_dataset_names_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tuneline datasets add FILE"):
        find_dataset("gsm8k")
    add_dataset(write_rows(tmp_path / "gsm8k_train.jsonl", GOOD))
    with pytest.raises(UserError, match="did you mean gsm8k_train"):
        find_dataset("gsm8k_trian")


@pytest.mark.parametrize("name", ["../x", "a/b", "..", ".hidden", "", "a b", "a@b", "x" * 61, "a\0b"])
def test_name_cannot_leave_the_store(tmp_path: Path, home: Path, name: str) -> None:
    path = write_rows(tmp_path / "data.jsonl", GOOD)
    with pytest.raises(UserError, match="no name for a dataset"):
        add_dataset(path, name)
    assert not home.exists()
    with pytest.raises(UserError):
        find_dataset(name)


def test_refused_rows_keep_a_file_out_unless_allowed(tmp_path: Path, home: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", GOOD, {"prompt": "a", "completion": 4}, {"prompt": "a"})
    with pytest.raises(UserError) as caught:
        add_dataset(path)
    error = caught.value
    assert "2 of 3 rows are refused (1 wrong type, 1 missing column)" in str(error)
    assert (error.line, error.field, error.expected) == (2, "completion", "text")
    assert f"tuneline datasets check {path}" in str(error.mend)
    assert stored_files(home) == []
    assert list((home / "datasets").iterdir()) == []
    version = add_dataset(path, allow_refused=True)
    assert (version.rows, version.report.rows_refused) == (1, 2)


def test_file_with_no_good_row_is_never_added(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.jsonl", {"prompt": "a", "completion": ""})
    with pytest.raises(UserError, match="answer is empty"):
        add_dataset(path, allow_refused=True)
    path.write_text("not json\n")
    with pytest.raises(UserError, match="invalid JSON"):
        add_dataset(path, allow_refused=True)


def test_reference_to_a_file_adds_it_and_to_a_name_finds_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_rows(tmp_path / "data.jsonl", {"q": "a", "a": "b"})
    version = resolve_dataset(str(path), Columns(prompt="q", completion="a"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    assert resolve_dataset("data") == version
    assert resolve_dataset(version.reference) == version
    for missing in ("none.jsonl", "./none", str(tmp_path / "none")):
        with pytest.raises(UserError, match="no such dataset file"):
            resolve_dataset(missing)
    with pytest.raises(UserError, match="there is no dataset"):
        resolve_dataset("x" * 300)


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("there is no mount command here")
    if done.returncode != 0:
        pytest.skip(f"a tiny disk cannot be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_is_told_and_leaves_nothing(tmp_path: Path, tiny_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(tiny_disk))
    rows = [{"prompt": f"{number}?", "completion": "x" * 100} for number in range(2000)]
    path = write_rows(tmp_path / "data.jsonl", *rows)
    with pytest.raises(UserError, match=r"disk is full: [\d,]+ bytes are free"):
        add_dataset(path)
    assert list((tiny_disk / "datasets").iterdir()) == []
    version = add_dataset(write_rows(path, *rows[:20]))
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    big = add_dataset(write_rows(path, *rows))
    with pytest.raises(UserError, match="disk is full"):
        write_split(big, 0.5, 0, tiny_disk / "train.jsonl", tiny_disk / "validation.jsonl")
    assert [file.name for file in tiny_disk.iterdir()] == ["datasets"]
    assert version.path.exists()


# Splits


def split_prompts(tmp_path: Path, rows: list[object], share: float, seed: int = 1) -> tuple[set[str], set[str]]:
    version = add_dataset(write_rows(tmp_path / "split.jsonl", *rows))
    paths = (tmp_path / "train.jsonl", tmp_path / "validation.jsonl")
    counts = write_split(version, share, seed, *paths)
    sides = []
    for path, count in zip(paths, counts, strict=True):
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) == count
        sides.append({json.loads(line)["messages"][0]["content"] for line in lines})
    assert sum(counts) == version.rows
    return sides[0], sides[1]


def numbered(count: int) -> list[object]:
    return [{"prompt": str(number), "completion": "x"} for number in range(count)]


def test_split_meets_the_share_and_stays_when_rows_are_added(tmp_path: Path) -> None:
    train, validation = split_prompts(tmp_path, numbered(2000), 0.1)
    assert 150 <= len(validation) <= 250
    assert not train & validation
    rows = numbered(2500)[::-1]
    more_train, more_validation = split_prompts(tmp_path, rows, 0.1)
    assert train < more_train
    assert validation < more_validation
    assert split_prompts(tmp_path, rows, 0.1, seed=2)[1] != more_validation


@pytest.mark.parametrize("share", [0.001, 0.999])
def test_split_leaves_no_side_empty(tmp_path: Path, share: float) -> None:
    for count in (2, 3, 10):
        train, validation = split_prompts(tmp_path, numbered(count), share)
        assert train
        assert validation


def test_equal_rows_are_on_one_side(tmp_path: Path) -> None:
    for share in (0.001, 0.5, 0.999):
        train, validation = split_prompts(tmp_path, numbered(10) * 3, share)
        assert not train & validation


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_impossible_share_is_refused(tmp_path: Path, share: float) -> None:
    with pytest.raises(UserError, match="share is impossible"):
        split_prompts(tmp_path, numbered(5), share)


def test_rows_that_are_all_equal_cannot_be_split(tmp_path: Path) -> None:
    for rows in ([GOOD], [GOOD, GOOD]):
        with pytest.raises(UserError, match="no two different rows"):
            split_prompts(tmp_path, list(rows), 0.5)
    assert not (tmp_path / "train.jsonl").exists()


# Memory


MEASURE = """
import re, resource, sys
from pathlib import Path
from tasks.datasets import add_dataset, write_split
import ijson.backends.python

def peak():
    status = Path("/proc/self/status")
    if status.exists():  # unlike ru_maxrss, not inherited from the process that started this one
        return int(re.search(r"VmHWM:\\s+(\\d+)", status.read_text())[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = peak()
version = add_dataset(sys.argv[1])
write_split(version, 0.1, 0, Path(sys.argv[1] + ".train"), Path(sys.argv[1] + ".validation"))
print(version.rows, peak() - before)
"""


@pytest.mark.parametrize(("suffix", "rows"), [("jsonl", 60_000), ("json", 30_000)])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, suffix: str, rows: int) -> None:
    path = tmp_path / f"big.{suffix}"
    with path.open("w", encoding="utf-8") as file:
        file.write("[" if suffix == "json" else "")
        for number in range(rows):
            row = json.dumps({"prompt": f"{number} " + "p" * 400, "completion": "c" * (1 + number % 1100)})
            file.write(("," if suffix == "json" and number else "") + row + "\n")
        file.write("]" if suffix == "json" else "")
    size = path.stat().st_size
    command = [sys.executable, "-c", MEASURE, str(path)]
    done = subprocess.run(command, cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    kept, growth = map(int, done.stdout.split())
    print(f"{size / 1e6:.0f} MB, {kept} rows: peak memory grew by {growth / 1e6:.1f} MB")
    assert kept == rows
    assert growth < size / 4


def test_duplicates_are_found_beyond_what_is_held_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr("tasks.dataset_tally._KEYS_HELD", 50)
    rows = [{"prompt": str(number % 170), "completion": "x"} for number in range(230)]
    assert check_dataset(write_rows(tmp_path / "data.jsonl", *rows)).duplicate_rows == 60
    assert [file.name for file in tmp_path.iterdir()] == ["data.jsonl"]


# The real files


@needs_shared
def test_shared_files_are_read_where_they_lie() -> None:
    gsm8k = add_dataset(SHARED / "gsm8k_train_2000.jsonl", columns=QUESTION)
    assert (gsm8k.rows, gsm8k.shape, gsm8k.report.ok) == (2000, "prompt_completion", True)
    assert resolve_dataset(SHARED / "gsm8k_train_2000.jsonl") == gsm8k
    alpaca = add_dataset(SHARED / "alpaca_en_demo.json")
    assert (alpaca.rows, alpaca.shape, alpaca.report.duplicate_rows) == (999, "alpaca", 14)
    identity = add_dataset(SHARED / "identity.json")
    assert (identity.rows, identity.shape) == (91, "alpaca")


@needs_shared
def test_all_shared_files_are_recognised_and_stored() -> None:
    kinds = {}
    for path in sorted(SHARED.glob("*.json*")):
        version = add_dataset(path)
        assert version.report.ok, path
        kinds[path.name] = version.kind
    assert {name: kinds[name] for name in ("dpo_en_demo.json", "mllm_demo.json", "gsm8k_train_2000.jsonl")} == {
        "dpo_en_demo.json": "preference",
        "mllm_demo.json": "vision",
        "gsm8k_train_2000.jsonl": "chat",
    }
    vision = find_dataset("mllm_demo")
    shown = [json.loads(line)["images"] for line in vision.path.read_text(encoding="utf-8").splitlines()]
    assert len(shown) == 6
    assert all((vision.path.parent / image).is_file() for images in shown for image in images)
    assert vision.report.images == 3
