"""What MLflow remembers of a train: parameters, curves, files, lineage. Always by explicit run id."""

from __future__ import annotations

import getpass
import json
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from configs.records import TrainRecord, TrainStatus
from configs.resolve import ResolvedTrain, describe, effective
from configs.settings import PROJECT_ROOT, Settings, load_settings
from configs.train import DATASETS, TrainConfig
from deployments.databases import EXPERIMENT, PROXIED_ARTIFACTS, mlflow_artifact_location
from methods import contract
from methods.registry import known_method
from tasks import runs_view
from tasks.files import one_at_a_time, write_text
from tasks.stages import EventTail

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

_PARAMETER_LIMIT = 6000
_BATCH = 900  # MLflow takes 1000 metrics in one request


def mlflow_client() -> MlflowClient:
    """A client of the tracking store that the environment names."""
    import logging

    import mlflow
    from mlflow.tracking import MlflowClient

    logging.getLogger("alembic").setLevel(logging.WARNING)
    if mlflow.get_tracking_uri().startswith("http"):
        return MlflowClient()
    _read_shared_artifacts_from_disk()
    folder = load_settings().mlflow_sqlite.parent
    folder.mkdir(parents=True, exist_ok=True)
    # The first client makes the tables, which MLflow takes for made while another process is still at it.
    with one_at_a_time(folder / "lock"):
        return MlflowClient()


def _read_shared_artifacts_from_disk() -> None:
    """Let a client on the database itself find the files that a server for several hosts has kept.

    Their address names no server and no folder; without a server MLflow does not know what to make of it.
    """
    from mlflow.store.artifact.artifact_repository_registry import _artifact_repository_registry
    from mlflow.store.artifact.local_artifact_repo import LocalArtifactRepository

    def on_disk(artifact_uri: str, tracking_uri: str | None = None, registry_uri: str | None = None) -> Any:
        folder = load_settings().mlflow_artifacts.as_uri()
        return LocalArtifactRepository(f"{folder}/{artifact_uri.removeprefix(PROXIED_ARTIFACTS)}")

    _artifact_repository_registry.register("mlflow-artifacts", on_disk)


def experiment_id(settings: Settings) -> str:
    """The id of Tuneline's experiment, made on first use."""
    from mlflow.exceptions import MlflowException

    client = mlflow_client()
    found = client.get_experiment_by_name(EXPERIMENT)
    if found is None:
        try:
            location = mlflow_artifact_location(settings)
            # Without its kind the page guesses, and shows trains as evaluations of a chat application.
            tags = {"mlflow.experimentKind": "custom_model_development", runs_view.TAG: runs_view.view_tag()}
            return str(client.create_experiment(EXPERIMENT, artifact_location=location, tags=tags))
        except MlflowException:  # made by another process in between
            found = client.get_experiment_by_name(EXPERIMENT)
            if found is None:
                raise
    if runs_view.TAG not in found.tags:  # made by an earlier version; one that somebody has changed is theirs
        client.set_experiment_tag(found.experiment_id, runs_view.TAG, runs_view.view_tag())
    return str(found.experiment_id)


def start_run(name: str, kind: str, tags: Mapping[str, str]) -> str:
    """Create a run and return its id. `kind` is `train` or `evaluation`."""
    version = code_version()
    own = {
        "mlflow.runName": name,
        "mlflow.source.name": f"tuneline {kind}",
        "mlflow.source.type": "PROJECT",
        "mlflow.source.git.commit": version,
        "mlflow.user": getpass.getuser(),
        "tuneline.kind": kind,
        "tuneline.code_version": version,
    }
    run = mlflow_client().create_run(experiment_id(load_settings()), run_name=name, tags={**own, **tags})
    return str(run.info.run_id)


def code_version() -> str:
    """The version of this code: the git commit where there is one, else the installed version."""
    from importlib.metadata import version

    commit = subprocess.run(
        ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True,
        text=True,
        check=False,
    )
    return commit.stdout.strip() if commit.returncode == 0 else version("tuneline")


def log_parameters(run_id: str, values: Mapping[str, Any]) -> None:
    """Record parameters, as text. The store refuses to change one, so those it has already are left alone."""
    client = mlflow_client()
    known = client.get_run(run_id).data.params
    from mlflow.entities import Param

    fresh = [Param(k, _text(v)[:_PARAMETER_LIMIT]) for k, v in values.items() if k not in known]
    if fresh:
        client.log_batch(run_id, params=fresh)


