"""Every format of a dataset, read from real files: tables, folders and archives with images, and hostile ones."""

from __future__ import annotations

import io
import json
import re
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openpyxl
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from configs.errors import UserError
from tasks import dataset_sources
from tasks.datasets import add_dataset, check_dataset, list_datasets, resolve_dataset

Writer = Callable[[Path, list[dict[str, Any]]], Path]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def stored(path: Path) -> list[dict[str, Any]]:
    version = add_dataset(path)
    assert version.report.ok, version.report.problems
    return [json.loads(line) for line in version.path.read_text(encoding="utf-8").splitlines()]


def write_delimited(path: Path, rows: list[dict[str, Any]], delimiter: str, encoding: str = "utf-8") -> Path:
    def line(cells: list[str]) -> str:
        return delimiter.join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\r\n"

    texts = [[value if isinstance(value, str) else json.dumps(value) for value in row.values()] for row in rows]
    path.write_text("".join(map(line, [list(rows[0]), *texts])), encoding=encoding, newline="")
    return path


def write_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_delimited(folder / "rows.csv", rows, ",")


def write_chinese_csv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_delimited(folder / "semicolons.csv", rows, ";", "utf-8-sig")


def write_tsv(folder: Path, rows: list[dict[str, Any]]) -> Path:
    return write_delimited(folder / "rows.tsv", rows, "\t")


def write_excel(folder: Path, rows: list[dict[str, Any]]) -> Path:
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    for cells in [list(rows[0]), *([_excel_cell(cell) for cell in row.values()] for row in rows)]:
        sheet.append(cells)
    book.save(folder / "rows.xlsx")
    return folder / "rows.xlsx"


def _excel_cell(value: object) -> object:
    return json.dumps(value) if isinstance(value, list) else value


def write_parquet(folder: Path, rows: list[dict[str, Any]]) -> Path:
    parquet.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet", write_page_checksum=True)
    return folder / "rows.parquet"


def write_json(folder: Path, rows: list[dict[str, Any]]) -> Path:
    (folder / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")
    return folder / "rows.json"


def write_lines(folder: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(text, encoding="utf-8")
    return folder / "rows.jsonl"


FORMATS: list[Writer] = [
    *(write_lines, write_json, write_csv, write_chinese_csv, write_tsv, write_excel, write_parquet),
]


@pytest.mark.parametrize("write", FORMATS)
def test_questions_and_answers_are_read_from_each_format(tmp_path: Path, write: Writer) -> None:
    rows = [
        {"prompt": '你好, "世界";\n\t第二行', "completion": "您好"},
        {"prompt": "2+2?", "completion": "4"},
    ]
    path = write(tmp_path, rows)
    messages = [[message["content"] for message in row["messages"]] for row in stored(path)]
    assert messages == [list(row.values()) for row in rows]


@pytest.mark.parametrize("write", FORMATS)
def test_nested_rows_are_read_from_each_format(tmp_path: Path, write: Writer) -> None:
    turns = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "[1]"}]
    rows = stored(write(tmp_path, [{"messages": turns, "id": "1"}] * 2))
    assert [(row["messages"], row["extra"]) for row in rows] == [(turns, {"id": "1"})] * 2


@pytest.mark.parametrize("write", FORMATS)
def test_answers_that_are_json_stay_text(tmp_path: Path, write: Writer) -> None:
    rows = [{"prompt": "[灯]", "chosen": '{"on": true}', "rejected": "[]"}]
    row = stored(write(tmp_path, rows))[0]
    assert [row[name][0]["content"] for name in ("prompt", "chosen", "rejected")] == list(rows[0].values())


@pytest.mark.parametrize("write", FORMATS)
def test_scores_are_numbers_in_each_format(tmp_path: Path, write: Writer) -> None:
    rows = [{"question": "a", "answers": ["x", "y"], "scores": [0.5, 2]}]
    row = stored(write(tmp_path, rows))[0]
    assert (row["answers"], row["scores"]) == (["x", "y"], [0.5, 2])


