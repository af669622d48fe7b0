"""The verbs of retraining a line: find its champion and new rows, compare, record what came of it, go back.

Each can be repeated: `attempt.json` in the line's folder says how far a retraining has come, until it has come to an
end and is a line of `history.jsonl`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from configs.datasets import KIND_TITLES, Columns, DatasetVersion
from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.records import ModelRecord, TrainRecord
from configs.resolve import ResolvedTrain, resolve_train
from configs.retraining import RetrainAttempt, RetrainOutcome, RetrainPolicy, RetrainResult
from configs.settings import load_settings
from configs.strict_yaml import read_yaml
from configs.train import Slug, TrainConfig
from methods.registry import StageName, find_method
from tasks import deploying, endpoints, events, models, tracking, trains
from tasks.dataset_rows import body_of
from tasks.datasets import add_dataset, find_dataset, resolve_dataset
from tasks.evaluation import Evaluation, evaluate, keep_evaluation, kept_evaluation
from tasks.files import held, read_record, write_record, write_text
from tasks.inference import Generation
from tasks.measuring import TEXT_KINDS
from tasks.promotion import compare_rows
from tasks.scoring import score_rows
from tasks.tracking import code_version

POLICY_FILE = "policy.yaml"
_ATTEMPT_FILE = "attempt.json"
_HISTORY_FILE = "history.jsonl"
_TRIED: tuple[RetrainResult, ...] = ("promoted", "refused", "not_deployed")
_BOM = b"\xef\xbb\xbf"
EventHandler = Callable[[list[dict[str, Any]]], None]


def line_folder(line: str) -> Path:
    """The folder of what is kept about a line's retraining. Raises UserError for a name that no line can have."""
    try:
        return load_settings().retraining / TypeAdapter(Slug).validate_python(line)
    except ValidationError as error:
        raise UserError("this is no name of a line of models", field="line", value=line) from error


# --- policies ----------------------------------------------------------------------------------------------


def save_policy(policy: RetrainPolicy) -> Path:
    """Write the policy to the line's folder, as YAML; returns the file."""
    import yaml

    path = line_folder(policy.line) / POLICY_FILE
    content = policy.model_dump(mode="json", exclude_none=True)
    write_text(path, yaml.safe_dump(content, allow_unicode=True, sort_keys=False))
    return path


def load_policy(line: str) -> RetrainPolicy | None:
    """The line's policy; None if it has none. Raises UserError, naming the file, for one that is wrong."""
    path = line_folder(line) / POLICY_FILE
    if not path.exists():
        return None
    return _checked_policy(read_yaml(path).values, path)


def list_policies() -> list[RetrainPolicy]:
    """Every policy of this installation, by line."""
    lines = sorted(path.parent.name for path in load_settings().retraining.glob(f"*/{POLICY_FILE}"))
    return [policy for line in lines if (policy := load_policy(line)) is not None]


def resolve_policy(line: str, given: Mapping[str, Any]) -> RetrainPolicy:
    """The line's policy with the values that are given (not None) instead of its own.

    What neither says about the datasets comes from the champion's train. Raises UserError for an impossible value,
    for a line without a model, and if there are no held-out rows.
    """
    kept = load_policy(line)
    content: dict[str, Any] = {"line": line} | (kept.model_dump() if kept else {})
    content |= {name: value for name, value in given.items() if value is not None}
    if "dataset" in content:
        content["dataset"] = _followed(str(content["dataset"]))
    if "dataset" not in content or "evaluation_dataset" not in content:
        content = _datasets_of_champion(line) | content
    if content.get("evaluation_dataset") is None:
        raise UserError(
            "there are no held-out rows to compare champion and challenger on",
            field="evaluation_dataset",
            expected="a file or a dataset that is trained on by neither",
            mend=f"tuneline retrain schedule {line} --evaluation-dataset FILE …",
        )
    if "@" not in str(content["evaluation_dataset"]):
        content["evaluation_dataset"] = resolve_dataset(str(content["evaluation_dataset"])).reference
    policy = _checked_policy(content, None)
    _require_answers(find_dataset(policy.evaluation_dataset))
    return policy


