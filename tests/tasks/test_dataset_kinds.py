"""Rows of every shape, from real files, become rows of one kind; what does not fit is refused with its place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs.datasets import KIND_OF_SHAPE, Columns, Problem, RequestedShape, Shape, Wanted
from configs.errors import UserError
from tasks.datasets import add_dataset, check_dataset, check_reference, resolve_dataset, write_split


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three images of different colours, two of them in `images`."""
    (tmp_path / "data" / "images").mkdir(parents=True)
    for name, colour in {"red.png": "red", "images/绿.png": "green", "images/b.jpg": "blue"}.items():
        Image.new("RGB", (8, 6), colour).save(tmp_path / "data" / name)
    return tmp_path / "data"


def write_lines(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def stored_rows(path: Path, shape: RequestedShape = "auto") -> tuple[Shape, list[dict[str, Any]]]:
    version = add_dataset(path, shape=shape)
    assert version.report.shape is not None
    assert version.kind == version.report.kind == KIND_OF_SHAPE[version.report.shape]
    return version.report.shape, [json.loads(line) for line in version.path.read_text(encoding="utf-8").splitlines()]


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def said(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "简短"}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": {"city": "上海"}}}
NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": NO_PARAMETERS}}

# shape: rows of a file, and what the first is stored as
SHAPES: dict[str, tuple[list[object], dict[str, Any]]] = {
    "qianfan": (
        [
            [
                {"system": "简短", "prompt": "你好", "response": [["您好"]]},
                {"prompt": "再见", "response": [["再会"]], "weight": 1},
            ],
            [{"prompt": "hi", "response": "hello"}],
        ],
        {"messages": [SYSTEM, user("你好"), said("您好"), user("再见"), said("再会")]},
    ),
    "qianfan, one object": (
        [{"prompt": "你好", "response": [["您好"]]}],
        {"messages": [user("你好"), said("您好")]},
    ),
    "pangu": (
        [{"context": "中国的首都?", "target": "北京"}],
        {"messages": [user("中国的首都?"), said("北京")]},
    ),
    "pangu, with a persona and turns": (
        [{"system": "简短", "context": ["你好", "您好", "再见"], "target": "再会"}],
        {"messages": [SYSTEM, user("你好"), said("您好"), user("再见"), said("再会")]},
    ),
    "pangu, a list": (
        [[{"context": "a", "target": "b"}, {"context": "c", "target": "d"}], [{"context": "e", "target": "f"}]],
        {"messages": [user("a"), said("b"), user("c"), said("d")]},
    ),
    "tool_messages": (
        [
            {
                "messages": [
                    user("天气?"),
                    {
                        "role": "assistant",
                        "content": None,
                        "tool_calls": [
                            {"id": "c1", "function": {"name": "weather", "arguments": '{"city": "上海"}'}},
                        ],
                    },
                    {"role": "tool", "tool_call_id": "c1", "content": "晴"},
                    said("晴天"),
                ],
                "tools": [TOOL],
            }
        ],
        {
            "messages": [
                user("天气?"),
                {"role": "assistant", "content": "", "tool_calls": [CALL]},
                {"role": "tool", "content": "晴", "tool_call_id": "c1", "name": "weather"},
                said("晴天"),
            ],
            "tools": [TOOL],
        },
    ),
    "tool_sharegpt": (
        [
            {
                "system": "简短",
                "conversations": [
                    {"from": "human", "value": "天气?"},
                    {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "上海"}}'},
                    {"from": "observation", "value": "晴"},
                    {"from": "gpt", "value": "晴天"},
                ],
                "tools": '[{"name": "weather"}]',
            }
        ],
        {
            "messages": [
                SYSTEM,
                user("天气?"),
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {
                            "id": "call00001",
                            "type": "function",
                            "function": {"name": "weather", "arguments": {"city": "上海"}},
                        },
                    ],
                },
                {"role": "tool", "content": "晴", "tool_call_id": "call00001", "name": "weather"},
                said("晴天"),
            ],
            "tools": [TOOL],
        },
    ),
    "preference": (
        [{"prompt": "a", "chosen": "good", "rejected": "bad", "source": "x"}],
        {"prompt": [user("a")], "chosen": [said("good")], "rejected": [said("bad")], "extra": {"source": "x"}},
    ),
    "preference, answers that are JSON": (
        [{"prompt": "灯?", "chosen": '{"on": true}', "rejected": '["on"]'}],
        {"prompt": [user("灯?")], "chosen": [said('{"on": true}')], "rejected": [said('["on"]')]},
    ),
    "preference, Alpaca": (
        [{"instruction": "a", "input": "i", "system": "简短", "chosen": "good", "rejected": "bad"}],
        {"prompt": [SYSTEM, user("a\n\ni")], "chosen": [said("good")], "rejected": [said("bad")]},
    ),
    "preference, ShareGPT": (
        [
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "good"},
                "rejected": {"from": "gpt", "value": "bad"},
            }
        ],
        {"prompt": [user("a")], "chosen": [said("good")], "rejected": [said("bad")]},
    ),
    "preference, whole conversations": (
        [{"chosen": [user("a"), said("good"), user("c"), said("d")], "rejected": [user("a"), said("bad")]}],
        {"prompt": [user("a")], "chosen": [said("good"), user("c"), said("d")], "rejected": [said("bad")]},
    ),
    "qianfan_preference": (
        [
            [
                {"system": "简短", "user": "你好", "assistant": "您好"},
                {"user": "再见", "chosen": "再会", "rejected": "哦"},
            ],
            [{"user": "a", "chosen": "b", "rejected": "c"}],
        ],
        {
            "prompt": [SYSTEM, user("你好"), said("您好"), user("再见")],
            "chosen": [said("再会")],
            "rejected": [said("哦")],
        },
    ),
    "ranking": (
        [{"question": "a", "answers": ["x", "y", "z"], "scores": [0.5, 2, 1]}],
        {"prompt": [user("a")], "answers": ["x", "y", "z"], "scores": [0.5, 2, 1]},
    ),
    "qianfan_ranking": (
        [
            [{"prompt": "你好", "response": [["您好"], ["走开"]], "score": [1, 0]}],
            [{"prompt": "a", "response": [["b"], ["c"]], "score": [0, 1]}],
        ],
        {"prompt": [user("你好")], "answers": ["您好", "走开"], "scores": [1, 0]},
    ),
    "pangu_ranking": (
        [{"context": "你好", "targets": ["您好", "嗯", "走开"]}],
        {"prompt": [user("你好")], "answers": ["您好", "嗯", "走开"], "scores": [2, 1, 0]},
    ),
    "pair": ([{"anchor": "a", "positive": "b"}], {"anchor": "a", "positive": "b"}),
    "pair, a query and a list of one": ([{"query": "a", "pos": ["b"]}], {"anchor": "a", "positive": "b"}),
    "triplet": (
        [{"anchor": "a", "positive": "b", "negative": "c"}],
        {"anchor": "a", "positive": "b", "negative": "c"},
    ),
    "scored_pair": (
        [{"sentence1": "a", "sentence2": "b", "score": 0.25}],
        {"sentence1": "a", "sentence2": "b", "score": 0.25},
    ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_shape_is_recognised_or_told_and_stored_as_its_kind(tmp_path: Path, case: str) -> None:
    rows, expected = SHAPES[case]
    path = write_lines(tmp_path / "rows.jsonl", *rows)
    shape, stored = stored_rows(path)
    assert shape == case.split(",")[0]
    assert stored[0] == {**expected, "line": 1}
    assert len(stored) == len(rows)
    assert stored_rows(path, shape) == (shape, stored)


def image_text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in parts]