def test_line_of_each_csv_row_is_told(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text('prompt,completion\n"a\nb",c\n\nd,\ne,f,g\n"h"x,i\nj,k\n', encoding="utf-8")
    report = check_dataset(path)
    assert [(problem.kind, problem.line, problem.field) for problem in report.problems] == [
        ("blank_line", 4, None),
        ("empty_answer", 5, "completion"),
        ("wrong_number_of_cells", 6, "column 3"),
        ("invalid_csv", 7, None),
    ]
    assert (report.rows_read, report.rows_kept) == (5, 2)


def test_numbers_dates_and_other_sheets_of_excel(tmp_path: Path) -> None:
    import datetime

    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    sheet.append(["prompt", "completion", None])
    sheet.append(["how many?", 42])
    sheet.append(["when?", datetime.datetime(2026, 5, 4)])
    sheet.append([None, None])
    sheet.append(["share?", 0.5])
    sheet.append(["broken?", "#DIV/0!"])
    sheet.append(["beside?", "x", "y"])
    book.create_sheet("其他").append(["not read"])
    book.save(tmp_path / "rows.xlsx")
    report = check_dataset(tmp_path / "rows.xlsx")
    assert report.notes == ["the sheet Sheet was read; not read: 其他"]
    assert [(problem.kind, problem.line, problem.field) for problem in report.problems] == [
        ("blank_line", 4, None),
        ("excel_error", 6, "completion"),
        ("wrong_number_of_cells", 7, "column 3"),
    ]
    version = add_dataset(tmp_path / "rows.xlsx", allow_refused=True)
    answers = [json.loads(line)["messages"][-1]["content"] for line in version.path.read_text().splitlines()]
    assert answers == ["42", "2026-05-04 00:00:00", "0.5"]


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("write", [write_excel, write_parquet])
def test_table_that_is_cut_or_damaged_is_told(tmp_path: Path, write: Writer, share: float) -> None:
    path = write(tmp_path, [{"prompt": f"{number}?" * 20, "completion": str(number)} for number in range(500)])
    whole = path.read_bytes()
    place = int(len(whole) * share)
    for damaged in (whole[:place], whole[:place] + bytes(40) + whole[place + 40 :]):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged") as caught:
            add_dataset(path, allow_refused=True)
        assert caught.value.file == str(path)


SHEET = "http://schemas.openxmlformats.org/spreadsheetml/2006/main"


def write_shared_texts(folder: Path, *texts: str) -> Path:
    """An Excel file as Excel itself writes it, with its texts in a part of their own; two of them a row."""
    path = write_excel(folder, [{"prompt": "", "completion": ""}])
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    shared = "application/vnd.openxmlformats-officedocument.spreadsheetml.sharedStrings+xml"
    override = f'<Override PartName="/xl/sharedStrings.xml" ContentType="{shared}"/></Types>'
    parts["[Content_Types].xml"] = parts["[Content_Types].xml"].replace("</Types>", override)
    items = "".join(f"<si><t>{text}</t></si>" for text in texts)
    parts["xl/sharedStrings.xml"] = f'<sst xmlns="{SHEET}">{items}</sst>'
    cells = [f'<c t="s"><v>{index}</v></c>' for index in range(len(texts))]
    rows = "".join(f"<row>{one}{other}</row>" for one, other in zip(cells[::2], cells[1::2], strict=True))
    # With a dimension that is too small, as some programs write it.
    sheet = f'<worksheet xmlns="{SHEET}"><dimension ref="A1"/><sheetData>{rows}</sheetData></worksheet>'
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**parts, "xl/worksheets/sheet1.xml": sheet}.items():
            archive.writestr(name, content)
    return path


