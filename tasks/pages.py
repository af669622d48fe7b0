"""Pages in Markdown, which Prefect draws as it is and which becomes HTML that needs nothing beside it.

Everything that comes from outside (answers, descriptions, log lines) is escaped: it is text, never markup.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

_CELL = 400  # characters of a prompt or answer that a table shows


def as_html(markdown: str, title: str) -> str:
    """The same page as HTML that needs nothing beside it; for the files of the MLflow run."""
    from markdown_it import MarkdownIt

    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(markdown)
    style = (
        "body{font:14px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}"
        "table{border-collapse:collapse}td,th{border:1px solid #ccc;padding:.2em .6em;vertical-align:top}"
        "td{overflow-wrap:anywhere}"
        "img{max-width:100%}pre{background:#f4f4f4;padding:1em;overflow:auto}"
    )
    head = f"<meta charset='utf-8'><title>{html.escape(title)}</title><style>{style}</style>"
    return f"<!doctype html><html><head>{head}</head><body>{body}</body></html>\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; its cells are Markdown."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: str) -> str:
    """Text for one cell of a table: on one line, not longer than a page can show."""
    short = value if len(value) <= _CELL else f"{value[:_CELL]}… ({len(value)} characters)"
    return "<br>".join(text(line) for line in short.strip().splitlines())


_MARKUP = re.compile(r"([\\`*_{}\[\]()#+!|~$])")


def text(value: str) -> str:
    """Text that Markdown and HTML leave as it is."""
    return _MARKUP.sub(r"\\\1", html.escape(value, quote=False))


def picture(file: Path, title: str) -> str:
    """A PNG as a part of the page itself."""
    return f"![{text(title)}]({png_address(file.read_bytes())})"


def png_address(picture: bytes) -> str:
    """A PNG as the address of itself."""
    return f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