def _require_answers(version: DatasetVersion) -> None:
    """Refuse held-out rows that no model answers with a text: champion and challenger are compared row by row."""
    if version.kind not in TEXT_KINDS:
        raise UserError(
            f"these are {KIND_TITLES[version.kind]}; champion and challenger are compared by their answers to rows",
            field="evaluation_dataset",
            value=version.reference,
            expected=" or ".join(KIND_TITLES[kind] for kind in TEXT_KINDS),
            mend="name held-out rows with answers; `tuneline evaluate MODEL MODEL --dataset ROWS` measures the others",
        )


def _checked_policy(content: Mapping[str, Any], file: Path | None) -> RetrainPolicy:
    try:
        return RetrainPolicy.model_validate(dict(content))
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            f"the retraining policy is wrong: {first['msg']}",
            file=file,
            field=".".join(str(part) for part in first["loc"]) or None,
            value=first["input"] if first["loc"] else None,
        ) from error


def _followed(reference: str) -> str:
    """A dataset to follow: a file as its absolute path, because a worker runs elsewhere, or a name that is stored."""
    path = Path(reference).expanduser()
    if path.is_file():
        return str(path.absolute())
    if path.is_absolute():
        raise UserError("there is no such file", file=path, field="dataset")
    if "@" not in reference:
        find_dataset(reference)
    return reference


def _datasets_of_champion(line: str) -> dict[str, Any]:
    """What the champion was trained and evaluated on: its file or dataset name, and the held-out version, if any."""
    record = train_of(find_champion(line))
    file = Path(record.config.dataset)
    name = record.dataset.partition("@")[0] if record.dataset else record.config.dataset
    return {
        "dataset": str(file) if file.is_absolute() and file.exists() else name,
        "evaluation_dataset": record.evaluation_dataset,
    }


# --- the champion ------------------------------------------------------------------------------------------


def find_champion(line: str) -> ModelRecord:
    """The champion of a line; of a line without one the newest model, which then is the champion.

    Raises UserError if the line has no model.
    """
    if models.alias_holder(line, "champion") is not None:
        return models.find_model(f"{line}@champion")
    of_line = [record for record in models.list_models() if record.line == line and record.stage != "base"]
    if not of_line:
        known = sorted({record.line for record in models.list_models() if record.stage != "base"})
        raise UserError(
            f"no model of the line {line} is there yet",
            field="line",
            value=line,
            expected=f"one of: {', '.join(known) or '(no model was made yet)'}",
            mend="train one first; a line has the name of its trains",
        )
    logging.getLogger(__name__).warning("the line %s had no champion: it is %s now", line, of_line[-1].name)
    models.set_alias(of_line[-1], "champion")
    return of_line[-1]


def train_of(model: ModelRecord) -> TrainRecord:
    """The record of the train that made a model. Raises UserError if there is none to repeat."""
    if model.train is None:
        raise UserError(
            "this model was not trained here, so there is no configuration to repeat",
            field="champion",
            value=model.name,
            mend="name one that was: tuneline models champion MODEL",
        )
    return trains.load_train(model.train)


# --- one at a time -----------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(line: str) -> Iterator[bool]:
    """Hold the line for one retraining; False if another process does. The system frees it however this one ends."""
    with held(line_folder(line)) as free:
        yield free


# --- attempts ----------------------------------------------------------------------------------------------


def begin(policy: RetrainPolicy, *, force: bool = False) -> RetrainAttempt | str:
    """The attempt to work on: one that was killed or cancelled half-way, or a new one; or why there is nothing to do.

    `force` trains again although nothing is new. Raises UserError for a dataset that cannot be used.
    """
    left = load_attempt(policy.line)
    if left is not None and left.train is not None and _runs(left.train):
        return f"{left.train}, the train of an earlier attempt, is running"
    if left is not None:
        return left
    champion = find_champion(policy.line)
    version = newest_version(policy, train_of(champion).config)
    if version is None:
        return f"the dataset is empty: {policy.dataset}"
    if not force and (reason := _unchanged(policy.line, champion, version)):
        return reason
    return save_attempt(RetrainAttempt(policy=policy, champion=champion.name, dataset=version.reference))


