"""Documents as datasets: from columns and .txt files, beside conversations, compared, mixed, split and reported."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow
import pyarrow.parquet
import pytest

from configs.datasets import Columns, DatasetVersion, Wanted
from configs.errors import UserError
from tasks.dataset_changes import compare_versions
from tasks.dataset_mixing import mix_datasets
from tasks.dataset_report import as_html, as_markdown
from tasks.datasets import add_dataset, check_dataset, write_split

pytestmark = pytest.mark.usefixtures("home")

PRETRAIN = Wanted("pretrain", ("text",))
SFT = Wanted("sft", ("chat",))


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def stored(version: DatasetVersion) -> list[dict[str, Any]]:
    return [json.loads(line) for line in version.path.read_text(encoding="utf-8").splitlines()]


def excel(path: Path) -> Path:
    book = openpyxl.Workbook()
    for cells in (["text"], ["文档"], ["b"]):
        book.active.append(cells)  # type: ignore[union-attr]
    book.save(path)
    return path


def parquet(path: Path) -> Path:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["文档", "b"], "url": ["x", "y"]}), path)
    return path


def written(text: str) -> Callable[[Path], Path]:
    def write(path: Path) -> Path:
        path.write_text(text, encoding="utf-8")
        return path

    return write


FILES: dict[str, Callable[[Path], Path]] = {
    "pangu.jsonl": lambda path: write_lines(path, {"text": "文档"}, {"text": "b"}),
    "content.jsonl": lambda path: write_lines(path, {"content": "文档", "title": "t"}, {"content": "b", "title": "u"}),
    "chinese.jsonl": lambda path: write_lines(path, {"文本": "文档"}, {"文本": "b"}),
    "array.json": written('[{"text": "文档"}, {"text": "b"}]'),
    "one_column.csv": written("text\n文档\nb\n"),
    "quoted.csv": written('"text"\n"文档"\n"b"\n'),
    "two_columns.csv": written("url,text\nx,文档\ny,b\n"),
    "table.xlsx": excel,
    "table.parquet": parquet,
    "prose.txt": written("文档\n\nb\n"),
    "json.txt": written('{"text": "文档"}\n{"text": "b"}\n'),
}


@pytest.mark.parametrize("name", FILES)
def test_documents_of_every_format_are_stored_alike(tmp_path: Path, name: str) -> None:
    version = add_dataset(FILES[name](tmp_path / name), wanted=PRETRAIN)
    assert (version.shape, version.kind, version.rows) == ("text", "text", 2)
    assert [row["text"] for row in stored(version)] == ["文档", "b"]
    assert {key for row in stored(version) for key in row} <= {"text", "line", "extra"}


def test_blank_lines_separate_the_documents_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeff\n[Chapter 1] one\r\n  two\r\n \t\r\n\r\nthree\n\n\n{four}".encode())
    version = add_dataset(path)
    assert [(row["line"], row["text"]) for row in stored(version)] == [
        (2, "[Chapter 1] one\n  two"),
        (6, "three"),
        (9, "{four}"),
    ]
    assert version.report.format == "txt"
    assert "blank lines separate the documents" in version.report.notes[-1]


def test_a_document_that_cannot_be_read_is_refused_and_the_next_one_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.dataset_texts.MAX_ROW_BYTES", 100_000)
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\nbad \xc4\n\ntwo\n\n" + b"x" * 200_000 + b"\n\nthree")
    report = check_dataset(path)
    told = [(problem.kind, problem.line, problem.row, problem.found) for problem in report.problems]
    assert told == [
        ("wrong_encoding", 2, 1, "byte 0xc4 at offset 8"),
        ("row_too_long", 6, 3, "200,001 bytes"),
    ]
    assert (report.rows_kept, report.rows_refused, report.complete) == (2, 2, True)
    with pytest.raises(UserError, match="2 of 4 rows are refused"):
        add_dataset(path)


@pytest.mark.parametrize("packed", [False, True])
def test_a_folder_or_an_archive_of_text_files_holds_a_document_in_each(tmp_path: Path, packed: bool) -> None:
    files = {"b.txt": "two\n\nparagraphs\n", "a/一.txt": "文档", ".hidden.txt": "no"}
    if packed:
        path = tmp_path / "all.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, text in files.items():
                archive.writestr(name, text)
    else:
        path = tmp_path / "all"
        for name, text in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(text, encoding="utf-8")
    version = add_dataset(path)
    assert [(row["text"], row["extra"]) for row in stored(version)] == [
        ("文档", {"file": "a/一.txt"}),
        ("two\n\nparagraphs", {"file": "b.txt"}),
    ]
    assert version.report.notes == ["plain text: each .txt file is a document"]


def test_a_bad_file_among_others_is_named(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("good")
    (tmp_path / "in" / "b.txt").write_bytes("你好".encode("gbk"))
    report = check_dataset(tmp_path / "in")
    (problem,) = report.problems
    assert (problem.kind, problem.field, problem.row) == ("wrong_encoding", "b.txt", 2)
    assert problem.message.startswith("b.txt: the text is not UTF-8")


TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


@pytest.mark.parametrize(
    ("row", "shape"),
    [
        ({"prompt": "a", "completion": "b", "text": "c"}, "prompt_completion"),
        ({"instruction": "a", "output": "b", "text": "c"}, "alpaca"),
        ({"messages": TALK, "text": "c"}, "messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "text": "d"}, "preference"),
        ({"anchor": "a", "positive": "b", "text": "c"}, "pair"),
    ],
)
def test_a_text_beside_another_shape_is_a_further_column(tmp_path: Path, row: dict[str, Any], shape: str) -> None:
    # The first row has a text alone: as before, the first one that is recognised says what the file holds.
    report = check_dataset(write_lines(tmp_path / "a.jsonl", {"text": "alone"}, row))
    assert report.shape == shape
    assert report.refused == {"missing_column": 1}
    assert report.extra_kept["text"] == 1


@pytest.mark.parametrize("row", [{"role": "user", "content": "hi"}, {"question": "a", "text": "b"}])
def test_a_part_of_another_shape_is_no_document_unless_it_is_said_to_be(tmp_path: Path, row: dict[str, str]) -> None:
    path = write_lines(tmp_path / "a.jsonl", row)
    with pytest.raises(UserError, match="the shape of the rows is not recognised"):
        check_dataset(path)
    assert check_dataset(path, shape="text").kind == "text"


def test_a_column_of_another_name_holds_the_documents_if_it_is_named(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", {"body": "one", "id": 1}, {"body": "two", "id": 2})
    version = add_dataset(path, columns=Columns(completion="body"), shape="text")
    assert [(row["text"], row["extra"]) for row in stored(version)] == [("one", {"id": 1}), ("two", {"id": 2})]


def test_documents_are_refused_where_answers_are_wanted_and_the_method_for_them_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="these are plain texts; sft takes conversations") as caught:
        check_dataset(write_lines(tmp_path / "a.jsonl", {"text": "a"}), wanted=SFT)
    assert "method: pretrain" in str(caught.value.mend)
    with pytest.raises(UserError, match="these are conversations; pretrain takes plain texts") as caught:
        check_dataset(write_lines(tmp_path / "b.jsonl", {"messages": TALK}), wanted=PRETRAIN)
    assert "a column text or content" in str(caught.value.expected)
    assert ".txt" in str(caught.value.expected)
    assert "method: sft" in str(caught.value.mend)


def test_documents_are_compared_mixed_and_split_like_other_rows(tmp_path: Path) -> None:
    def added(name: str, *texts: str) -> DatasetVersion:
        path = tmp_path / f"{name}.txt"
        path.write_text("\n\n".join(texts), encoding="utf-8")
        return add_dataset(path)

    one, two = added("one", *"abcdefghij"), added("two", *"abcdefghik")
    changes = compare_versions(one, two)
    assert (changes.same, changes.added, changes.removed, changes.changed) == (9, 1, 1, 0)
    report = check_dataset(tmp_path / "one.txt", against=two.reference)
    assert report.overlap is not None
    assert (report.overlap.rows, report.overlap.prompts) == (9, 9)
    assert f"9 of 10 documents are in {two.reference} too" in as_markdown(report, "one").replace("\\", "")
    mixed = mix_datasets({one.reference: 1, two.reference: 1}, "mixed")
    assert (mixed.kind, mixed.rows) == ("text", 20)
    counts = write_split(mixed, 0.3, 1, tmp_path / "train.jsonl", tmp_path / "validation.jsonl")
    assert sum(counts) == 20
    assert min(counts) > 0
    with pytest.raises(UserError, match="no two different rows"):
        write_split(added("single", "one"), 0.3, 1, tmp_path / "train.jsonl", tmp_path / "validation.jsonl")


def test_the_report_shows_documents_as_the_model_reads_them(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("switch the light\n\n<b>开灯</b>", encoding="utf-8")
    report = check_dataset(path, base=("tiny", tiny_model))
    assert report.fields["text"].characters.max == 16
    assert report.scripts == {"latin": 1, "han": 1}
    assert report.tokens is not None
    assert report.tokens.tokens == report.tokens.trained_tokens
    (part,) = report.tokens.examples[0].parts
    assert (part.text, part.trained) == ("switch the light<|im_end|>", True)
    page = as_html(report, "manual")
    assert "<b>2</b><span>plain texts</span>" in page
    assert "&lt;b&gt;开灯&lt;/b&gt;" in page
