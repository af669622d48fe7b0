"""A family × method cell of the table: a method's stages run on the family's tiny model, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from methods import contract
from methods.registry import find_method
from methods.toolkit import row_reports
from tasks.stages import StageFailed, StageJob
from tests.families import family_rows
from tests.families.family_models import Family, make_model
from tests.methods.stage_jobs import open_job, run_method, training_job

State = Literal["ok", "refused", "failed", "none"]

REWARDS = '''\
"""A reward that differs from one random answer to the next."""


def letters(prompts, completions, **columns):
    return [float(len(set(answer))) for answer in completions]
'''


@dataclass(frozen=True)
class Case:
    """A column of the table: a method with rows of a form.

    `needs`: the attribute of a family without which the cell is empty. `saved`: what it trains can be merged into
    the base.
    """

    title: str
    method: str
    rows: Callable[[Family], list[family_rows.Row]]
    parameters: dict[str, Any]
    needs: str | None = None
    saved: bool = True

    def applies_to(self, family: Family) -> bool:
        """Whether the family has what the case is about."""
        return self.needs is None or bool(getattr(family, self.needs))


@dataclass(frozen=True)
class Cell:
    """What came of a case: `kept` of `read` rows were trained; `reason` says why not.

    Where the template rewrites earlier turns, a conversation counts as a row for each answer.
    """

    family: str
    case: str
    state: State
    kept: int = 0
    read: int = 0
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        """All fields by name."""
        return asdict(self)


_SFT: dict[str, Any] = {"max_steps": 2}
_PEFT: dict[str, Any] = {"max_steps": 2, "num_virtual_tokens": 4, "adapter_len": 4}

CASES = (
    Case("sft, one turn", "sft", family_rows.one_turn, _SFT),
    Case("sft, many turns", "sft", family_rows.many_turns, _SFT),
    Case("sft, system", "sft", family_rows.with_system, _SFT, needs="system"),
    Case("sft, thoughts", "sft", family_rows.with_thoughts, _SFT, needs="thinking"),
    Case("sft, tools", "sft", family_rows.with_tools, _SFT, needs="tools"),
    Case("dpo", "dpo", family_rows.preferences, {"max_steps": 2}),
    Case(
        "grpo",
        "grpo",
        family_rows.prompts,
        {
            "max_steps": 2,
            "num_generations": 4,
            "batch_size": 4,
            "temperature": 2.0,
            "max_content_length": 8,
            "rewards": [{"name": "letters"}],
        },
    ),
    Case("reward", "reward", family_rows.preferences, {"max_steps": 2}),
    Case("peft, lora", "peft", family_rows.prompts, {"technique": "lora", "max_steps": 2}),
    Case("peft, dora", "peft", family_rows.prompts, {"technique": "dora", "max_steps": 2}),
    Case("peft, adalora", "peft", family_rows.prompts, {"technique": "adalora", "max_steps": 3}),
    Case("peft, ia3", "peft", family_rows.prompts, {"technique": "ia3", "max_steps": 2}),
    *(
        Case(f"peft, {technique}", "peft", family_rows.prompts, {"technique": technique, **_PEFT}, saved=False)
        for technique in ("prompt_tuning", "p_tuning", "prefix_tuning", "llama_adapter")
    ),
)

BY_TITLE = {case.title: case for case in CASES}
IN_PROCESSES = {("Qwen3", title) for title in ("sft, one turn", "dpo", "grpo", "reward", "peft, lora")}
"""The cells whose stages run in processes of their own, as the system runs them."""

_COMMON: dict[str, Any] = {
    "batch_size": 2,
    "grad_accum_steps": 1,
    "max_seq_length": 1024,
    "learning_rate": 0.01,
    "lora_rank": 4,
    "dtype": "float32",
}


def run_cell(family: Family, case: Case, folder: Path) -> Cell:
    """Train, save and ask; every failure of a stage becomes the cell's state and reason."""
    if not case.applies_to(family):
        return Cell(family.name, case.title, "none")
    try:
        _run_stages(family, case, folder)
    except contract.Refused as refusal:
        return _ended(family, case, "refused", refusal, folder)
    except Exception as error:
        return _ended(family, case, "failed", error, folder)
    kept, read = _rows_of(folder)
    return Cell(family.name, case.title, "ok", kept, read)


def _ended(family: Family, case: Case, state: State, error: Exception, folder: Path) -> Cell:
    told = str(error) if state == "refused" else f"{type(error).__name__}: {error}"
    kept, read = _rows_of(folder)
    return Cell(family.name, case.title, state, kept, read, _shortened(told, folder))


def _shortened(text: str, folder: Path) -> str:
    """The first sentence, up to the way out of it; without the paths of a run and the type of the model."""
    text = re.sub(rf"{re.escape(str(folder))}\S*", "MODEL", " ".join(text.split()))
    kind = json.loads((folder / "base" / "config.json").read_text(encoding="utf-8"))["model_type"]
    text = re.sub(rf"'{kind}'|\b{kind}\b", "TYPE", text)
    return re.split(r"[.;] ", text)[0].rstrip(".")[:200]


