"""How fast a dataset is checked, and in how much memory: `python -m tests.bench.bench_datasets [MEGABYTES]`.

Each format is checked in a process of its own, at half of the size and at the whole. What the peak of its memory
grows by between the two says what a file of 5 GB would need, and an Excel file of all the rows that one may have. Two
figures are printed as ratios: the speed on one core over the 100 MB a minute that are asked for, and the 500 MB that
are allowed over the memory at that size. Exit code 1 if one of them is below 1.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from configs.settings import PROJECT_ROOT
from tasks.dataset_tables import MAX_EXCEL_ROWS

ASKED_SPEED = 100  # MB a minute, on one core
ALLOWED_MEMORY = 500  # MB
LARGE = 5000  # MB
EXCEL_SHARE = 20  # Excel files are smaller, and read cell by cell
WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dog",
    "model",
    "train",
    "data",
    "answer",
    "你好",
    "请",
    "打开",
    "关闭",
    "客厅",
    "的",
    "灯",
    "a",
    "b",
    "1",
    "2",
]

MEASURE = """
import json, re, sys, time
from pathlib import Path
from tasks.datasets import check_dataset
import ijson.backends.python

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

path = Path(sys.argv[1])
before = time.process_time()
report = check_dataset(path)
seconds = time.process_time() - before
assert report.ok, report.problems
print(json.dumps({"rows": report.rows_kept, "seconds": seconds, "memory": peak()}))
"""


class Measured(NamedTuple):
    """One check: megabytes of the file, rows, seconds of one core, and the peak of memory in MB."""

    megabytes: float
    rows: int
    seconds: float
    memory: float


def rows(megabytes: float) -> Iterator[dict[str, Any]]:
    """Rows of half a kilobyte, English and Chinese, all different, that are about this many MB of JSON Lines."""
    draw = random.Random(1)  # noqa: S311
    written = 0.0
    while written < megabytes * 1e6:
        prompt = f"{written:.0f} {' '.join(draw.choices(WORDS, k=draw.randint(10, 80)))}"
        row = {"prompt": prompt, "completion": " ".join(draw.choices(WORDS, k=draw.randint(1, 80)))}
        written += len(json.dumps(row, ensure_ascii=False).encode()) + 1
        yield row


def write(path: Path, megabytes: float) -> None:
    """Write a file of the format that its suffix names."""
    if path.suffix == ".parquet":
        _write_parquet(path, megabytes)
    elif path.suffix == ".xlsx":
        _write_excel(path, megabytes)
    else:
        _write_text(path, megabytes)


def _write_text(path: Path, megabytes: float) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write({".json": "[", ".csv": "prompt,completion\n"}.get(path.suffix, ""))
        for number, row in enumerate(rows(megabytes)):
            line = json.dumps(row, ensure_ascii=False)
            if path.suffix == ".csv":
                line = ",".join(f'"{cell}"' for cell in row.values())
            file.write((",\n" if path.suffix == ".json" and number else "") + line)
            file.write("" if path.suffix == ".json" else "\n")
        file.write("]" if path.suffix == ".json" else "")


def _write_parquet(path: Path, megabytes: float) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    schema = pa.schema([("prompt", pa.string()), ("completion", pa.string())])
    with parquet.ParquetWriter(path, schema, compression="none", use_dictionary=False) as writer:
        held: list[dict[str, Any]] = []
        for row in rows(megabytes):
            held.append(row)
            if len(held) == 100_000:
                writer.write_table(pa.Table.from_pylist(held, schema))
                held = []
        writer.write_table(pa.Table.from_pylist(held, schema))


def _write_excel(path: Path, megabytes: float) -> None:
    import openpyxl

    book = openpyxl.Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(["prompt", "completion"])
    for row in rows(megabytes):
        sheet.append(list(row.values()))
    book.save(path)


def measure(path: Path, megabytes: float) -> Measured:
    """Write a file, check it in a process of its own, and delete it."""
    write(path, megabytes)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)], cwd=PROJECT_ROOT, capture_output=True, text=True, check=True
    )
    path.unlink()
    found = json.loads(re.findall(r"\{.*\}", done.stdout)[-1])
    return Measured(megabytes, found["rows"], found["seconds"], found["memory"] / 1e6)


def main() -> int:
    """Print a line for each format; returns the exit code."""
    megabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 300
    missed = False
    print(f"checking datasets of {megabytes:g} MB (Excel: {megabytes / EXCEL_SHARE:g} MB of text)")
    with tempfile.TemporaryDirectory(prefix="tuneline-bench-") as folder:
        for suffix in ("jsonl", "json", "csv", "parquet", "xlsx"):
            size = megabytes / EXCEL_SHARE if suffix == "xlsx" else megabytes
            small, whole = (measure(Path(folder) / f"rows.{suffix}", share * size) for share in (0.5, 1))
            speed = 60 * whole.megabytes / whole.seconds
            growth = max(0.0, whole.memory - small.memory) / (whole.megabytes - small.megabytes)
            large = size * MAX_EXCEL_ROWS / whole.rows if suffix == "xlsx" else LARGE
            memory = whole.memory + growth * (large - whole.megabytes)
            missed |= speed < ASKED_SPEED or memory > ALLOWED_MEMORY
            print(
                f"{suffix:8}{whole.rows:>9,} rows  {speed:6.0f} MB/min: {speed / ASKED_SPEED:.1f} times what is asked;"
                f"  peak {whole.memory:.0f} MB, at {large:.0f} MB {memory:.0f} MB: {ALLOWED_MEMORY / memory:.1f} times"
                " less than allowed",
                flush=True,
            )
    return int(missed)


if __name__ == "__main__":
    sys.exit(main())