def test_shared_texts_of_an_excel_file_are_read(tmp_path: Path) -> None:
    rows = stored(write_shared_texts(tmp_path, "prompt", "completion", "你好", "您好"))
    assert [message["content"] for message in rows[0]["messages"]] == ["你好", "您好"]


@pytest.mark.parametrize(("limit", "part"), [("MAX_SHARED_STRINGS", "sharedStrings"), ("MAX_SHEET_BYTES", "theme1")])
def test_huge_part_of_an_excel_file_is_refused_unread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: str, part: str
) -> None:
    path = write_shared_texts(tmp_path, "prompt", "completion", "a" * 5000, "b")
    monkeypatch.setattr(f"tasks.dataset_tables.{limit}", 5000)
    with pytest.raises(UserError, match=rf"{part}.xml of the Excel file unpacks to \d+,\d\d\d bytes"):
        check_dataset(path)


def test_excel_file_with_an_entity_bomb_is_refused(tmp_path: Path) -> None:
    path = write_shared_texts(tmp_path, "prompt", "completion", "&b;", "b")
    with zipfile.ZipFile(path) as archive:
        parts = {name: archive.read(name).decode() for name in archive.namelist()}
    bomb = '<!DOCTYPE sst [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;">]>'
    parts["xl/sharedStrings.xml"] = bomb + parts["xl/sharedStrings.xml"]
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    with pytest.raises(UserError, match="no Excel file, or a damaged one"):
        check_dataset(path)