def _runs(train_id: str) -> bool:
    return trains.current_status(trains.load_train(train_id)) == "running"


def newest_version(policy: RetrainPolicy, config: TrainConfig) -> DatasetVersion | None:
    """The rows as they are now: the newest version of the name, or the file, stored; None if the file has no rows."""
    path = Path(policy.dataset)
    if not path.is_absolute():
        return find_dataset(policy.dataset)
    if _holds_no_rows(path):
        return None
    columns = Columns(prompt=config.prompt_column, completion=config.completion_column)
    return add_dataset(path, None, columns, config.dataset_shape, allow_refused=config.allow_refused_rows)


def _holds_no_rows(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            # A file of blank lines is read to its end, at most a part of any other.
            start = file.read(4096).removeprefix(_BOM)
            while start and not start.strip():
                start = file.read(4096)
    except OSError as error:
        raise UserError(f"the dataset cannot be read: {error.strerror}", file=path, field="dataset") from error
    return not start or re.fullmatch(rb"\s*\[\s*\]\s*", start) is not None


def _unchanged(line: str, champion: ModelRecord, version: DatasetVersion) -> str | None:
    """Why these rows were tried already, or None."""
    digest = version.reference.partition("@")[2]
    if champion.dataset is not None and champion.dataset.partition("@")[2] == digest:
        return f"the dataset is unchanged: the champion {champion.name} was trained on {champion.dataset}"
    tried = [outcome for outcome in read_history(line) if outcome.result in _TRIED]
    if tried and tried[-1].dataset is not None and tried[-1].dataset.partition("@")[2] == digest:
        last = tried[-1]
        return f"the dataset is unchanged since {last.at:%Y-%m-%d %H:%M} UTC: {last.result} with {last.dataset}"
    return None


def load_attempt(line: str) -> RetrainAttempt | None:
    """The retraining of the line that has not come to an end, if any."""
    path = line_folder(line) / _ATTEMPT_FILE
    return read_record(path, RetrainAttempt) if path.exists() else None


def save_attempt(attempt: RetrainAttempt, **changes: Any) -> RetrainAttempt:
    """Write the attempt, with changes, and return it."""
    attempt = attempt.model_copy(update=changes)
    write_record(line_folder(attempt.policy.line) / _ATTEMPT_FILE, attempt)
    return attempt


def challenger_config(attempt: RetrainAttempt) -> ResolvedTrain:
    """The champion's recorded configuration, on the new rows, and no further than to a model that can be compared."""
    record = train_of(models.find_model(attempt.champion))
    full = record.config.hyperparameters.tuning == "full"
    changes = {
        "dataset": attempt.dataset,
        # Compared here, with the champion, instead of in the train with the base model.
        "evaluation_dataset": None,
        # A challenger that has not been compared must not be deployed, by a resume of its train neither.
        "through": "complete" if full else "customized",
        "endpoint": None,
    }
    content = record.config.model_dump(mode="json") | changes
    found = resolve_train(copied=content, copied_from=record.id)
    origins = found.origins | dict.fromkeys(("dataset", "evaluation_dataset", "through", "endpoint"), "retraining")
    return found.model_copy(update={"origins": origins})


# --- the comparison ----------------------------------------------------------------------------------------


def compare(attempt: RetrainAttempt, on_events: EventHandler = lambda _: None) -> RetrainAttempt:
    """Let champion and challenger answer the same held-out rows greedily, and decide; recorded in MLflow.

    The answers of a model to these rows are kept, and taken again only if nothing that they depend on has changed.
    Rows that one of the two was trained on are left out. Raises UserError, StageFailed, StageCancelled.
    """
    policy = attempt.policy
    champion, challenger = find_champion(policy.line), models.find_model(str(attempt.challenger))
    record = trains.load_train(str(attempt.train))
    version = find_dataset(policy.evaluation_dataset)
    generation = Generation(max_new_tokens=record.config.max_new_tokens)
    answered = {
        model.name: _answers(policy.line, model, version, generation, record.config.evaluation_samples, on_events)
        for model in (champion, challenger)
    }
    unseen = _unseen_rows(version, answered[champion.name].rows, (champion.dataset, attempt.dataset))
    scores = {
        name: [value for value, kept in zip(_row_scores(each, policy.metric), unseen, strict=True) if kept]
        for name, each in answered.items()
    }
    comparison = compare_rows(
        (champion.name, scores[champion.name]),
        (challenger.name, scores[challenger.name]),
        policy,
        trained_rows=unseen.count(False),
    )
    attempt = save_attempt(attempt, champion=champion.name, comparison=comparison)
    _record_evaluation(record, challenger, answered[challenger.name], version)
    _record_comparison(record, attempt, answered[champion.name], answered[challenger.name])
    return attempt


class _KeptAnswers(BaseModel):
    key: str
    evaluation: Evaluation


def _answers(
    line: str,
    model: ModelRecord,
    version: DatasetVersion,
    generation: Generation,
    samples: int,
    on_events: EventHandler,
) -> Evaluation:
    path = line_folder(line) / "answers" / f"{model.name}.json"
    stage: StageName = "inference-customized" if model.adapter else "inference-complete"
    depends = {
        "model": [model.name, str(model.path), str(model.base_path), model.dtype],
        "rows": [version.digest, samples],
        "generation": generation.model_dump(),
        "code": [code_version(), str(find_method(model.method).stage_python(stage)), trains.environment_lock()],
    }
    key = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    if path.exists():
        kept = read_record(path, _KeptAnswers)
        if kept.key == key:
            return kept.evaluation
    found = evaluate(model, version, generation, samples, on_events)
    write_record(path, _KeptAnswers(key=key, evaluation=found))
    return found


def _row_scores(answered: Evaluation, metric: str) -> list[float]:
    pairs = [(row["prediction"], row["reference"]) for row in answered.predictions]
    return [float(getattr(row, metric)) for row in score_rows(pairs)]


def _unseen_rows(version: DatasetVersion, rows: int, trained_on: tuple[str | None, ...]) -> list[bool]:
    """For each of the first rows of the held-out version: is it in none of the versions that were trained on?"""
    with version.path.open("rb") as file:
        held_out = [_row_key(line) for _, line in zip(range(rows), file, strict=False)]
    wanted, seen = set(held_out), set()
    for reference in {each for each in trained_on if each is not None}:
        try:
            path = find_dataset(reference).path
        except UserError as error:
            logging.getLogger(__name__).warning("held-out rows are not compared with %s: %s", reference, error)
            continue
        with path.open("rb") as file:
            seen |= {key for line in file if (key := _row_key(line)) in wanted}
    return [key not in seen for key in held_out]


def _row_key(line: bytes) -> bytes:
    row = json.loads(line)
    content = row.get("messages", body_of(row))  # a line that was trained on documents is compared on conversations
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


def _record_evaluation(
    record: TrainRecord, challenger: ModelRecord, answered: Evaluation, version: DatasetVersion
) -> None:
    """The challenger's scores where those of every train stand: its record, its model, its MLflow run."""
    if "tuned" in record.evaluation:
        return
    tracking.log_dataset(record.run_id, version, "evaluation")
    keep_evaluation(record.run_id, answered, "tuned", models.logged_model_id(challenger))
    write_record(kept_evaluation(trains.train_folder(record.id), "tuned"), answered)
    models.note_evaluation(challenger, answered.figures)
    evaluation = {**record.evaluation, "tuned": answered.figures}
    trains.update_train(record.id, evaluation_dataset=version.reference, evaluation=evaluation)


def _record_comparison(
    record: TrainRecord, attempt: RetrainAttempt, champion: Evaluation, challenger: Evaluation
) -> None:
    found = attempt.comparison
    if found is None:
        raise ValueError("nothing was compared yet")
    figures = {f"retrain_{name}": getattr(found, name) for name in ("champion_mean", "difference", "low", "high")}
    tracking.log_scores(record.run_id, figures)
    rows = [
        {**new, "champion": old["prediction"], "champion_exact": old["exact"]}
        for old, new in zip(champion.predictions, challenger.predictions, strict=True)
    ]
    client = tracking.mlflow_client()
    client.log_dict(record.run_id, found.model_dump(mode="json"), "retraining/comparison.json")
    client.log_dict(record.run_id, {"rows": rows}, "retraining/answers.json")


# --- what came of it ---------------------------------------------------------------------------------------


def serving(attempt_or_policy: RetrainAttempt | RetrainPolicy) -> str | None:
    """The endpoint that a promotion deploys to, if it deploys."""
    policy = attempt_or_policy.policy if isinstance(attempt_or_policy, RetrainAttempt) else attempt_or_policy
    return (policy.endpoint or deploying.endpoint_name(policy.line)) if policy.then == "deployed" else None


def served_model(endpoint: str) -> tuple[str | None, str, str | None]:
    """Model name, target and quantisation of what the endpoint serves; (None, transformers, None) of a new one."""
    try:
        current = endpoints.load_endpoint(endpoint).current_deployment
    except UserError:
        return None, "transformers", None
    return (
        (current.model_name, current.target, current.quantization)
        if current is not None
        else (None, "transformers", None)
    )


def promote(attempt: RetrainAttempt, model: ModelRecord) -> RetrainOutcome:
    """Let `champion` point to the model; the last step of a promotion, when all that follows from it has worked."""
    models.set_alias(model, "champion")
    models.clear_alias(model.line, "challenger")
    return conclude(attempt, "promoted", _reason_of(attempt), model=model.name)


def refuse(attempt: RetrainAttempt) -> RetrainOutcome:
    """Leave the champion what it is; the challenger keeps its alias and its reason."""
    return conclude(attempt, "refused", _reason_of(attempt))


def _reason_of(attempt: RetrainAttempt) -> str:
    return attempt.comparison.reason if attempt.comparison is not None else "nothing was compared"


def conclude(attempt: RetrainAttempt, result: RetrainResult, reason: str, model: str | None = None) -> RetrainOutcome:
    """Record how the attempt ended: at the challenger in MLflow, in the history, as an event; it is open no more."""
    policy = attempt.policy
    outcome = RetrainOutcome(
        line=policy.line,
        result=result,
        reason=reason,
        dataset=attempt.dataset,
        champion=attempt.champion,
        challenger=attempt.challenger,
        model=model,
        train=attempt.train,
        endpoint=serving(policy) if model is not None else None,
        comparison=attempt.comparison,
        policy=policy,
    )
    for name in dict.fromkeys(each for each in (attempt.challenger, model) if each is not None):
        _tag_model(models.find_model(name), outcome)
    if attempt.train is not None:
        _tag_run(trains.load_train(attempt.train).run_id, outcome)
    # A kill between these two lines writes the outcome twice, and loses it never.
    _append(outcome)
    (line_folder(policy.line) / _ATTEMPT_FILE).unlink(missing_ok=True)
    _forget_answers(policy.line, {model or attempt.champion})
    _emit(outcome)
    return outcome


def skip(policy: RetrainPolicy, reason: str) -> RetrainOutcome:
    """Record why nothing was trained."""
    champion = models.alias_holder(policy.line, "champion")
    outcome = RetrainOutcome(line=policy.line, result="skipped", reason=reason, champion=champion, policy=policy)
    _append(outcome)
    _emit(outcome)
    return outcome


def read_history(line: str) -> list[RetrainOutcome]:
    """What every retraining of the line has come to, oldest first."""
    path = line_folder(line) / _HISTORY_FILE
    if not path.exists():
        return []
    # A line that a kill has cut off is no outcome: it is written again by the rerun.
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    return [RetrainOutcome.model_validate_json(text) for text in lines if text.strip()]


def _append(outcome: RetrainOutcome) -> None:
    path = line_folder(outcome.line) / _HISTORY_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # the half line of a process that was killed
                whole = path.read_bytes().rfind(b"\n") + 1
                file.truncate(whole)
        file.write(outcome.model_dump_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _tags(outcome: RetrainOutcome) -> dict[str, str]:
    tags = {"outcome": outcome.result, "reason": outcome.reason[:4900], "champion": outcome.champion}
    return {f"tuneline.retrain.{name}": value for name, value in tags.items() if value is not None}


def _tag_model(model: ModelRecord, outcome: RetrainOutcome) -> None:
    if model.registered_version is None:
        return
    client = tracking.mlflow_client()
    for name, value in _tags(outcome).items():
        client.set_model_version_tag(model.line, model.registered_version, name, value)


def _tag_run(run_id: str, outcome: RetrainOutcome) -> None:
    client = tracking.mlflow_client()
    for name, value in _tags(outcome).items():
        client.set_tag(run_id, name, value)


def _forget_answers(line: str, kept: set[str]) -> None:
    """Only the champion's answers are asked for again."""
    for path in (line_folder(line) / "answers").glob("*.json"):
        if path.stem not in kept:
            path.unlink()


def _emit(outcome: RetrainOutcome) -> None:
    names = {"promoted": events.MODEL_PROMOTED, "skipped": events.RETRAIN_SKIPPED}
    found = {"line": outcome.line, "model": outcome.model or outcome.challenger, "train": outcome.train}
    labels = {name: value for name, value in found.items() if value is not None}
    payload = outcome.model_dump(mode="json", exclude={"policy"})
    tags = ("tuneline", f"line:{outcome.line}")
    events.emit(names.get(outcome.result, events.MODEL_REFUSED), "line", outcome.line, labels, payload, tags)


# --- going back --------------------------------------------------------------------------------------------


def roll_back(line: str) -> RetrainOutcome:
    """Make the champion before the newest promotion the champion again, and let the endpoint serve it again.

    The endpoint comes first: the alias moves only when the old model answers. Raises UserError if another process
    retrains the line, or if the champion did not come from a promotion.
    """
    with holding(line) as free:
        if not free:
            raise UserError("this line is being retrained", field="line", value=line, mend="wait for it, or cancel it")
        champion = find_champion(line)
        promotions = [each for each in read_history(line) if each.result == "promoted" and each.model == champion.name]
        if not promotions or promotions[-1].champion is None:
            raise UserError(
                f"{champion.name} did not become champion by a retraining, so there is none before it",
                field="line",
                value=line,
                mend="name the champion: tuneline models champion MODEL",
            )
        promotion = promotions[-1]
        before = models.find_model(str(promotion.champion))
        if promotion.endpoint is not None:
            _serve_again(promotion.endpoint, before)
        models.set_alias(before, "champion")
        outcome = RetrainOutcome(
            line=line,
            result="rolled_back",
            reason=f"asked for; {champion.name} was promoted {promotion.at:%Y-%m-%d %H:%M} UTC",
            dataset=promotion.dataset,
            champion=champion.name,
            model=before.name,
            endpoint=promotion.endpoint,
        )
        _tag_model(champion, outcome)
        _append(outcome)
        return outcome


def _serve_again(endpoint: str, model: ModelRecord) -> Endpoint:
    """The endpoint back on its deployment of this model; one that it never served is deployed there, proved as ever."""
    record = endpoints.load_endpoint(endpoint)
    current = record.current_deployment
    if current is not None and current.model_name == model.name:
        return record
    earlier = [each for each in record.deployments if each.model_name == model.name and each.switched_at is not None]
    if earlier:
        return deploying.roll_back(endpoint, to=earlier[-1].model)
    _, target, quantization = served_model(endpoint)
    return deploying.deploy_model(model, endpoint, target, quantization, None)
