"""Logs are read from their end."""

from __future__ import annotations

from pathlib import Path

from tasks.files import last_lines


def test_last_lines_are_those_at_the_end(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    assert last_lines(log, 2) == ""
    log.write_text("".join(f"line {number}\n" for number in range(30)))
    assert last_lines(log, 2) == "line 28\nline 29"
    assert last_lines(log, 0) == ""


def test_of_a_line_that_was_rewritten_the_last_state_is_told(tmp_path: Path) -> None:
    log = tmp_path / "x.log"
    log.write_bytes(b"loading\r\n 0%\r 50%\r100%\nbroken \xff byte")
    assert last_lines(log, 5) == "loading\n100%\nbroken \ufffd byte"