def _rows_of(folder: Path) -> tuple[int, int]:
    path = folder / "training" / row_reports.ROWS_FILE
    if not path.exists():
        return 0, 0
    counts = json.loads(path.read_text(encoding="utf-8"))["train"]
    return int(counts["kept"]), int(counts["read"]) + int(counts.get("added", 0))


def _run_stages(family: Family, case: Case, folder: Path) -> None:
    base = make_model(family, folder / "base")
    rows = case.rows(family)
    job = _training_job(case, base, family_rows.write_rows(folder / "rows.jsonl", rows), folder)
    run = _in_processes if (family.name, case.title) in IN_PROCESSES else _in_this_process
    trained = run(folder / "training", case.method, job)
    requests = family_rows.write_rows(folder / "requests.jsonl", _requests(case, rows))
    weights = (
        {"base_model": str(base), "adapter": str(job.output)} if trained["adapter"] else {"model": str(job.output)}
    )
    _ask(run, case, folder / "customized", weights, requests)
    if not case.saved:
        return
    saving = StageJob(
        stage="saving",
        parameters={"dtype": "float32"},
        inputs={"base_model": str(base), "trained": str(job.output), "adapter": trained["adapter"]},
        output=folder / "saving" / "output",
        seed=0,
    )
    run(folder / "saving", case.method, saving)
    if case.method != "reward":
        _require_ends(family, saving.output)
    _ask(run, case, folder / "complete", {"model": str(saving.output)}, requests)


def _training_job(case: Case, base: Path, rows: Path, folder: Path) -> StageJob:
    given = {**_COMMON, **case.parameters}
    if case.method == "peft" and given["technique"] not in ("lora", "dora"):
        del given["lora_rank"]
    if case.method == "grpo":
        path = folder / "rewards.py"
        path.write_text(REWARDS)
        given |= {"reward_file": str(path)}
    return training_job(folder / "training", base, rows, method=case.method, **given)


Run = Callable[[Path, str, StageJob], dict[str, Any]]


def _in_this_process(folder: Path, method: str, job: StageJob) -> dict[str, Any]:
    file = find_method(method).stage_file(job.stage)  # type: ignore[arg-type]
    stage = import_module(f"methods.{file.parent.name}.{file.stem}")
    result: dict[str, Any] = stage.main(open_job(folder, job))
    return result


def _in_processes(folder: Path, method: str, job: StageJob) -> dict[str, Any]:
    try:
        return run_method(folder, job, method=method)
    except StageFailed as failure:
        result = json.loads((folder / contract.RESULT_FILE).read_text(encoding="utf-8"))
        raise contract.Refused(result["error"]) if result.get("refused") else failure from None


def _requests(case: Case, rows: list[family_rows.Row]) -> list[family_rows.Row]:
    if case.method == "reward":
        return [
            {"prompt": row["prompt"], "answers": [row[side][0]["content"] for side in ("chosen", "rejected")]}
            for row in rows
        ]
    if case.method == "dpo":
        return [{"messages": row["prompt"]} for row in rows]
    return [{**row, "messages": row["messages"][:-1]} for row in rows]


def _ask(run: Run, case: Case, folder: Path, weights: dict[str, str], requests: Path) -> None:
    """Ask the model every request; raises AssertionError where an answer is missing."""
    stage = "inference-customized" if "adapter" in weights else "inference-complete"
    job = StageJob(
        stage=stage,
        parameters={
            "max_new_tokens": 4,
            "temperature": 0.0,
            "top_p": 1.0,
            "top_k": 50,
            "batch_size": 4,
            "dtype": "float32",
        },
        inputs={**weights, "requests": str(requests)},
        output=folder / "output",
        seed=1,
    )
    run(folder, case.method, job)
    asked = [json.loads(line) for line in requests.read_text(encoding="utf-8").splitlines()]
    given = (job.output / "predictions.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    assert len(given) == len(asked)
    if case.method != "reward":
        _require_served_prompts(weights, asked, [json.loads(line)["prompt_token_ids"] for line in given])


def _require_ends(family: Family, complete: Path) -> None:
    """A server of the complete model stops at the family's end tokens."""
    from transformers import AutoTokenizer, GenerationConfig

    configured = GenerationConfig.from_pretrained(complete).eos_token_id
    ends = AutoTokenizer.from_pretrained(complete).convert_ids_to_tokens(
        configured if isinstance(configured, list) else [configured]
    )
    assert {*family.ends, *family.tool_ends} <= set(ends), f"the complete model stops at {ends} only"


def _require_served_prompts(weights: dict[str, str], asked: list[dict[str, Any]], prompts: list[list[int]]) -> None:
    """What the model was asked with is what the saved tokenizer renders by itself, as a server does."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(weights.get("adapter") or weights["model"])
    for request, prompt in zip(asked, prompts, strict=True):
        served = tokenizer.apply_chat_template(
            request["messages"], tools=request.get("tools"), add_generation_prompt=True, return_dict=False
        )
        assert prompt == served, f"asked: {tokenizer.decode(prompt)!r}, served: {tokenizer.decode(served)!r}"
