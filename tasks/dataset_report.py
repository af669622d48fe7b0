"""A dataset report for people: a page that needs nothing beside it, and the same in short as Markdown.

Everything that comes from the dataset is escaped: it is text, never markup.
"""

from __future__ import annotations

import html
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from configs.datasets import (
    KIND_TITLES,
    Bin,
    DatasetReport,
    Example,
    FieldStatistics,
    Kind,
    LengthStatistics,
    Overlap,
    Problem,
    Rendered,
    TokenReport,
)
from tasks import pages
from tasks.dataset_overlap import overlap_sentence
from tasks.files import write_text

_DPI = 90
_TITLES = {"han": "Chinese (han)", "kana": "Japanese (kana)", "hangul": "Korean (hangul)", "none": "no letters"}

_STYLE = """
:root { --ink: #1c2430; --soft: #5d6b7e; --line: #dfe4ea; --back: #f6f8fa; --mark: #0b6e4f; --trained: #d8f3e3;
  --bad: #b3261e; --bar: #5b8def }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", "PingFang SC", sans-serif;
  color: var(--ink); margin: 0; background: var(--back) }
main { max-width: 72rem; margin: 0 auto; padding: 2rem 1.5rem 4rem }
h1 { font-size: 1.6rem; margin: 0; overflow-wrap: anywhere }
h2 { font-size: 1.1rem; margin: 0 0 .8rem }
.where { color: var(--soft); margin: .2rem 0 1.4rem; overflow-wrap: anywhere }
section { background: #fff; border: 1px solid var(--line); border-radius: .6rem; margin: 1rem 0;
  padding: 1.1rem 1.3rem }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: .8rem }
.figure { background: #fff; border: 1px solid var(--line); border-radius: .6rem; padding: .7rem .9rem }
.figure b { display: block; font-size: 1.35rem; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; line-height: 1.25 }
.figure span { color: var(--soft); font-size: .85rem }
.figure.bad b { color: var(--bad) }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100% }
th { text-align: left; color: var(--soft); font-weight: 600; font-size: .85rem }
th, td { padding: .35rem .7rem .35rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere }
tr:last-child td { border-bottom: 0 }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 3rem; min-width: 9rem }
.bars i { flex: 1; background: var(--bar); min-height: 1px; border-radius: 2px 2px 0 0 }
.share { background: var(--back); border-radius: .3rem; min-width: 10rem }
.share i { display: block; height: .9rem; background: var(--bar); border-radius: .3rem }
.row { border-top: 1px solid var(--line); padding: .8rem 0 }
.row:first-of-type { border-top: 0; padding-top: 0 }
.row h3 { font-size: .85rem; color: var(--soft); margin: 0 0 .5rem; font-weight: 600 }
.part { display: grid; grid-template-columns: 9rem 1fr; gap: .8rem; margin: .3rem 0 }
.part > span { color: var(--soft); font-size: .85rem }
pre { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow-y: auto;
  font: .85rem/1.55 ui-monospace, "SF Mono", "Noto Sans Mono", "Noto Sans Mono CJK SC", monospace }
pre.prompt { background: var(--back); border-radius: .4rem; padding: .7rem .9rem }
mark, .key { background: var(--trained); color: var(--mark); border-radius: .2rem; padding: 0 .1rem }
.note { color: var(--soft); font-size: .85rem; margin: .6rem 0 0 }
img { width: 100%; height: auto }
"""


def write_report(folder: Path, name: str, title: str, report: DatasetReport) -> list[Path]:
    """Write `NAME_report.json`, `.html` and `.md`, and the picture of the token lengths if there are any.

    Returns the files.
    """
    contents = {
        "json": report.model_dump_json(indent=2),
        "html": as_html(report, title),
        "md": as_markdown(report, title),
    }
    files = []
    for suffix, content in contents.items():
        files.append(folder / f"{name}_report.{suffix}")
        write_text(files[-1], content)
    if report.tokens is not None and report.tokens.histogram:
        files.append(folder / f"{name}_tokens.png")
        files[-1].write_bytes(draw_tokens(report.tokens))
    return files