VISION: dict[str, tuple[object, list[dict[str, Any]], list[str]]] = {
    "image_question": (
        {"image": "red.png", "question": "颜色?", "answer": "红"},
        [
            {"role": "user", "content": image_text("<image>", "颜色?")},
            {"role": "assistant", "content": image_text("红")},
        ],
        ["red.png"],
    ),
    "image_messages": (
        {"messages": [user("<image>and<image>?"), said("red, green")], "images": ["red.png", "images/绿.png"]},
        [
            {"role": "user", "content": image_text("<image>", "and", "<image>", "?")},
            {"role": "assistant", "content": image_text("red, green")},
        ],
        ["red.png", "images/绿.png"],
    ),
    "image_messages, parts": (
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image"}]}, said("blue")],
            "image": "b",
        },
        [
            {"role": "user", "content": image_text("?", "<image>")},
            {"role": "assistant", "content": image_text("blue")},
        ],
        ["images/b.jpg"],
    ),
    "image_messages, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "红"}],
            "images": ["red.png"],
        },
        [{"role": "user", "content": image_text("<image>", "?")}, {"role": "assistant", "content": image_text("红")}],
        ["red.png"],
    ),
    "image_deepextension": (
        {"images": [{"imageId": "绿"}], "qa": [{"question": "a", "answer": "b"}, {"question": "c", "answer": "d"}]},
        [
            {"role": "user", "content": image_text("<image>", "a")},
            {"role": "assistant", "content": image_text("b")},
            {"role": "user", "content": image_text("c")},
            {"role": "assistant", "content": image_text("d")},
        ],
        ["images/绿.png"],
    ),
}


