"""The contract test-kit: every stage of a method on a tiny model, then cancelling, resuming and failing.

The model and the rows are made on the spot by the method's `check.py`, or, for chat models, by the toolkit; the files
that are left are described in `methods/toolkit/tiny_models.py`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from pydantic import BaseModel, ValidationError

from configs.errors import UserError
from configs.method_values import OWN, checked_values
from configs.records import ModelRecord
from configs.settings import Settings, load_settings
from configs.train import TrainConfig
from methods import contract, supervisor
from methods.registry import Method, StageName
from tasks.files import last_lines
from tasks.gpus import borrowing_slot, host_slots
from tasks.inference import Answer
from tasks.measuring import TEXT_KINDS
from tasks.processes import STAGE_FOLDER_VARIABLE
from tasks.stages import EventTail, StageCancelled, StageFailed, StageJob, run_stage, stage_environment

CHECK_FILE = "check.py"
STAGE_SECONDS = 1800.0
_FOR_EVER = 100_000
_TINY = {
    "max_steps": 6,
    "batch_size": 2,
    "checkpoint_steps": 2,
    "keep_checkpoints": 10,
    "evaluation_steps": 3,
    "max_seq_length": 128,
    "learning_rate": 0.01,
    "lora_rank": 4,
    "dtype": "float32",
}
"""What makes a train short; each of them where the method uses it, and takes the value."""
_OF_THE_CLOCK = ("second", "memory")  # curves with these words differ from run to run


class CheckResult(BaseModel):
    """One line of the table: `ok` is None for what was left out, and `detail` then says why."""

    method: str
    check: str
    ok: bool | None
    detail: str
    seconds: float


class _Wrong(Exception):
    """What a stage did that the contract does not allow."""


class _Left(NamedTuple):
    """What a training has left."""

    folder: Path
    path: Path
    adapter: bool
    curves: dict[str, dict[int, float]]


def check_method(
    method: Method, on_result: Callable[[CheckResult], None] = lambda result: None, *, keep: bool = False
) -> list[CheckResult]:
    """Run every stage that the method declares, and what else the contract asks; `on_result` is told each result.

    The job folders are kept if anything is wrong, or if asked for.
    """
    settings = load_settings()
    missing = _why_not_here(method)
    if missing is not None:
        result = CheckResult(method=method.name, check="platform", ok=None, detail=missing, seconds=0)
        on_result(result)
        return [result]
    with _folder(method, settings) as folder, borrowing_slot(folder.name, lambda events: None):
        kit = _Kit(method, folder, on_result)
        kit.run_all()
        if not keep and all(result.ok is not False for result in kit.results):
            shutil.rmtree(folder)
    return kit.results


def _why_not_here(method: Method) -> str | None:
    """Why this platform cannot run the method; None if it can."""
    hardware = method.hardware
    if sys.platform == "linux" and not hardware.linux:
        return "runs on macOS only"
    if sys.platform == "darwin" and not hardware.macos:
        return "does not run on macOS"
    if hardware.gpu == "required" and not host_slots():
        return "needs a GPU, and this host has none for trains"
    return None


@contextmanager
def _folder(method: Method, settings: Settings) -> Iterator[Path]:
    """A folder for the jobs, without those of earlier checks of the method."""
    root = settings.root / "checks"
    for left in root.glob(f"{method.name}.*"):
        if not psutil.pid_exists(int(left.suffix[1:])):
            shutil.rmtree(left, ignore_errors=True)
    folder = root / f"{method.name}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder


class _Kit:
    """The checks of one method, in order; what needs a result that is not there is left out."""

    def __init__(self, method: Method, folder: Path, on_result: Callable[[CheckResult], None]) -> None:
        self.method, self.folder, self.on_result = method, folder, on_result
        self.material = folder / "material"
        self.results: list[CheckResult] = []
        self.left: _Left | None = None
        self.complete: Path | None = None

    def run_all(self) -> None:
        """Run the checks."""
        missing = [stage for stage in self.method.stages if not self._is_there(stage)]
        if missing or not self._check("tiny model", self._make_material):
            return
        if "training" in self.method.stages:
            self._check("training", self._train)
        if self.left is not None and self.left.adapter:
            self._check_if_there("inference-customized", self._infer, self._weights(self.left.path, adapter=True))
        if self.left is not None:
            self._check_if_there("saving", self._save)
        whole = self.complete or (self.material / "base_model" if self.left is None else None)
        whole = whole or (self.left.path if self.left is not None and not self.left.adapter else None)
        self._check_if_there("inference-complete", self._infer, self._weights(whole or self.material / "base_model"))
        self._check_if_there("deploying", self._deploy)
        if self.left is not None:
            self._check("cancelling", self._cancel)
            self._check("resuming", self._resume)
        if "training" in self.method.stages:
            self._check("a failing job", self._fail)

    def _check_if_there(self, stage: StageName, check: Callable[..., str], *given: Any) -> None:
        if stage in self.method.stages:
            self._check(stage, check, *given)

    def _check(self, name: str, check: Callable[..., str], *given: Any) -> bool:
        """Do one check and tell how it went; False if something is wrong."""
        began = time.monotonic()
        try:
            detail, ok = check(*given), True
        except (_Wrong, UserError, StageFailed) as error:
            detail, ok = str(error), False
        except StageCancelled:
            detail, ok = "the stage ended as if it had been cancelled", False
        seconds = round(time.monotonic() - began, 1)
        result = CheckResult(method=self.method.name, check=name, ok=ok, detail=detail, seconds=seconds)
        self.results.append(result)
        self.on_result(result)
        return ok

    # --- what is needed -------------------------------------------------------------------------------------

    def _is_there(self, stage: StageName) -> bool:
        """Whether the stage's environment is there; told only if it is not, with the command that makes it."""
        try:
            self.method.stage_python(stage)
        except UserError:
            return self._check(f"environment of {stage}", lambda: str(self.method.stage_python(stage)))
        return True

    def _make_material(self) -> str:
        """Let the method, or the toolkit, make a tiny model and rows."""
        self.material.mkdir()
        own = self.method.folder / CHECK_FILE
        if own.is_file():
            first = next(iter(self.method.stages))
            stage: StageName = "training" if "training" in self.method.stages else first
            command = [str(self.method.stage_python(stage)), str(own), str(self.material)]
        elif self.method.types == ["chat"]:
            from methods.toolkit import tiny_models

            command = [sys.executable, tiny_models.__file__, str(self.material), self.method.kinds[0]]
        else:
            raise _Wrong(f"no tiny model of this type is known: put a {CHECK_FILE} beside the manifest that makes one")
        log = self.folder / "material.log"
        with log.open("wb") as file:
            done = subprocess.run(command, stdout=file, stderr=file, env=stage_environment(), check=False)
        if done.returncode != 0:
            raise _Wrong(f"it ended with exit code {done.returncode}; the end of {log}:\n{last_lines(log, 15)}")
        for name in ("base_model", "train_rows.jsonl", "validation_rows.jsonl", "requests.jsonl", "parameters.json"):
            if not (self.material / name).exists():
                raise _Wrong(f"{own.name if own.is_file() else 'the toolkit'} has not left {name}")
        self._config()  # what parameters.json says is refused here, not in every stage
        return f"{_lines(self.material / 'train_rows.jsonl')} rows of the kind {self.method.kinds[0]}"

    def _config(self, **changes: Any) -> TrainConfig:
        """The configuration of a short train; `changes` are hyper-parameters. Raises UserError."""
        given = json.loads((self.material / "parameters.json").read_text(encoding="utf-8"))
        method = self.method
        own = {name: value for name, value in given.items() if name in method.parameters}
        files = [name for name, value in own.items() if value is not None and method.takes_file(name)]
        own |= {name: str(self.material / own[name]) for name in files}
        taken = {name: value for name, value in _TINY.items() if self._takes(name, value)}
        common = {name: value for name, value in given.items() if name not in own}
        hyper = {**method.hyperparameter_defaults, **taken, **common, **changes}
        used = {name: value for name, value in hyper.items() if name in method.hyperparameter_names}
        unknown = [name for name in common if name not in method.hyperparameter_names and name != "max_new_tokens"]
        if unknown:
            raise _Wrong(f"parameters.json names what the method does not take: {', '.join(unknown)}")
        new_tokens = int(used.pop("max_new_tokens", common.get("max_new_tokens", 8)))
        values = {"name": "check", "method": method.name, "base_model": "tiny", "dataset": "tiny"}
        config = TrainConfig.model_validate(
            {**values, "max_new_tokens": new_tokens, "hyperparameters": used, OWN: {**self._models_by_name(), **own}}
        )
        return checked_values(config)

    def _takes(self, name: str, value: Any) -> bool:
        return value in self.method.hyperparameters.choices.get(name, [value])

    def _models(self) -> dict[str, dict[str, Any]]:
        """The models that the training is given, with the paths made absolute."""
        file = self.material / "models.json"
        found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for model in found.values():
            for name in ("path", "base_model"):
                model[name] = str(self.material / model[name]) if model.get(name) else None
        return found

    def _models_by_name(self) -> dict[str, str]:
        return dict.fromkeys(self._models(), "tiny")

    def _training_job(self, folder: Path, resume: Path | None = None, /, **changes: Any) -> StageJob:
        config = self._config(**changes)
        files = {
            name: config.method_params[name]
            for name in self.method.parameters
            if self.method.takes_file(name) and config.method_params[name] is not None
        }
        return StageJob(
            stage="training",
            parameters=self.method.job_parameters(config),
            inputs={
                "base_model": str(self.material / "base_model"),
                "train_rows": str(self.material / "train_rows.jsonl"),
                "validation_rows": str(self.material / "validation_rows.jsonl"),
                "models": self._models(),
                "files": files,
            },
            output=folder / "output",
            resume_from=resume,
            seed=config.hyperparameters.seed,
        )

    def _run(
        self, folder: Path, job: StageJob, stage: StageName, until: Callable[[list[dict[str, Any]]], bool] | None = None
    ) -> dict[str, Any]:
        """Run a stage; it is asked to stop once `until` holds of its events, or after half an hour."""
        python, file = self.method.stage_python(stage), self.method.stage_file(stage)
        with _watched(folder, until) as watch:
            try:
                return run_stage(folder, job, python, file, load_settings().grace_seconds, lambda events: None)
            except StageCancelled:
                if watch.late:
                    log = folder / contract.LOG_FILE
                    raise _Wrong(f"it was not ready after {STAGE_SECONDS:.0f} s; its log is {log}") from None
                raise

    # --- stages ---------------------------------------------------------------------------------------------

    def _train(self) -> str:
        folder = self.folder / "training"
        result = self._run(folder, self._training_job(folder), "training")
        left = _what_is_left(folder, result)
        if not left.curves:
            raise _Wrong("it has reported no metrics, so the train would have no curves")
        self.left = left
        return f"{'an adapter' if left.adapter else 'whole weights'}, {_told(left.curves)}"

    def _weights(self, path: Path, *, adapter: bool = False) -> dict[str, str]:
        if adapter:
            return {"base_model": str(self.material / "base_model"), "adapter": str(path)}
        return {"model": str(path)}

    def _infer(self, weights: dict[str, str]) -> str:
        stage: StageName = "inference-customized" if "adapter" in weights else "inference-complete"
        told = []
        requests = self.material / "requests.jsonl"
        if _lines(requests):
            told.append(self._answers(stage, weights, requests))
        kind = self.method.kinds[0]
        if kind not in TEXT_KINDS and kind in self.method.evaluated_kinds:
            told.append(self._figures(stage, weights))
        return "; ".join(told) or "nothing was asked"

    def _answers(self, stage: StageName, weights: dict[str, str], requests: Path) -> str:
        folder = self.folder / stage
        self._run(folder, self._inference_job(stage, folder, {**weights, "requests": str(requests)}), stage)
        file = folder / "output" / "predictions.jsonl"
        if not file.is_file():
            raise _Wrong("it has left no predictions.jsonl")
        asked = [json.loads(line) for line in requests.read_text(encoding="utf-8").splitlines()]
        given = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
        if len(given) != len(asked):
            raise _Wrong(f"{len(asked)} requests have {len(given)} predictions")
        for request, prediction in zip(asked, given, strict=True):
            _refuse_other_prediction(request, prediction)
        return f"{len(given)} requests answered"

    def _figures(self, stage: StageName, weights: dict[str, str]) -> str:
        folder = self.folder / f"{stage}-figures"
        rows = str(self.material / "validation_rows.jsonl")
        result = self._run(folder, self._inference_job(stage, folder, {**weights, "evaluation_rows": rows}), stage)
        figures = result.get("figures")
        if not isinstance(figures, dict) or not figures:
            raise _Wrong("with evaluation_rows its result holds no figures")
        return ", ".join(f"{name} {float(value):.3g}" for name, value in figures.items())

    def _inference_job(self, stage: StageName, folder: Path, inputs: dict[str, str]) -> StageJob:
        parameters = {"max_new_tokens": 8, "temperature": 0.0, "top_p": 1.0, "top_k": 50, "batch_size": 4}
        dtype = self._config().hyperparameters.dtype
        return StageJob(
            stage=stage, parameters={**parameters, "dtype": dtype}, inputs=inputs, output=folder / "output", seed=1
        )

    def _save(self) -> str:
        assert self.left is not None  # noqa: S101 - run_all asks only then
        folder = self.folder / "saving"
        job = StageJob(
            stage="saving",
            parameters={"dtype": self._config().hyperparameters.dtype},
            inputs={
                "base_model": str(self.material / "base_model"),
                "trained": str(self.left.path),
                "adapter": self.left.adapter,
            },
            output=folder / "output",
            seed=0,
        )
        result = self._run(folder, job, "saving")
        for name in ("model", "dtype", "verification"):
            if name not in result:
                raise _Wrong(f"its result has no {name}")
        self.complete = _product(folder, result)
        proof = {name: value for name, value in dict(result["verification"]).items() if isinstance(value, int | float)}
        return ", ".join(f"{name} {float(value):.3g}" for name, value in proof.items())

    def _deploy(self) -> str:
        """Serve it with the method's own server, proved against its inference stage, in an installation of its own."""
        from tasks import deploying, endpoints

        assert self.left is not None  # noqa: S101 - a method that is served was trained before
        whole, base = self.complete, self.material / "base_model"
        model = ModelRecord(
            name="check",
            stage="complete" if whole is not None else "customized",
            path=whole or self.left.path,
            line="check",
            base="tiny",
            base_path=base,
            method=self.method.name,
            adapter=whole is None and self.left.adapter,
            dtype=self._config().hyperparameters.dtype,
        )
        settings = Settings(home=self.folder / "home")
        served = endpoints.deploy(
            "check",
            model.name,
            model.path,
            probes=deploying.collect_probes(model, "custom", lambda events: None),
            target="custom",
            python=self.method.stage_python("deploying"),
            program=self.method.stage_file("deploying"),
            base_path=model.base_path if model.adapter else None,
            dtype=model.dtype,
            settings=settings,
        )
        endpoints.undeploy("check", settings=settings)
        proof = served.deployments[-1].verification
        if proof is None:
            raise _Wrong("it was not asked anything")
        figures = "".join(f", {name} {value:.6g}" for name, value in proof.figures.items())
        return f"{proof.answers_checked} answers the same{figures}"

    # --- what else the contract asks ------------------------------------------------------------------------

    def _cancel(self) -> str:
        """SIGTERM in the middle of training: a whole checkpoint, its own word for it, no process left."""
        folder = self.folder / "cancelling"
        endless = {"max_steps": _FOR_EVER} if "max_steps" in self.method.hyperparameter_names else {"epochs": _FOR_EVER}
        never = dict.fromkeys(("checkpoint_steps", "evaluation_steps"), _FOR_EVER)
        job = self._training_job(folder, **endless, **never)
        asked: list[float] = []

        def in_the_middle(events: list[dict[str, Any]]) -> bool:
            if any(event["type"] in ("metrics", "progress") and event["step"] >= 2 for event in events):
                asked.append(time.monotonic())
            return bool(asked)

        try:
            self._run(folder, job, "training", in_the_middle)
        except StageCancelled:
            took = time.monotonic() - asked[0]
        else:
            raise _Wrong("it has ended before it could be asked to stop")
        left = _processes_of(folder)
        if left:
            raise _Wrong(f"processes are left: {', '.join(left)}")
        result = folder / contract.RESULT_FILE
        if not result.is_file() or json.loads(result.read_text(encoding="utf-8")).get("status") != "cancelled":
            raise _Wrong("asked to stop, it did not raise contract.Cancelled: it was killed after its time of grace")
        whole = contract.complete_checkpoints(folder / "checkpoints")
        if not whole:
            raise _Wrong("it has left no whole checkpoint (contract.mark_complete) to go on from")
        return f"{whole[-1].name} saved, ended {took:.1f} s after SIGTERM, no process left"

    def _resume(self) -> str:
        """Go on from a checkpoint in the middle: the same curves and weights as without the interruption."""
        assert self.left is not None  # noqa: S101 - run_all asks only then
        whole = contract.complete_checkpoints(self.left.folder / "checkpoints")
        last = max(max(points) for points in self.left.curves.values())
        earlier = [each for each in whole if int(each.name.removeprefix("checkpoint-")) < last]
        if not earlier:
            raise _Wrong("the training has left no checkpoint before its end; is checkpoint_steps not used?")
        start = earlier[len(earlier) // 2]
        folder = self.folder / "resuming"
        checkpoint = folder / "checkpoints" / start.name
        shutil.copytree(start, checkpoint)
        result = self._run(folder, self._training_job(folder, checkpoint), "training")
        again = _what_is_left(folder, result)
        step = int(start.name.removeprefix("checkpoint-"))
        if not any(max(points) > step for points in again.curves.values()):
            raise _Wrong(f"it has reported nothing after step {step}")
        if "loss" in again.curves and min(again.curves["loss"]) <= step:
            raise _Wrong(f"it has begun anew instead of going on from step {step}")
        if not self.method.deterministic:
            return f"went on from step {step} to {last}"
        return _compared(self.left, again, step)

    def _fail(self) -> str:
        """A base model and rows that are not there: failed, with a message."""
        folder = self.folder / "failing"
        job = self._training_job(folder)
        gone = {name: str(folder / "gone") for name in ("base_model", "train_rows", "validation_rows")}
        job = job.model_copy(update={"inputs": {**job.inputs, **gone}})
        try:
            self._run(folder, job, "training")
        except (UserError, StageFailed):
            result = folder / contract.RESULT_FILE
            told = json.loads(result.read_text(encoding="utf-8")) if result.is_file() else {}
            if told.get("status") != "failed" or not told.get("error"):
                raise _Wrong("it ended without saying in its result why") from None
            return f"told: {str(told['error']).splitlines()[0]:.100}"
        raise _Wrong("without a base model and rows it says that it has completed")


# --- watching a stage ---------------------------------------------------------------------------------------


class _Watch:
    """Asks a stage to stop when it is time."""

    def __init__(self, folder: Path, until: Callable[[list[dict[str, Any]]], bool] | None) -> None:
        self.folder, self.until = folder, until
        self.over = threading.Event()
        self.late = False

    def watch(self) -> None:
        deadline = time.monotonic() + STAGE_SECONDS
        tail = EventTail(self.folder / contract.EVENTS_FILE)
        while not self.over.wait(0.05):
            if time.monotonic() > deadline:
                self.late = True
            if self.late or (self.until is not None and self.until(tail.read())):
                self._ask_to_stop()
                return

    def _ask_to_stop(self) -> None:
        file = self.folder / supervisor.PROCESS_FILE
        if file.exists():
            psutil.Process(json.loads(file.read_text(encoding="utf-8"))["supervisor"]).terminate()


@contextmanager
def _watched(folder: Path, until: Callable[[list[dict[str, Any]]], bool] | None) -> Iterator[_Watch]:
    watch = _Watch(folder, until)
    thread = threading.Thread(target=watch.watch, daemon=True)
    thread.start()
    try:
        yield watch
    finally:
        watch.over.set()
        thread.join()


def _processes_of(folder: Path) -> list[str]:
    """What runs of a job, by name; known by the environment that everything of it inherits."""
    found = []
    for process in psutil.process_iter(["name"]):
        try:
            running = process.status() != psutil.STATUS_ZOMBIE
            if running and process.environ().get(STAGE_FOLDER_VARIABLE) == str(folder):
                found.append(f"{process.info['name']} ({process.pid})")
        except (psutil.Error, OSError):  # ended since, or another user's
            continue
    return found


# --- what a stage has left ----------------------------------------------------------------------------------


def _what_is_left(folder: Path, result: dict[str, Any]) -> _Left:
    adapter = result.get("adapter")
    if not isinstance(adapter, bool):
        raise _Wrong("its result does not say whether it has left an adapter (`adapter: true` or `false`)")
    return _Left(folder, _product(folder, result), adapter, _curves(folder))


def _product(folder: Path, result: dict[str, Any]) -> Path:
    path = Path(str(result.get("model")))
    if path != folder / "output":
        raise _Wrong(f"`model` in its result is {path}, not the folder that it was to fill (job.output)")
    if not any(path.iterdir()):
        raise _Wrong("it has left nothing in job.output")
    return path


def _curves(folder: Path) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for event in EventTail(folder / contract.EVENTS_FILE).read():
        for name, value in event["values"].items() if event["type"] == "metrics" else ():
            found.setdefault(name, {})[event["step"]] = value
    return found


def _told(curves: dict[str, dict[int, float]]) -> str:
    name = "loss" if "loss" in curves else next(iter(curves))
    points = [curves[name][step] for step in sorted(curves[name])]
    return (
        f"{name} {points[0]:.3g} → {points[-1]:.3g} in {max(curves[name])} steps, curves: {', '.join(sorted(curves))}"
    )


def _refuse_other_prediction(request: dict[str, Any], prediction: dict[str, Any]) -> None:
    """Refuse a prediction that is not of the form that goes with the request."""
    if "messages" in request:
        try:
            Answer.model_validate(prediction)
        except ValidationError as error:
            first = error.errors()[0]
            raise _Wrong(f"this is no answer: {first['loc'][0]}: {first['msg']}: {prediction!r:.100}") from None
    for asked, given in (("texts", "embeddings"), ("answers", "scores")):
        if asked in request and len(prediction.get(given) or ()) != len(request[asked]):
            raise _Wrong(f"for {len(request[asked])} {asked} it gives {prediction.get(given)!r:.100} as {given}")
    if "caption" in request and not Path(str(prediction.get("image"))).is_file():
        raise _Wrong(f"for a caption it gives no picture: {prediction!r:.100}")


def _compared(left: _Left, again: _Left, step: int) -> str:
    """Compare two trainings from a step on. Raises _Wrong where they differ."""
    compared = [name for name in left.curves if not any(word in name for word in _OF_THE_CLOCK)]
    points = 0
    for name in compared:
        for at, value in left.curves[name].items():
            if at <= step:
                continue
            other = again.curves.get(name, {}).get(at)
            if other is None or abs(other - value) > 1e-6 * max(1.0, abs(value)):
                raise _Wrong(f"{name} at step {at} is {other}, and {value} without the interruption")
            points += 1
    weights = [_digest(each.path) for each in (left, again)]
    if weights[0] != weights[1]:
        raise _Wrong("the curves are the same, and the weights are not")
    same = "the same weights, and " if weights[0] else ""
    return f"from step {step}: {same}the same {points} points of {len(compared)} curves"


def _digest(path: Path) -> str:
    """Of all weights; empty if there are none in safetensors."""
    files = sorted(path.rglob("*.safetensors"))
    hashed = hashlib.sha256(b"".join(file.read_bytes() for file in files))
    return hashed.hexdigest() if files else ""


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())