def draw_tokens(tokens: TokenReport) -> bytes:
    """The histogram of the lengths in tokens as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3), layout="constrained", dpi=_DPI)
    axes = figure.subplots()
    width = tokens.histogram[0].upto
    lefts = [bar.upto - width for bar in tokens.histogram]
    axes.bar(lefts, [bar.rows for bar in tokens.histogram], width=0.92 * width, align="edge", color="#5b8def")
    if tokens.tokens is not None:
        for value, name in ((tokens.tokens.p50, "median"), (tokens.tokens.p95, "95 %")):
            axes.axvline(value, color="#1c2430", linewidth=1, linestyle="--" if name == "median" else ":", label=name)
        axes.legend(frameon=False)
    axes.set_xlim(0, tokens.histogram[-1].upto)
    axes.set_xlabel("tokens")
    axes.set_ylabel("rows")
    axes.grid(axis="y", alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    return picture.getvalue()


# --- HTML --------------------------------------------------------------------------------------------------


def as_html(report: DatasetReport, title: str) -> str:
    """The whole report as one page; `title` is what the dataset is called."""
    parts = [
        f"<h1>{_text(title)}</h1>",
        f"<p class=where>{_text(report.file)}</p>",
        _figures(report),
        _section("About the file", _list(report.notes)),
        _section("Refused and skipped", _problems(report)),
        _section("Overlap", _overlap(report.overlap, report.rows_kept, report.kind)),
        _section("Lengths in characters", _fields(report.fields)),
        _section("Tokens", _tokens(report.tokens)),
        _section("What training reads", _rendered(report.tokens)),
        _section("Examples", "" if report.tokens and report.tokens.examples else _examples(report.examples)),
        _section("Languages, by their script", _scripts(report.scripts)),
        _section("Columns", _columns(report)),
    ]
    head = (
        "<meta charset=utf-8><meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{_text(title)}</title><style>{_STYLE}</style>"
    )
    return f"<!doctype html><html><head>{head}</head><body><main>{''.join(parts)}</main></body></html>\n"


def _text(value: object) -> str:
    return html.escape(str(value))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def _list(items: Iterable[str]) -> str:
    return "".join(f"<div>{_text(item)}</div>" for item in items)


def _figures(report: DatasetReport) -> str:
    shown = [_figure(value, name, bad) for name, value, bad in _counts(report)]
    return f"<div class=figures>{''.join(shown)}</div>"


def _figure(value: str, name: str, bad: bool) -> str:
    return f"<div class='figure{' bad' if bad else ''}'><b>{_text(value)}</b><span>{_text(name)}</span></div>"


def _counts(report: DatasetReport) -> list[tuple[str, str, bool]]:
    """The figures that matter most: name, value, and whether it is a bad one."""
    found = [
        (KIND_TITLES[report.kind] if report.kind else "rows", f"{report.rows_kept:,}", report.rows_kept == 0),
        ("rows refused", f"{report.rows_refused:,}", report.rows_refused > 0),
        ("duplicates", f"{report.duplicate_rows:,}", False),
        ("empty answers", f"{report.empty_answers:,}", report.empty_answers > 0),
        (f"shape, {report.format}", (report.shape or "unknown").replace("_", " "), report.shape is None),
        ("size", _size(report.size_bytes), False),
    ]
    if report.images:
        found.append(("images", f"{report.images:,}", False))
    if not report.complete:
        found.append(("read to the end", "no", True))
    return found


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 1000:
            return f"{size:,.0f} {unit}"
        size /= 1000
    return f"{size:,.1f} GB"


def _table(names: Sequence[str], rows: Iterable[Sequence[str]], numbers: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already; `numbers` are the columns to align right."""
    right = set(numbers)
    kinds = [" class=n" if place in right else "" for place in range(len(names))]
    head = "".join(f"<th{kind}>{_text(name)}</th>" for kind, name in zip(kinds, names, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for kind, cell in zip(kinds, row, strict=True)) + "</tr>"
        for row in rows
    )
    return f"<div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


