"""The test-kit on a method that needs nothing but Python: a good one passes, and each fault is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from methods.registry import find_method
from tasks.method_checks import CheckResult, check_method
from tests.own_methods import install_method

TRAINING = """
import json
import time
from pathlib import Path
from methods import contract

def main(job):
    Path(job.inputs["train_rows"]).read_text()
    begun = int(job.resume_from.name.removeprefix("checkpoint-")) if job.resume_from else 0
    for step in range(begun + 1, job.parameters["max_steps"] + 1):
        time.sleep(0.01)
        job.metrics(step, loss=1 / step, tokens_per_second=time.time())
        job.progress(step, job.parameters["max_steps"])
        if step % job.parameters["checkpoint_steps"] == 0 or job.cancelled:
            checkpoint = job.checkpoints / f"checkpoint-{step}"
            checkpoint.mkdir(parents=True, exist_ok=True)
            contract.mark_complete(checkpoint)
        if job.cancelled:
            raise contract.Cancelled
    (job.output / "adapter.safetensors").write_text(str(job.parameters["max_steps"]))
    return {"model": str(job.output), "adapter": True}

if __name__ == "__main__":
    contract.run(main)
"""
SAVING = """
import shutil
from methods import contract

def main(job):
    shutil.copy(job.inputs["trained"] + "/adapter.safetensors", job.output)
    return {"model": str(job.output), "dtype": "float32", "verification": {"difference": 0.0}}

if __name__ == "__main__":
    contract.run(main)
"""
INFERENCE = """
import json
from pathlib import Path
from methods import contract

def main(job):
    assert Path(job.inputs.get("adapter") or job.inputs["model"]).is_dir()
    answer = {"answer": "on", "tokens": 1, "hit_limit": False, "prompt_token_ids": [1]}
    lines = [json.dumps(answer) + "\\n" for _ in Path(job.inputs["requests"]).read_text().splitlines()]
    (job.output / "predictions.jsonl").write_text("".join(lines))
    return {}

if __name__ == "__main__":
    contract.run(main)
"""
CHECK = """
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
(folder / "base_model").mkdir()
for name in ("train_rows", "validation_rows", "requests"):
    messages = [{"role": "user", "content": "on?"}, {"role": "assistant", "content": "on"}]
    (folder / f"{name}.jsonl").write_text(json.dumps({"line": 1, "messages": messages}) + "\\n")
(folder / "parameters.json").write_text(json.dumps({"strength": 2}))
"""
FILES = {
    "training": TRAINING,
    "saving": SAVING,
    "inference-customized": INFERENCE,
    "inference-complete": INFERENCE,
    "check": CHECK,
}
ALL = (
    *("tiny model", "training", "inference-customized", "saving", "inference-complete"),
    *("cancelling", "resuming", "a failing job"),
)


@pytest.fixture(autouse=True)
def _short_grace(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_GRACE_SECONDS", "2")


def write_method(file: str = "", old: str = "", new: str = "", **changes: object) -> None:
    """The good method, with one text of one of its files replaced."""
    stages = {name: {"file": f"{name}.py", "environment": "host"} for name in FILES if name != "check"}
    given: dict[str, object] = {"lifecycle": ["customized", "complete"], "stages": stages}
    given["parameters"] = {"strength": {"type": "integer", "required": True}}
    folder = install_method(**{**given, **changes})
    for name, text in FILES.items():
        assert name != file or old in text
        (folder / f"{name}.py").write_text(text.replace(old, new) if name == file else text)


def checked() -> dict[str, CheckResult]:
    told: list[CheckResult] = []
    results = check_method(find_method("mine"), told.append)
    assert told == results
    return {result.check: result for result in results}


def test_a_good_method_passes_and_leaves_nothing(home: Path) -> None:
    write_method()
    results = checked()
    assert [(name, result.ok) for name, result in results.items()] == [(name, True) for name in ALL]
    assert results["training"].detail.startswith("an adapter, loss 1 → 0.167 in 6 steps")
    assert results["resuming"].detail == "from step 4: the same weights, and the same 2 points of 1 curves"
    assert "no process left" in results["cancelling"].detail
    assert results["saving"].detail == "difference 0"
    assert list((home / "checks").iterdir()) == []


@pytest.mark.parametrize(
    ("check", "file", "old", "new", "told"),
    [
        ("training", "training", "job.metrics(", "dict(step=", "no metrics"),
        ("training", "training", ', "adapter": True', "", "does not say whether it has left an adapter"),
        ("training", "training", "(job.output / ", "(job.folder / ", "has left nothing in job.output"),
        ("training", "training", 'str(job.output), "ad', '"elsewhere", "ad', "not the folder that it was to fill"),
        ("tiny model", "check", '"strength": 2', "", "a required parameter is missing"),
        ("tiny model", "check", '"strength": 2', '"strength": 2, "epoch": 1', "does not take: epoch"),
        ("saving", "saving", ', "verification": {"difference": 0.0}', "", "no verification"),
        ("inference-complete", "inference-complete", "lines = ", "lines = [] and ", "1 requests have 0 predictions"),
        ("inference-customized", "inference-customized", '"tokens": 1, ', "", "this is no answer: tokens"),
        ("cancelling", "training", "or job.cancelled:", "or False:", "no whole checkpoint"),
        ("cancelling", "training", "if job.cancelled:\n", "if False:\n", "killed after"),
        ("resuming", "training", "if job.resume_from else 0", "if False else 0", "begun anew"),
        ("resuming", "training", "loss=1 / step", "loss=1 / (step + begun)", "loss at step 5 is 0.111"),
        ("resuming", "training", "write_text(str(job", "write_text(str(begun) + str(job", "the weights are not"),
        ("a failing job", "training", 'Path(job.inputs["train_rows"]).read_text()', "", "says that it has completed"),
        ("tiny model", "check", '"requests"', '"rows"', "has not left requests.jsonl"),
        ("tiny model", "check", "folder = ", "1 / 0\nfolder = ", "ZeroDivisionError"),
    ],
)
def test_each_fault_is_found_and_told(home: Path, check: str, file: str, old: str, new: str, told: str) -> None:
    write_method(file, old, new)
    results = checked()
    assert [name for name, result in results.items() if result.ok is False] == [check]
    assert told in results[check].detail
    assert list((home / "checks").iterdir())  # kept, to be looked at


def test_a_method_that_is_not_deterministic_only_has_to_go_on() -> None:
    write_method("training", "loss=1 / step", "loss=time.time()", deterministic=False)
    assert checked()["resuming"].detail == "went on from step 4 to 6"


def test_an_environment_that_is_not_there_is_told_with_the_command_that_makes_it(home: Path) -> None:
    write_method()
    folder = find_method("mine").folder
    (folder / "environment.yml").write_text("name: songs\ndependencies: [python=3.11]\n")
    manifest = folder / "method.yaml"
    manifest.write_text(manifest.read_text().replace("environment: host", "environment: songs", 1))
    (result,) = checked().values()
    assert (result.check, result.ok) == ("environment of training", False)
    assert "tuneline envs create mine" in result.detail


@pytest.mark.parametrize(
    ("hardware", "told"),
    [({"linux": False, "macos": True}, "runs on macOS only"), ({"gpu": "required"}, "needs a GPU")],
)
def test_a_method_that_the_platform_cannot_run_is_left_out_with_the_reason(
    hardware: dict[str, object], told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("TUNELINE_GPUS", "")
    write_method(hardware=hardware)
    (result,) = checked().values()
    assert (result.ok, result.check) == (None, "platform")
    assert told in result.detail