def log_config(record: TrainRecord) -> None:
    """Record the resolved configuration: parameters, where each came from, and the file to repeat it with.

    The datasets that are given become parameters by `log_versions`, when they are versions: a file and its copy by
    the name of the version would be shown as different by MLflow's page, and a parameter cannot be changed.
    """
    flat = flatten(record.config)
    log_parameters(record.run_id, {name: flat[name] for name in flat if name not in DATASETS or flat[name] is None})
    origins = _origins(record)
    table = {name: {"value": value, "origin": origins[name]} for name, value in flat.items()}
    client = mlflow_client()
    client.log_dict(record.run_id, table, "config/parameters.json")
    client.log_text(record.run_id, train_yaml(record.config), "config/train.yaml")


def log_versions(run_id: str, references: Mapping[str, str]) -> None:
    """Record the dataset versions, by their fields, as parameters and as tags, which the table of the page shows."""
    log_parameters(run_id, references)
    client = mlflow_client()
    for field, reference in references.items():
        client.set_tag(run_id, f"tuneline.{field}", reference)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """All values by dotted name, hyper-parameters without their prefix (they are what one compares).

    Values that follow from others (lora_alpha, through) are spelled out.
    """
    content = effective(config)
    hyper, method = content.pop("hyperparameters"), content.pop("method_params")
    return {**content, **hyper, **{f"method_params.{name}": value for name, value in method.items()}}


def train_yaml(config: TrainConfig) -> str:
    """The configuration as the YAML file that gives it again.

    Without what is not set, unless the method would set it, and without what the method has no use for.
    """
    import yaml

    content = config.model_dump(mode="json", exclude_none=True)
    method = known_method(config.method)
    if method is not None:
        hyper = dict.fromkeys(method.hyperparameter_defaults) | content["hyperparameters"]
        unused = method.hyperparameters.unused
        content["hyperparameters"] = {name: value for name, value in hyper.items() if name not in unused}
    return yaml.safe_dump(content, allow_unicode=True, sort_keys=False)


def log_scores(run_id: str, values: Mapping[str, float], model_id: str | None = None) -> None:
    """Record figures as metrics, of the run and, if one is given, of a logged model.

    Names hold no slash: MLflow draws whatever stands before one as a section above the curves.
    """
    from mlflow.entities import Metric

    stamp = int(time.time() * 1000)
    metrics = [Metric(name, float(value), stamp, 0, model_id=model_id, run_id=run_id) for name, value in values.items()]
    mlflow_client().log_batch(run_id, metrics=metrics)


def log_files(run_id: str, files: Iterable[Path], folder: str) -> None:
    """Keep files with the run; those that are not there are left out."""
    client = mlflow_client()
    for file in files:
        if file.exists():
            client.log_artifact(run_id, str(file), folder)


def log_dataset(run_id: str, version: Any, context: str) -> None:
    """Record a dataset version as MLflow dataset input: digest, shape, counts."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = {
        "num_rows": version.rows,
        "kind": version.kind,
        "shape": version.shape,
        "refused": version.report.rows_refused,
    }
    schema = {"columns_seen": version.report.columns_seen, "stored": ["messages", "line"]}
    dataset = Dataset(
        name=version.name,
        digest=version.digest[:12],
        source_type="local",
        source=json.dumps({"uri": str(version.path)}),
        schema=json.dumps(schema),
        profile=json.dumps(profile),
    )
    tag = InputTag("mlflow.data.context", context)
    mlflow_client().log_inputs(run_id, datasets=[DatasetInput(dataset, [tag])])


def end_run(run_id: str, status: TrainStatus) -> None:
    """Close a run that was completed, failed, was cancelled or was interrupted."""
    words = {"completed": "FINISHED", "failed": "FAILED", "cancelled": "KILLED", "interrupted": "KILLED"}
    mlflow_client().set_terminated(run_id, words[status])


def run_page(run_id: str) -> str | None:
    """The address of a run's page; None without an MLflow server."""
    import mlflow

    server = mlflow.get_tracking_uri()
    if not server.startswith("http"):
        return None
    experiment = mlflow_client().get_run(run_id).info.experiment_id
    return f"{server.rstrip('/')}/#/experiments/{experiment}/runs/{run_id}"


def trains_page() -> str | None:
    """The address of the table of all trains, with the columns one compares by; None without an MLflow server."""
    import mlflow

    server = mlflow.get_tracking_uri()
    if not server.startswith("http"):
        return None
    return (
        f"{server.rstrip('/')}/#/experiments/{experiment_id(load_settings())}/runs?viewStateShareKey={runs_view.VIEW}"
    )


def compare_page(run_ids: Sequence[str]) -> str | None:
    """The address of the page that sets runs side by side; None without an MLflow server."""
    import mlflow

    server = mlflow.get_tracking_uri()
    if not server.startswith("http"):
        return None
    client = mlflow_client()
    experiments = list(dict.fromkeys(client.get_run(run_id).info.experiment_id for run_id in run_ids))
    runs, of = (quote(json.dumps(ids, separators=(",", ":"))) for ids in (list(run_ids), experiments))
    return f"{server.rstrip('/')}/#/compare-runs?runs={runs}&experiments={of}"