def _problems(report: DatasetReport) -> str:
    counted = {**report.refused, **report.warnings}
    if not counted:
        return ""
    rows = []
    for kind, count in counted.items():
        for number, problem in enumerate(item for item in report.problems if item.kind == kind):
            name, many = (_text(kind.replace("_", " ")), f"{count:,}") if number == 0 else ("", "")
            rows.append([name, many, _place(problem), _told(problem)])
    return _table(("Problem", "Rows", "Where", "What"), rows, [1])


def _place(problem: Problem) -> str:
    line = f"line {problem.line:,}" if problem.line is not None else f"row {problem.row:,}" if problem.row else ""
    return _text(", ".join(filter(None, (line, problem.field))))


def _told(problem: Problem) -> str:
    beside = [f"expected {problem.expected}"] if problem.expected else []
    beside += [f"to mend: {problem.mend}"] if problem.mend else []
    note = f"<div class=note>{_text('; '.join(beside))}</div>" if beside else ""
    return f"{_text(problem.message)}{note}"


def _overlap(overlap: Overlap | None, rows: int, kind: Kind | None) -> str:
    return f"<div>{_text(overlap_sentence(overlap, rows, kind))}</div>" if overlap is not None else ""


def _fields(fields: Mapping[str, FieldStatistics]) -> str:
    rows = [[_text(name), *_lengths(field.characters), _bars(field.histogram)] for name, field in fields.items()]
    names = ("Field", "shortest", "mean", "median", "95 %", "longest", "Rows by length, doubling")
    return _table(names, rows, range(1, 6)) if rows else ""


def _lengths(found: LengthStatistics) -> list[str]:
    return [f"{found.min:,}", f"{found.mean:,.1f}", f"{found.p50:,}", f"{found.p95:,}", f"{found.max:,}"]


def _bars(bins: Sequence[Bin]) -> str:
    most = max(bar.rows for bar in bins)
    shown = (f"<i style='height:{100 * bar.rows / most:.1f}%' title='{_bar_title(bar)}'></i>" for bar in bins)
    return f"<div class=bars>{''.join(shown)}</div>"


def _bar_title(bar: Bin) -> str:
    return f"up to {bar.upto:,}: {bar.rows:,} rows"


def _tokens(tokens: TokenReport | None) -> str:
    if tokens is None:
        return ""
    rows = [
        [name, *_lengths(found)]
        for name, found in (("whole", tokens.tokens), ("trained part", tokens.trained_tokens))
        if found is not None
    ]
    table = _table(("Tokens", "shortest", "mean", "median", "95 %", "longest"), rows, range(1, 6)) if rows else ""
    picture = f"<img alt='Histogram of the lengths in tokens' src='{pages.png_address(draw_tokens(tokens))}'>"
    return f"{picture if tokens.histogram else ''}{table}<p class=note>{_text(tokens_sentence(tokens))}</p>"


def tokens_sentence(tokens: TokenReport) -> str:
    """Whose tokens these are, of how many rows, and what could not be rendered."""
    drawn = "all" if tokens.rows == tokens.of_rows else f"{tokens.rows:,} rows drawn from"
    told = f"With tokenizer and template of {tokens.model}; {drawn} {tokens.of_rows:,} rows."
    refused = (f"{count:,} rows cannot be rendered: {reason}." for reason, count in tokens.not_renderable.items())
    return " ".join((told, *refused))


def _rendered(tokens: TokenReport | None) -> str:
    if tokens is None or not tokens.examples:
        return ""
    rows = "".join(_rendering(example) for example in tokens.examples)
    return f"{rows}<p class=note>Marked: <span class=key>what is trained</span>.</p>"


def _rendering(example: Rendered) -> str:
    shown = "".join(f"<mark>{_text(part.text)}</mark>" if part.trained else _text(part.text) for part in example.parts)
    told = ", ".join(filter(None, (f"line {example.line:,}", example.label, f"{example.tokens:,} tokens")))
    return f"<div class=row><h3>{_text(told)}</h3><pre class=prompt>{shown}</pre></div>"


def _examples(examples: Sequence[Example]) -> str:
    return "".join(_example(example) for example in examples)


