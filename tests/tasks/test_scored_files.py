"""Files of answers: every format, columns by name, slices, stop words, two models compared, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.scoring import ScoringOptions
from tasks.scored_files import compare_files, read_scored_file, score_file
from tasks.scoring import score
from tasks.stop_words import read_stop_words

PROMISED_KEYS = {"accuracy", "contains", "f1", "rouge_1", "rouge_2", "rouge_l", "rouge_l_recall", "bleu_4"}
PAIRS = [("turn on", "turn off"), ("", "灯"), ("灯", "灯")]


def write(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def row(prediction: object, reference: object, **more: object) -> str:
    return json.dumps({"prediction": prediction, "reference": reference, **more}, ensure_ascii=False)


def test_file_is_scored_as_its_pairs_are(tmp_path: Path) -> None:
    found = score_file(write(tmp_path / "p.jsonl", *(row(*pair) for pair in PAIRS)))
    assert found == score(PAIRS)
    assert json.loads(found.model_dump_json()).keys() >= PROMISED_KEYS


def test_every_format_gives_the_same_scores(tmp_path: Path) -> None:
    import openpyxl
    from datasets import Dataset

    pairs = [{"answer": prediction, "wanted": reference} for prediction, reference in PAIRS]
    (tmp_path / "rows.json").write_text(json.dumps(pairs), encoding="utf-8")
    with (tmp_path / "rows.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["answer", "wanted"])
        writer.writeheader()
        writer.writerows(pairs)
    book = openpyxl.Workbook()
    for line in [("answer", "wanted"), *PAIRS]:
        book.active.append(line)
    book.save(tmp_path / "rows.xlsx")
    Dataset.from_list(pairs).to_parquet(tmp_path / "rows.parquet")
    for suffix in ("json", "csv", "xlsx", "parquet"):
        path = tmp_path / f"rows.{suffix}"
        assert score_file(path, prediction="answer", reference="wanted") == score(PAIRS), suffix


def test_columns_are_named_and_rows_scored_by_others(tmp_path: Path) -> None:
    lines = [
        row("on", "on", lang="en", hard=True),
        row("灯", "灯光", lang="zh", hard=True),
        row("on", "off", lang="en"),
    ]
    with pytest.raises(UserError, match="no such column"):
        score_file(write(tmp_path / "p.jsonl", *lines), ScoringOptions(by=("hard",)))
    lines[2] = row("on", "off", lang="en", hard=None)
    found = score_file(write(tmp_path / "p.jsonl", *lines), ScoringOptions(by=("lang", "hard")))
    assert {value: part.rows for value, part in found.slices["lang"].items()} == {"en": 2, "zh": 1}
    assert found.slices["lang"]["en"].accuracy == 50
    assert {value: part.rows for value, part in found.slices["hard"].items()} == {"true": 2, "(empty)": 1}


def test_stop_words_of_a_file_or_of_the_lists_that_ship(tmp_path: Path) -> None:
    path = write(
        tmp_path / "p.jsonl", row("打开客厅灯", "打开客厅的灯"), row("light of kitchen", "the light of the kitchen")
    )
    own = write(tmp_path / "stop.txt", "的", "", " 了 ")
    assert read_stop_words(own) == {"的", "了"}
    accuracy = {
        name: score_file(path, ScoringOptions(stop_words=name)).accuracy for name in (str(own), "zh", "en", "zh,en")
    }
    assert accuracy == {str(own): 50, "zh": 50, "en": 50, "zh,en": 100}
    assert score_file(path).accuracy == 0
    assert {"的", "了", "the"} <= read_stop_words("zh,en")
    assert "灯" not in read_stop_words("zh")
    with pytest.raises(UserError, match="no stop words"):
        read_stop_words(write(tmp_path / "none.txt", " "))
    with pytest.raises(UserError, match="no such list"):
        read_stop_words("de")


def test_two_models_are_compared_on_the_same_rows(tmp_path: Path) -> None:
    wanted = [f"light {index}" for index in range(40)]
    first = read_scored_file(write(tmp_path / "a.jsonl", *(row("off", text) for text in wanted)))
    second = read_scored_file(
        write(
            tmp_path / "b.jsonl",
            *(row(text, text) for text in wanted[:30]),
            *(row("off", text) for text in wanted[30:]),
        )
    )
    found = {each.metric: each for each in compare_files(first, second, ScoringOptions())}
    assert "json_valid" not in found
    accuracy = found["accuracy"]
    assert (accuracy.first, accuracy.second, accuracy.difference, accuracy.better, accuracy.worse) == (0, 75, 75, 30, 0)
    assert accuracy.verdict == "better"
    assert accuracy.mcnemar_p == pytest.approx(2 * 0.5**30)
    assert (found["edit_distance"].verdict, found["edit_distance"].better) == ("better", 30)
    assert found["edit_distance"].difference < 0
    assert found["f1"].mcnemar_p is None or found["f1"].mcnemar_p < 1e-6


def test_files_of_different_rows_are_not_compared(tmp_path: Path) -> None:
    first = read_scored_file(write(tmp_path / "a.jsonl", row("x", "on"), row("x", "off")))
    other = read_scored_file(write(tmp_path / "b.jsonl", row("x", "on"), row("x", "of")))
    with pytest.raises(UserError, match=r"b.jsonl:2: .* do not hold the same rows"):
        compare_files(first, other, ScoringOptions())
    short = read_scored_file(write(tmp_path / "c.jsonl", row("x", "on")))
    with pytest.raises(UserError, match="2 rows cannot be compared with 1"):
        compare_files(first, short, ScoringOptions())


GOOD = row("on", "on")


@pytest.mark.parametrize(
    ("second_line", "says"),
    [
        ("{", "invalid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"prediction": "a", "prediction": "b", "reference": "c"}', "'prediction' is given twice"),
        ("[1, 2]", "not an object"),
        ('{"prediction": "a"}', "field: reference"),
        (row(None, "a"), "field: prediction"),
        (row("a", 7), "field: reference = 7"),
        (row("a", ""), "field: reference = ''"),
        (row("a", " \n"), "field: reference"),
        ('{"prediction": 1' + "0" * 5000 + ', "reference": "a"}', "invalid JSON"),
    ],
)
def test_bad_row_is_named_by_file_line_and_field(tmp_path: Path, second_line: str, says: str) -> None:
    path = write(tmp_path / "p.jsonl", GOOD, second_line, GOOD)
    with pytest.raises(UserError) as caught:
        score_file(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert says in str(caught.value)


def test_reference_of_stop_words_alone_is_named_by_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", row("light", "light"), "", row("on", "the"))
    with pytest.raises(UserError, match=r"p.jsonl:3: the reference of row 2 is empty once stop words are left out"):
        score_file(path, ScoringOptions(stop_words="en"))


def test_unreadable_files_are_told_apart(tmp_path: Path) -> None:
    latin, empty, blank = tmp_path / "latin.jsonl", tmp_path / "empty.jsonl", tmp_path / "blank.jsonl"
    latin.write_bytes(f"{GOOD}\n".encode() + '{"prediction": "é"'.encode("latin-1"))
    empty.touch()
    blank.write_text("\n\n")
    for path, says in (
        (tmp_path / "none.jsonl", "does not exist"),
        (tmp_path, "folder"),
        (latin, ":2: the text is not UTF-8"),
        (empty, "empty"),
        (blank, "only blank lines"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            score_file(path)
        assert caught.value.file == str(path)