@pytest.mark.parametrize("case", VISION)
def test_vision_rows_are_stored_with_their_images(folder: Path, case: str) -> None:
    row, messages, images = VISION[case]
    version = add_dataset(write_lines(folder / "rows.jsonl", row))
    assert (version.shape, version.kind) == (case.split(",")[0], "vision")
    stored = json.loads(version.path.read_text(encoding="utf-8"))
    assert stored["messages"] == messages
    kept = [(version.path.parent / image).read_bytes() for image in stored["images"]]
    assert kept == [(folder / image).read_bytes() for image in images]
    assert {path.name for path in version.images.iterdir()} == {Path(image).name for image in stored["images"]}


@pytest.mark.parametrize("columns", [("image", "caption"), ("file_name", "text")])
def test_captions_are_stored_with_their_images(folder: Path, columns: tuple[str, str]) -> None:
    image, caption = columns
    version = add_dataset(write_lines(folder / "rows.jsonl", {image: "red.png", caption: "一片红"}))
    assert (version.shape, version.kind) == ("image_caption", "caption")
    stored = json.loads(version.path.read_text(encoding="utf-8"))
    assert stored["caption"] == "一片红"
    assert (version.path.parent / stored["image"]).read_bytes() == (folder / "red.png").read_bytes()


def test_columns_are_named_for_questions_about_images(folder: Path) -> None:
    path = write_lines(folder / "rows.jsonl", {"image": "red.png", "问": "颜色?", "答": "红"})
    version = add_dataset(path, columns=Columns(prompt="问", completion="答"), shape="image_question")
    assert version.kind == "vision"


def test_same_image_is_stored_once(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "red.png").read_bytes())
    rows = [{"image": name, "caption": name} for name in ("red.png", "copy.png", "red.png")]
    version = add_dataset(write_lines(folder / "rows.jsonl", *rows))
    assert len(list(version.images.iterdir())) == 1
    assert version.report.images == 1


def test_split_of_vision_rows_finds_their_images(folder: Path, tmp_path: Path) -> None:
    rows = [{"image": "red.png", "question": str(number), "answer": "红"} for number in range(10)]
    version = add_dataset(write_lines(folder / "rows.jsonl", *rows))
    sides = (tmp_path / "train" / "train_rows.jsonl", tmp_path / "train" / "validation_rows.jsonl")
    assert write_split(version, 0.5, 1, *sides) == write_split(version, 0.5, 1, *sides)
    for side in sides:
        for line in side.read_text(encoding="utf-8").splitlines():
            assert (side.parent / json.loads(line)["images"][0]).is_file()


CHAT = Wanted("sft", ("chat",))


def test_rows_of_another_kind_are_refused_by_who_wants_them(tmp_path: Path, home: Path) -> None:
    path = write_lines(tmp_path / "rows.jsonl", {"prompt": "a", "chosen": "b", "rejected": "c"})
    for verb in (resolve_dataset, check_reference):
        with pytest.raises(UserError, match="these are preference pairs; sft takes conversations") as caught:
            verb(path, wanted=CHAT)
        assert (caught.value.file, caught.value.line, caught.value.field) == (str(path), 1, "chosen, rejected")
    assert not home.exists()
    version = add_dataset(path)
    for verb in (resolve_dataset, check_reference):
        with pytest.raises(UserError, match="these are preference pairs; sft takes conversations"):
            verb(version.reference, wanted=CHAT)
    assert resolve_dataset(version.reference, wanted=Wanted("dpo", ("preference",))) == version


def test_row_with_images_among_plain_rows_is_refused(folder: Path) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "b", "image": "red.png"}]
    problem = only_problem(folder, *rows)
    assert (problem.kind, problem.line, problem.field) == ("vision_language", 2, "image")


def only_problem(folder: Path, *rows: object, shape: RequestedShape = "auto") -> Problem:
    report = check_dataset(write_lines(folder / "rows.jsonl", *rows), shape=shape)
    assert len(report.problems) == 1, report.problems
    return report.problems[0]
