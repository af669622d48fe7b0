"""Some forty defective files, and what each is told: the line, the field and the whole message.

`pytest -s tests/tasks/test_dataset_defects.py` prints them as a table.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import openpyxl
import pytest
from PIL import Image

from configs.datasets import RequestedShape
from configs.errors import UserError
from tasks.datasets import add_dataset


class Defect(NamedTuple):
    """A file of this name and content, and what it is told. `good` rows of the same shape stand before a bad one."""

    file: str
    content: bytes | Callable[[], bytes]
    line: int | None
    field: str | None
    message: str
    shape: RequestedShape = "auto"


def lines(*rows: object) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def array(*rows: object) -> bytes:
    return json.dumps(list(rows), ensure_ascii=False, indent=1).encode()


def excel(*rows: list[Any]) -> Callable[[], bytes]:
    def write() -> bytes:
        book, content = openpyxl.Workbook(), io.BytesIO()
        for cells in rows:
            book.active.append(cells)  # type: ignore[union-attr]
        book.save(content)
        return content.getvalue()

    return write


def packed(**members: bytes) -> Callable[[], bytes]:
    def write() -> bytes:
        content = io.BytesIO()
        with zipfile.ZipFile(content, "w") as archive:
            for name, data in members.items():
                archive.writestr(name.replace("_DOT_", "."), data)
        return content.getvalue()

    return write


ASK = {"prompt": "你好", "completion": "您好"}
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
BETTER = {"prompt": "a", "chosen": "b", "rejected": "c"}
IMAGE = {"image": "ok.png", "question": "?", "answer": "a"}

DEFECTS: dict[str, Defect] = {
    # the file as a whole
    "empty file": Defect("a.jsonl", b"", None, None, "the dataset file is empty"),
    "blank lines": Defect("a.json", b"\n\n", None, None, "the dataset file holds only blank lines"),
    "empty array": Defect("a.json", b"[]", None, None, "the dataset holds no rows"),
    "UTF-16": Defect("a.jsonl", lines(ASK).decode().encode("utf-16"), None, None, "the file is encoded in UTF-16"),
    "GBK": Defect(
        "a.jsonl",
        lines(ASK).decode().encode("gbk"),
        1,
        None,
        "the text is not UTF-8: byte 0xc4 at offset 12 of the file",
    ),
    "prose": Defect("a.md", "你好".encode(), None, None, "the content is not JSON: it starts with the text '你'"),
    "prose in GBK": Defect(
        "a.txt", "a\n\n你好".encode("gbk"), 3, None, "the text is not UTF-8: byte 0xc4 at offset 3 of the file"
    ),
    "no prose": Defect("a.txt", b" \n\n", None, None, "the dataset file holds only blank lines"),
    "old Excel": Defect("a.xls", b"\xd0\xcf", None, None, "the old Excel format is not read"),
    "compressed": Defect("a.jsonl.gz", b"\x1f\x8b", None, None, "a compressed file is not read"),
    "damaged archive": Defect("a.zip", b"PK\x03\x04", None, None, "the archive is damaged: File is not a zip file"),
    "two files of rows": Defect(
        "a.zip", packed(a_DOT_json=b"[]", b_DOT_json=b"[]"), None, None, "there are 2 files of rows: a.json, b.json"
    ),
    "unknown columns": Defect(
        "a.jsonl",
        lines({"text": "a", "标签": 1}),
        1,
        "text, 标签",
        "the shape of the rows is not recognised; their columns are: text, 标签",
    ),
    "a text beside a prompt": Defect(
        "a.jsonl",
        lines({"prompt": "a", "text": "b"}),
        1,
        "prompt, text",
        "the shape of the rows is not recognised; their columns are: prompt, text",
    ),
    "an empty document": Defect("a.jsonl", lines({"text": "a"}, {"text": " "}), 2, "text", "the text is empty"),
    "a document that is none": Defect(
        "a.jsonl", lines({"text": "a"}, {"text": ["b"]}), 2, "text", "text is a list of 1 where text is expected"
    ),
    "two shapes in one row": Defect(
        "a.jsonl",
        lines({**ASK, "question": "a", "answer": "b"}),
        1,
        "prompt, completion, question, answer",
        "the rows can be read in more than one way: prompt_completion (prompt/completion), "
        "prompt_completion (question/answer)",
    ),
    "video": Defect(
        "a.jsonl",
        lines({"messages": TALK, "videos": ["a.mp4"]}),
        1,
        "videos",
        "this is data with videos; of media, images alone are read",
    ),
    # JSON
    "trailing comma": Defect(
        "a.jsonl",
        lines(ASK) + b'{"prompt": "a", }\n',
        2,
        None,
        'invalid JSON: Expecting property name enclosed in double quotes at column 17, near \'pt": "a", }\'',
    ),
    "cut array": Defect(
        "a.json",
        array(ASK, ASK)[:-20],
        8,
        None,
        "row 2: invalid JSON: Incomplete string lexeme; the rest of the file could not be read",
    ),
    "key twice": Defect(
        "a.jsonl",
        lines(ASK) + b'{"prompt": "a", "prompt": "b"}\n',
        2,
        "prompt",
        "the key 'prompt' is given twice, so one of its values would be lost",
    ),
    "NaN": Defect(
        "a.jsonl", lines(ASK) + b'{"prompt": "a", "completion": NaN}\n', 2, None, "invalid JSON: NaN is not JSON"
    ),
    "list among objects": Defect("a.jsonl", lines(ASK, ["a", "b"]), 2, None, "the row is a list of 2, not an object"),
    "half a character": Defect(
        "a.jsonl",
        lines(ASK) + b'{"prompt": "\\ud83d", "completion": "b"}\n',
        2,
        "prompt",
        "the row holds half of a surrogate pair ('\\ud83d'), which is no character",
    ),
    "over 8 MiB": Defect(
        "a.jsonl",
        lines(ASK, {"prompt": "a", "completion": "b" * 9_000_000}),
        2,
        None,
        "the row is too long: 9,000,034 bytes",
    ),
    # tables
    "CSV without a header": Defect(
        "a.csv", b"prompt\na\n", 1, None, "the first line has no separator, so there is only one column"
    ),
    "CSV, column twice": Defect(
        "a.csv", b"prompt,completion,prompt\na,b,c\n", 1, "column 3", "the name of column 3 is given twice: 'prompt'"
    ),
    "CSV, cell too many": Defect(
        "a.csv",
        "问题,question,answer\n,a,b\n,c,d,e\n".encode(),
        3,
        "column 4",
        "the row has 4 cells where the first line names 3 columns",
    ),
    "CSV, open quote": Defect(
        "a.csv",
        b'prompt,completion\na,b\n"c,d\ne,f\n',
        3,
        None,
        "invalid CSV: a quote that starts in this row is not closed; the rest of the file could not be read",
    ),
    "Excel, error": Defect(
        "a.xlsx",
        excel(["prompt", "completion"], ["a", "#REF!"]),
        2,
        "completion",
        "the cell of completion holds the error #REF!",
    ),
    "Parquet, cut": Defect(
        "a.parquet",
        b"PAR1\x00\x00PAR1",
        None,
        None,
        "this is no Parquet file, or a damaged one: "
        "Parquet file size is 10 bytes, smaller than the size reported by footer's (12626bytes)",
    ),
    # conversations
    "missing column": Defect(
        "a.jsonl",
        lines(ASK, {"prompt": "a", "completoin": "b"}),
        2,
        "completion",
        "the row has no column 'completion' (did you mean 'completoin'?); its columns: prompt, completoin",
    ),
    "number for text": Defect(
        "a.json",
        array(ASK, {"prompt": "a", "completion": 4}),
        6,
        "completion",
        "row 2: completion is the number 4 where text is expected",
    ),
    "empty answer": Defect(
        "a.jsonl", lines(ASK, {"prompt": "你好", "completion": " "}), 2, "completion", "the answer is empty"
    ),
    "other shape": Defect(
        "a.jsonl",
        lines(ASK, {"instruction": "a", "output": "b"}),
        2,
        "prompt",
        "the row has the shape alpaca (instruction, output), "
        "the file's first rows prompt_completion (prompt, completion)",
    ),
    "unknown role": Defect(
        "a.jsonl",
        lines({"messages": [{"role": "usr", "content": "a"}]}),
        1,
        "messages[0].role",
        "unknown role: the text 'usr' (did you mean 'user'?)",
    ),
    "no answer": Defect(
        "a.jsonl",
        lines({"messages": [TALK[0]]}),
        1,
        "messages[0].content",
        "the last message is of the role user, so there is no answer to learn",
    ),
    "Qianfan, two answers": Defect(
        "a.jsonl",
        lines([{"prompt": "a", "response": [["b"], ["c"]]}], [{"prompt": "a", "response": [["b"]]}]),
        1,
        "[0].response",
        "[0].response holds 2 answers, and none is marked as the better one",
    ),
    "Qianfan, weight of 0": Defect(
        "a.jsonl",
        lines(*[[{"prompt": "a", "response": [["b"]], "weight": 0}]] * 2),
        1,
        "[0].response[0]",
        "2 of 2 rows are refused (2 no trained answer); "
        "the first: every answer has the weight 0, so there is nothing to learn",
    ),
    "Pangu, even context": Defect(
        "a.jsonl",
        lines({"context": ["a", "b"], "target": "c"}),
        1,
        "context",
        "context is a list of 2 where a list of questions and answers that ends with a question is expected",
    ),
    "tool without a name": Defect(
        "a.jsonl",
        lines({"messages": [TALK[0], {"role": "assistant", "tool_calls": [{"function": {}}]}]}),
        1,
        "messages[1].tool_calls",
        "messages[1].tool_calls is an object where a call with a name and its arguments is expected",
    ),
    # preferences, texts, images
    "equal answers": Defect(
        "a.jsonl",
        lines(BETTER, {**BETTER, "rejected": "b"}),
        2,
        "chosen, rejected",
        "the answers are the same, so neither is better",
    ),
    "different prompts": Defect(
        "a.jsonl",
        lines({"chosen": TALK, "rejected": [{"role": "user", "content": "x"}, TALK[1]]}),
        1,
        "chosen, rejected",
        "chosen and rejected begin with different messages, so they answer different prompts",
    ),
    "scores missing": Defect(
        "a.jsonl",
        lines({"prompt": "a", "answers": ["b", "c"], "scores": [1]}),
        1,
        "scores",
        "there are 2 answers, but the list of scores has 1",
    ),
    "equal scores": Defect(
        "a.jsonl",
        lines({"prompt": "a", "answers": ["b", "c"], "scores": [1, 1]}),
        1,
        "scores",
        "all answers have the same score, so none is better",
    ),
    "Pangu, one target": Defect(
        "a.jsonl",
        lines({"context": "a", "targets": ["b"]}),
        1,
        "targets",
        "targets is a list of 1 where a list of 2 answers or more is expected",
    ),
    "empty negative": Defect(
        "a.jsonl", lines({"anchor": "a", "positive": "b", "negative": ""}), 1, "negative", "the negative is empty"
    ),
    "score that is no number": Defect(
        "a.csv",
        b"sentence1,sentence2,score\na,b,high\n",
        2,
        "score",
        "score is the text 'high' where a number is expected",
    ),
    "image gone": Defect(
        "a.jsonl",
        lines(IMAGE, {**IMAGE, "image": "gone.png"}),
        2,
        "image",
        "the image cannot be used: no file 'gone.png'",
    ),
    "image outside": Defect(
        "a.jsonl",
        lines({**IMAGE, "image": "../../etc/passwd"}),
        1,
        "image",
        "the image cannot be used: '../../etc/passwd' lies outside",
    ),
    "image marks": Defect(
        "a.jsonl",
        lines({"messages": [{"role": "user", "content": "<image><image>"}, TALK[1]], "images": ["ok.png"]}),
        1,
        "images",
        "the messages have 2 places for images, and the row has 1",
    ),
    "forced shape": Defect(
        "a.jsonl",
        lines({"anchor": "a", "positive": "b"}),
        1,
        "anchor, positive",
        "the first rows do not have the columns of the shape triplet; theirs are: anchor, positive",
        "triplet",
    ),
}


@pytest.mark.parametrize("name", DEFECTS)
def test_defective_file_is_told_with_its_line_and_field(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    defect = DEFECTS[name]
    (tmp_path / "in").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "in" / "ok.png")
    path = tmp_path / "in" / defect.file
    path.write_bytes(defect.content if isinstance(defect.content, bytes) else defect.content())
    with pytest.raises(UserError) as caught:
        add_dataset(path, shape=defect.shape)
    error = caught.value
    print(f"\n{name}: {defect.file}, line {error.line}, field {error.field}\n    {error.problem}")
    assert (error.line, error.field) == (defect.line, defect.field)
    assert error.problem == defect.message
    assert error.expected or error.mend
    assert [file for file in (tmp_path / "home").rglob("*") if file.is_file()] == []


def test_table_holds_forty_defects() -> None:
    assert len({defect.message for defect in DEFECTS.values()}) >= 40
