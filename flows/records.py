"""Flows over single verbs, so that each can be done from the Prefect page as well."""

from __future__ import annotations

import os
from pathlib import Path

from prefect import flow
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.context import FlowRunContext
from prefect.logging import get_run_logger

from configs.base_models import BaseModelEntry, ModelType
from configs.datasets import Columns, RequestedShape
from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.settings import Settings, load_settings
from deployments.flow_deployments import DeploymentChange, deploy_flows
from deployments.service_records import recorded_pools
from deployments.services import connect
from deployments.work_pools import WORK_POOL
from methods.registry import find_method
from tasks import base_models, datasets, deploying, method_checks, training_methods
from tasks.dataset_report import as_markdown
from tasks.method_checks import CheckResult


@flow(name="undeploy")
def undeploy(endpoint: str) -> Endpoint:
    """Stop serving at an endpoint; its address and history are kept."""
    return deploying.undeploy(endpoint)


@flow(name="add-dataset")
def add_dataset(
    file: str,
    name: str | None = None,
    prompt_column: str | None = None,
    completion_column: str | None = None,
    shape: RequestedShape = "auto",
    allow_refused: bool = False,
) -> str:
    """Validate a file and store its rows as an immutable version; returns its `name@digest`."""
    columns = Columns(prompt=prompt_column, completion=completion_column)
    version = datasets.add_dataset(_absolute(file, "file"), name, columns, shape, allow_refused=allow_refused)
    get_run_logger().info("%s rows stored as %s", version.rows, version.reference)
    page = as_markdown(version.report, version.reference)
    create_markdown_artifact(page, key="dataset-report", description=f"dataset {version.reference}")
    return version.reference


@flow(name="add-base-model")
def register_base_model(
    name: str,
    path: str | None = None,
    hub: str | None = None,
    type: ModelType = "chat",
    revision: str | None = None,
    title: str | None = None,
    description: str = "",
    license: str = "",
) -> BaseModelEntry:
    """Register a base model: a local folder or a hub id."""
    if (path is None) == (hub is None):
        raise UserError("a base model has one source", field="path, hub", expected="exactly one of the two")
    folder = _absolute(path, "path") if path is not None else None
    entry = BaseModelEntry(
        name=name,
        title=title or name,
        path=folder,
        hub=hub,
        type=type,
        revision=revision,
        description=description,
        license=license,
    )
    return base_models.register_base_model(entry, load_settings())


@flow(name="add-method")
def add_method(folder: str) -> str:
    """Copy a training method into the installation and make its deployments; returns its name."""
    method = training_methods.add_method(_absolute(folder, "folder"), load_settings())
    _match_own_pool()
    return method.name


@flow(name="new-method")
def new_method(name: str, folder: str, template: str = "custom01") -> str:
    """Copy a method into a new folder, to be changed and then added; returns its manifest."""
    made = training_methods.new_method(name, template, _absolute(folder, "folder"), load_settings())
    get_run_logger().info("written to %s; change it there, then run add-method", made)
    return str(made)


@flow(name="check-method")
def check_method(name: str) -> list[CheckResult]:
    """Run every stage of a method on a tiny model, then cancel, resume and fail; fails if anything is wrong."""
    results = method_checks.check_method(find_method(name), _log_check)
    rows = [{"": _MARKS[each.ok], **each.model_dump(exclude={"ok", "method"})} for each in results]
    create_table_artifact(rows, key=f"check-{name}", description=f"Check of the method {name}")
    wrong = [each.check for each in results if each.ok is False]
    if wrong:
        raise UserError(f"{', '.join(wrong)} of the method {name} went wrong", field="name", value=name)
    return results


_MARKS = {True: "✓", False: "✗", None: "–"}


def _log_check(result: CheckResult) -> None:
    get_run_logger().info("%s %s (%.1f s): %s", _MARKS[result.ok], result.check, result.seconds, result.detail)


@flow(name="delete-method")
def delete_method(name: str) -> None:
    """Delete a training method that was added, and its deployments; past trains stay."""
    training_methods.delete_method(name, load_settings())
    _match_own_pool()


def _match_own_pool() -> None:
    context = FlowRunContext.get()
    pool = context.flow_run.work_pool_name if context is not None and context.flow_run is not None else None
    for change in match_deployments(load_settings(), {pool} if pool else set()):
        get_run_logger().info("%s: %s", change.deployment, change.change)


def match_deployments(settings: Settings, pools: set[str]) -> list[DeploymentChange]:
    """Make the deployments of `pools`, and of the pools of this host's workers, match the methods there are now.

    Returns what was changed; nothing if no server runs, as the next `up` does it.
    """
    connect(settings)
    address = os.environ.get("PREFECT_API_URL")
    if address is None:
        return []
    named = pools | set(recorded_pools(settings)) or {WORK_POOL}
    changes = [change for pool in sorted(named) for change in deploy_flows(settings, address, pool)]
    return [change for change in changes if change.change != "unchanged"]


def _absolute(text: str, field: str) -> Path:
    # A worker runs its flows in a temporary folder: a relative path would be looked for there.
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise UserError("this path is not absolute", field=field, value=text, expected="a path that begins with /")
    return path