def log_verdicts(verdicts: Mapping[str, str]) -> None:
    """Say on each run, by its id, how its model fared against another: the page that compares runs shows tags."""
    client = mlflow_client()
    for run_id, verdict in verdicts.items():
        client.set_tag(run_id, "tuneline.compared", verdict)


def reopen_run(run_id: str) -> None:
    """Say that a closed run goes on (its train was resumed)."""
    mlflow_client().update_run(run_id, status="RUNNING")


class CurveForwarder:
    """Sends the metrics of an events file to MLflow: each (curve, step) once, whatever happens in between.

    `sent.json` in the job folder holds the offset up to which MLflow has confirmed. While MLflow does not answer
    the events stay in the file; a later call, of this or another process, sends the rest. A resumed stage repeats
    the steps after its checkpoint: the values that came first stay. What was sent but not noted, because the process
    died in between, is sent again as it was, time stamp included, and MLflow's database keeps one of two equal rows.
    """

    def __init__(self, run_id: str, folder: Path, every: float = 2.0, retry: float = 10.0) -> None:
        """`every`: seconds between two looks at the file; `retry`: seconds after MLflow did not answer."""
        self.run_id = run_id
        self.folder = folder
        self.every, self.retry = every, retry
        self.problem: str | None = None
        self._tail = EventTail(folder / contract.EVENTS_FILE)
        self._seen: set[tuple[str, int]] = set()
        self._pending: list[dict[str, Any]] = []
        self._one_at_a_time = threading.Lock()
        self._told: str | None = None
        self._replay()

    @contextmanager
    def running(self, last_seconds: float = 20.0) -> Iterator[None]:
        """Forward in the background while the block runs, and for at most `last_seconds` after it.

        In the background, because a server that is away holds a request up for many seconds: whoever watches the
        stage must go on watching.
        """
        done = threading.Event()
        thread = threading.Thread(target=self._forward_until, args=(done,), name="curves", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join(last_seconds)

    def _forward_until(self, done: threading.Event) -> None:
        while not done.is_set():
            done.wait(self.every if self.forward() else self.retry)
        self.forward()

    def forward(self) -> bool:
        """Send what is new; True if nothing is left to send. Never raises: the train goes on without MLflow."""
        with self._one_at_a_time:
            self._pending += self._tail.read()
            metrics = [
                (name, value, int(event["time"] * 1000), int(event["step"]))
                for event in self._pending
                for name, value in self._fresh(event).items()
            ]
            try:
                self._send(metrics)
                write_text(self._state, json.dumps({"offset": self._tail.offset}))
            except Exception as error:  # any fault of the tracking store must not end a train
                self._seen.difference_update((name, step) for name, _, _, step in metrics)
                self.problem = f"{type(error).__name__}: {str(error)[:300]}"
                return False
            self._pending = []
            self.problem = None
            return True

    def news(self) -> list[dict[str, Any]]:
        """An event to show when MLflow has gone away or has come back since the last call."""
        problem = self.problem
        if (problem is None) == (self._told is None):
            return []
        self._told = problem
        text = "MLflow answers again" if problem is None else f"MLflow is away, the curves are sent later ({problem})"
        return [{"type": "warning", "time": time.time(), "text": text}]

    @property
    def _state(self) -> Path:
        return self.folder / "sent.json"

    def _replay(self) -> None:
        offset = json.loads(self._state.read_text())["offset"] if self._state.exists() else 0
        if offset:
            for event in self._tail.read(until=offset):
                self._fresh(event)

    def _fresh(self, event: Mapping[str, Any]) -> dict[str, float]:
        """The values of a metrics event that were not seen before; marks them as seen."""
        if event.get("type") != "metrics":
            return {}
        step = int(event["step"])
        fresh = {k: float(v) for k, v in event["values"].items() if (k, step) not in self._seen}
        self._seen.update((name, step) for name in fresh)
        return fresh

    def _send(self, metrics: list[tuple[str, float, int, int]]) -> None:
        if not metrics:
            return
        from mlflow.entities import Metric

        client = mlflow_client()
        for start in range(0, len(metrics), _BATCH):
            client.log_batch(self.run_id, metrics=[Metric(*m) for m in metrics[start : start + _BATCH]])


def _origins(record: TrainRecord) -> dict[str, str]:
    """Where each value of `flatten` came from."""
    described = describe(ResolvedTrain(config=record.config, origins=record.origins))
    origins = record.origins | {name.removeprefix("hyperparameters."): origin for name, _, origin in described}
    return {name: origins.get(name, "default") for name in flatten(record.config)}


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