def _example(example: Example) -> str:
    parts = []
    for part in example.parts:
        shown = f"<mark>{_text(part.text)}</mark>" if part.trained else _text(part.text)
        more = f" … ({part.characters:,} characters)" if part.characters > len(part.text) else ""
        parts.append(f"<div class=part><span>{_text(part.label)}</span><pre>{shown}{more}</pre></div>")
    return f"<div class=row><h3>line {example.line:,}</h3>{''.join(parts)}</div>"


def _scripts(scripts: Mapping[str, int]) -> str:
    total = sum(scripts.values())
    rows = [
        [
            _text(_TITLES.get(name, name)),
            f"{count:,}",
            f"<div class=share><i style='width:{100 * count / total:.1f}%'></i></div>",
        ]
        for name, count in scripts.items()
    ]
    return _table(("Script of most letters", "Rows", ""), rows, [1]) if rows else ""


def _columns(report: DatasetReport) -> str:
    rows = []
    for name, count in report.columns_seen.items():
        stored = "beside the row" if name in report.extra_kept else "read"
        lost = report.extra_dropped.get(name)
        rows.append([_text(name), f"{count:,}", f"left out of {lost:,} rows" if lost else stored])
    others = [name for name in report.extra_dropped if name not in report.columns_seen]
    rows += [[_text(name), "", f"left out of {report.extra_dropped[name]:,} rows"] for name in others]
    return _table(("Column", "Rows", "Stored"), rows, [1]) if rows else ""


# --- Markdown ----------------------------------------------------------------------------------------------


def as_markdown(report: DatasetReport, title: str) -> str:
    """The report in short, for the Prefect page; the picture is a data address inside it."""
    counts = [(name, value) for name, value, _ in _counts(report)]
    parts = [f"# {_plain(title)}", _markdown_table(("Dataset", _plain(title)), counts)]
    parts += [f"- {_plain(note)}" for note in report.notes]
    if report.overlap is not None:
        parts.append(_plain(overlap_sentence(report.overlap, report.rows_kept, report.kind)))
    if report.problems:
        told = [(f"{item.kind} ({item.count:,})", _where(item), item.message) for item in report.problems]
        parts += ["## Refused and skipped", _markdown_table(("Problem", "Where", "What"), told)]
    lengths = [(name, *_lengths(field.characters)) for name, field in report.fields.items()]
    names = ("Field", "shortest", "mean", "median", "95 %", "longest")
    parts += ["## Lengths in characters", _markdown_table(names, lengths)] if lengths else []
    if report.tokens is not None:
        parts += _markdown_tokens(report.tokens)
    else:
        parts += ["## Examples", *(_markdown_example(example) for example in report.examples)]
    return "\n\n".join(parts) + "\n"


def _where(problem: Problem) -> str:
    return html.unescape(_place(problem))


def _markdown_tokens(tokens: TokenReport) -> list[str]:
    parts = ["## Tokens", _plain(tokens_sentence(tokens))]
    if tokens.histogram:
        parts.append(f"![Histogram of the lengths in tokens]({pages.png_address(draw_tokens(tokens))})")
    parts.append("## What training reads")
    for example in tokens.examples:
        told = ", ".join(filter(None, (f"line {example.line:,}", example.label, f"{example.tokens:,} tokens")))
        shown = "".join(f"⟦{part.text}⟧" if part.trained else part.text for part in example.parts)
        parts += [f"{_plain(told)}; between ⟦ and ⟧: what is trained", _block(shown)]
    return parts


def _markdown_example(example: Example) -> str:
    told = "\n".join(f"{part.label}: {part.text}" for part in example.parts)
    return f"line {example.line:,}\n\n{_block(told)}"


def _block(text: str) -> str:
    """A text as it is: indented, so that nothing in it ends the block."""
    return "\n".join(f"    {line}" for line in text.splitlines()) or "    "


def _markdown_table(names: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return pages.table([_plain(name) for name in names], [[_plain(cell) for cell in row] for row in rows])


def _plain(text: str) -> str:
    """A text inside of Markdown, on one line."""
    return pages.text(" ".join(text.split()))
