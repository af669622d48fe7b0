"""The prompts that a model answers while it is trained, with their reference answers, and how long answers may be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods import contract
from methods.contract import Refused
from methods.toolkit import row_reports, tokenizing
from methods.toolkit.chat import Message, RenderError, render_prompt
from methods.toolkit.tokenizing import RowReport, note


def prepare_prompts(job: contract.Job, tokenizer: Any) -> tuple[Any, Any | None]:
    """Make prompts of the training and validation rows of the job and report what was kept and cut.

    Returns two datasets, the second None without validation rows, with the columns `prompt` (the messages before the
    last answer), `reference` (that answer), `line` and `length` (of the prompt in tokens). Raises Refused if a
    prompt is too long and `over_length` is `error`, or if none is left.
    """
    train, report = _read(job, tokenizer, Path(job.inputs["train_rows"]), job.parameters["max_samples"])
    reports = {"train": report}
    validation = None
    if job.inputs.get("validation_rows"):
        validation, reports["validation"] = _read(job, tokenizer, Path(job.inputs["validation_rows"]), -1)
    row_reports.tell(job, {split: _told(each) for split, each in reports.items()})
    return train, validation


def prompt_limit(parameters: dict[str, Any]) -> int:
    """Longest prompt in tokens: max_input_length, else what max_seq_length leaves beside the answer, at least half."""
    sequence = parameters["max_seq_length"]
    if parameters["max_input_length"] is not None:
        return int(min(parameters["max_input_length"], sequence - 1))
    return int(sequence - min(parameters["max_content_length"] or sequence, sequence // 2))


def answer_limit(job: contract.Job, longest: int) -> int:
    """Longest answer in tokens, where the longest prompt has `longest`.

    max_content_length, else half of max_seq_length; never more than max_seq_length leaves beside the prompt.
    """
    p = job.parameters
    room = p["max_seq_length"] - longest
    if p["max_content_length"] is not None and p["max_content_length"] > room:
        job.warning(
            f"answers are cut at {room} tokens, not at max_content_length ({p['max_content_length']}): the longest "
            f"prompt has {longest} tokens, and max_seq_length is {p['max_seq_length']}"
        )
    return int(min(p["max_content_length"] or p["max_seq_length"] // 2, room))


def _read(job: contract.Job, tokenizer: Any, path: Path, limit: int) -> tuple[Any, RowReport]:
    from datasets import Dataset

    p, report = job.parameters, RowReport()
    rows = []
    for line, messages in tokenizing.read_messages(path, limit):
        report.read += 1
        prompt = _fitted(tokenizer, messages, line, p, report)
        if prompt is None:
            continue
        length = len(render_prompt(tokenizer, prompt))
        report.kept += 1
        report.tokens += length
        report.longest = max(report.longest, length)
        rows.append({"prompt": prompt, "reference": messages[-1]["content"], "line": line, "length": length})
    if not rows:
        reasons = "; ".join(report.notes[:3]) or "the dataset has no rows"
        raise Refused(
            f"nothing to train on: of {report.read} prompts {report.dropped_over_length} are over a length limit, "
            f"{report.not_renderable} cannot be rendered ({reasons}). Raise max_input_length or max_seq_length (now "
            f"{p['max_input_length']} and {p['max_seq_length']}) or look at the dataset report."
        )
    return Dataset.from_list(rows), report


def _fitted(
    tokenizer: Any, messages: list[Message], line: int, p: dict[str, Any], report: RowReport
) -> list[Message] | None:
    """The prompt of a row, cut if it is too long and may be; None if the row is left out."""
    limit = prompt_limit(p)
    try:
        length = len(render_prompt(tokenizer, messages[:-1]))
    except RenderError as error:
        report.not_renderable += 1
        note(report, f"line {line}: {error}")
        return None
    if length <= limit:
        return messages[:-1]
    rule = f"max_input_length is {limit}" if p["max_input_length"] else f"max_seq_length leaves it {limit}"
    excess = f"{length} tokens before the last answer, {rule}"
    if p["over_length"] == "error":
        raise Refused(f"line {line}: {excess}. Raise the limit, or set over_length to drop or truncate.")
    if p["over_length"] == "truncate":
        shorter = tokenizing.shorten_question(tokenizer, messages, limit)[:-1]
        left = len(render_prompt(tokenizer, shorter))
        if left <= limit:
            report.truncated += 1
            report.tokens_cut += length - left
            note(report, f"line {line} cut: {excess}")
            return shorter
        excess += " even without its question"
    report.dropped_over_length += 1
    note(report, f"line {line} dropped: {excess}")
    return None


def _told(report: RowReport) -> row_reports.Told:
    # No token of a prompt is trained: the counts of trained ones would say nothing.
    untold = ("supervised_tokens", "without_supervised_token", "supervised_share")
    counts = {name: value for name, value in report.as_dict().items() if name not in untold}
    words = f"{report.kept} of {report.read} prompts, {report.tokens} tokens, longest {report.longest}"
    return row_reports.Told(counts, words, report.lost, report.truncated, report.notes)