# Folders and archives


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of rows and images, as DeepExtension has them."""
    folder = tmp_path / "灯"
    (folder / "images").mkdir(parents=True)
    for name, colour in {"红": "red", "b": "blue"}.items():
        Image.new("RGB", (8, 6), colour).save(folder / "images" / f"{name}.png")
    rows = [
        {"images": [{"imageId": "红"}], "qa": [{"question": "颜色?", "answer": "红"}], "generation": ""},
        {"images": [{"imageId": "b"}], "qa": [{"question": "colour?", "answer": "blue"}], "generation": ""},
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "metadata.jsonl").write_text(text, encoding="utf-8")
    return folder


def pack(folder: Path, path: Path, *, inside: str = "") -> Path:
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in files:
                archive.write(file, f"{inside}{file.relative_to(folder)}")
    else:
        with tarfile.open(path, "w:gz" if path.suffix in (".gz", ".tgz") else "w") as archive:
            for file in files:
                archive.add(file, f"{inside}{file.relative_to(folder)}")
    return path


@pytest.mark.parametrize("name", ["lights.zip", "lights.tar", "lights.tar.gz", "lights.tgz"])
@pytest.mark.parametrize("inside", ["", "lights/"])
def test_archive_is_read_as_the_folder_it_packs(folder: Path, tmp_path: Path, name: str, inside: str) -> None:
    packed = add_dataset(pack(folder, tmp_path / name, inside=inside))
    version = add_dataset(folder)
    assert (packed.name, version.name) == ("lights", "灯")
    assert packed.digest == version.digest
    assert packed.path.read_bytes() == version.path.read_bytes()
    assert packed.report.file == f"{tmp_path / name}/{inside}metadata.jsonl"
    assert {file.name for file in packed.images.iterdir()} == {file.name for file in version.images.iterdir()}
    assert {stat.S_IMODE(file.stat().st_mode) for file in packed.images.iterdir()} == {0o444}
    assert resolve_dataset(str(folder)) == version


def test_refused_row_of_an_archive_is_told_by_its_name_in_it(folder: Path, tmp_path: Path) -> None:
    with (folder / "metadata.jsonl").open("a") as file:
        file.write('{"images": [{"imageId": "gone"}], "qa": []}\n')
    path = pack(folder, tmp_path / "lights.zip")
    with pytest.raises(UserError) as caught:
        add_dataset(path)
    assert (caught.value.file, caught.value.line) == (f"{path}/metadata.jsonl", 3)
    assert f"tuneline datasets check {path}`" in str(caught.value.mend)


def test_images_with_captions_beside_them(tmp_path: Path) -> None:
    folder = tmp_path / "cats"
    (folder / "images").mkdir(parents=True)
    for name in ("a", "b", "c"):
        Image.new("RGB", (4, 4), "gray").save(folder / "images" / f"{name}.jpg")
    (folder / "images" / "a.txt").write_text("一只猫\n", encoding="utf-8-sig")
    (folder / "images" / "b.txt").write_bytes("红色的灯".encode("gb18030"))
    report = check_dataset(folder)
    assert (report.format, report.shape, report.kind, report.rows_kept) == ("images", "image_caption", "caption", 1)
    assert [(problem.kind, problem.field) for problem in report.problems] == [
        ("wrong_encoding", "images/b.jpg"),
        ("missing_caption", "images/c.jpg"),
    ]
    version = add_dataset(pack(folder, tmp_path / "cats.zip"), allow_refused=True)
    row = json.loads(version.path.read_text(encoding="utf-8"))
    assert row["caption"] == "一只猫"
    assert (version.path.parent / row["image"]).read_bytes() == (folder / "images" / "a.jpg").read_bytes()


def test_images_inside_parquet_are_stored(folder: Path, tmp_path: Path) -> None:
    data = (folder / "images" / "b.png").read_bytes()
    path = write_parquet(tmp_path, [{"image": {"bytes": data, "path": "b.png"}, "text": "blue"}])
    version = add_dataset(path)
    row = json.loads(version.path.read_text())
    assert (row["caption"], (version.path.parent / row["image"]).read_bytes()) == ("blue", data)


def test_names_of_a_chinese_windows_archive(folder: Path, tmp_path: Path) -> None:
    """Windows packs names in GBK, without the mark for UTF-8."""
    path = tmp_path / "lights.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.jsonl", '{"file_name": "红.png", "text": "红"}')
        archive.writestr(_GbkName("红.png"), (folder / "images" / "红.png").read_bytes())
    assert b"\xba\xec.png" in path.read_bytes()
    assert add_dataset(path).report.images == 1


class _GbkName(zipfile.ZipInfo):
    """A name that is written as GBK."""

    def _encodeFilenameFlags(self) -> tuple[bytes, int]:  # noqa: N802 - zipfile's own
        return self.filename.encode("gb18030"), self.flag_bits


def write_zip(path: Path, *members: tuple[str | zipfile.ZipInfo, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


def write_tar(path: Path, *members: tuple[tarfile.TarInfo, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for item, content in members:
            item.size = len(content)
            archive.addfile(item, io.BytesIO(content))
    return path


def zip_link() -> zipfile.ZipInfo:
    item = zipfile.ZipInfo("images")
    item.external_attr = (stat.S_IFLNK | 0o777) << 16
    return item


def tar_item(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    item = tarfile.TarInfo(name)
    item.type, item.linkname = kind, link
    return item


ROWS = ("rows.jsonl", b'{"prompt": "a", "completion": "b"}\n')
HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    "leaves by ..": (lambda path: write_zip(path / "a.zip", ROWS, ("../out", b"x")), "leaves the archive"),
    "leaves from inside": (lambda path: write_zip(path / "a.zip", ROWS, ("a/../../out", b"x")), "leaves the archive"),
    "absolute path": (lambda path: write_zip(path / "a.zip", ROWS, (f"{path}/out", b"x")), "leaves the archive"),
    "path of Windows": (lambda path: write_zip(path / "a.zip", ROWS, ("C:\\out", b"x")), "leaves the archive"),
    "link in a zip": (lambda path: write_zip(path / "a.zip", ROWS, (zip_link(), b"/etc")), "is a link"),
    "leaves a tar": (lambda path: write_tar(path / "a.tar", (tar_item("../out"), b"x")), "leaves the archive"),
    "link in a tar": (
        lambda path: write_tar(path / "a.tar", (tar_item("images", tarfile.SYMTYPE, "/etc"), b"")),
        "is a link",
    ),
    "hard link in a tar": (
        lambda path: write_tar(path / "a.tar", (tar_item("images", tarfile.LNKTYPE, "/etc/passwd"), b"")),
        "is a link",
    ),
    "device": (
        lambda path: write_tar(path / "a.tar", (tar_item("null", tarfile.CHRTYPE), b"")),
        "is a link or a device",
    ),
    "bomb": (lambda path: write_zip(path / "a.zip", ROWS, ("zeros", bytes(3_000_000))), "unpacks to more than"),
    "many files": (
        lambda path: write_zip(path / "a.zip", *((f"{number}.txt", b"") for number in range(60))),
        "more than 50 files",
    ),
    "same name twice": (lambda path: write_tar(path / "a.tar", *([(tar_item("a"), b"x")] * 2)), "File exists"),
    "two files of rows": (lambda path: write_zip(path / "a.zip", ROWS, ("b.json", b"[]")), "there are 2 files of rows"),
    "nothing in it": (lambda path: write_zip(path / "a.zip", ("a.txt", b"")), "no file of rows and no images"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_archive_is_refused_and_leaves_nothing(
    tmp_path: Path, home: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = HOSTILE[case]
    (tmp_path / "in").mkdir()
    (tmp_path / "tmp").mkdir()
    path = make(tmp_path / "in")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "tmp"))
    monkeypatch.setattr(dataset_sources, "ALWAYS_UNPACKED", 1_000_000)
    monkeypatch.setattr(dataset_sources, "MAX_FILES", 50)
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        add_dataset(path)
    assert str(caught.value.file).startswith(str(path))
    assert [file for file in tmp_path.rglob("*") if file.is_file()] == [path]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_archive_with_a_password_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "a.zip", ROWS)
    data = bytearray(path.read_bytes())
    for mark, place in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(mark) + place] |= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="needs a password"):
        check_dataset(path)


IMAGE_CASES: dict[str, tuple[object, str, str]] = {
    "gone": ("gone.png", "image_missing", "no file 'gone.png'"),
    "outside": ("../secret.png", "image_outside", "'../secret.png'"),
    "outside, absolute": ("/SECRET", "image_outside", "cannot be used: "),
    "link to the outside": ("link.png", "image_outside", "'link.png'"),
    "address": ("https://example.com/a.png", "image_not_a_file", "https://"),
    "text": ("text.png", "image_unreadable", "none of them"),
    "cut": ("cut.png", "image_unreadable", "truncated"),
    "many pixels": ("huge.png", "image_too_large", "8000 x 8000 pixels"),
    "number": (7, "wrong_type", "the number 7"),
}


@pytest.mark.parametrize("case", IMAGE_CASES)
def test_image_that_cannot_be_used_is_told(folder: Path, tmp_path: Path, case: str) -> None:
    image, kind, words = IMAGE_CASES[case]
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (folder / "link.png").symlink_to(tmp_path / "secret.png")
    (folder / "text.png").write_text("no image")
    Image.effect_noise((64, 64), 90).save(folder / "whole.png")
    (folder / "cut.png").write_bytes((folder / "whole.png").read_bytes()[:2000])
    Image.new("1", (8000, 8000)).save(folder / "huge.png")
    if image == "/SECRET":
        image = str(tmp_path / "secret.png")
    path = folder / "rows.jsonl"
    good = {"image": "whole.png", "caption": "noise"}
    path.write_text(json.dumps(good) + "\n" + json.dumps({"image": image, "caption": "a"}) + "\n")
    report = check_dataset(path)
    assert [(problem.kind, problem.line, problem.field) for problem in report.problems] == [(kind, 2, "image")]
    assert words in report.problems[0].message
    with pytest.raises(UserError):
        add_dataset(path)
    assert list_datasets() == []
