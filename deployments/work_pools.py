"""Work pools: kinds of hosts, each with the environment that its flows run in. All share one base job template.

A pool is of Prefect's type `process`: its worker starts `deployments.launcher`, which starts the flow in the pool's
environment and owns every process below it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

from configs.errors import UserError
from configs.records import QueueName

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import WorkPool

WORK_POOL = "tuneline"
# Lower goes first. Prefect makes `default` with every pool, as number 1; `high` moves it to 2.
QUEUES = {queue: number for number, queue in enumerate(get_args(QueueName), start=1)}

_POOL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
# The command is split as a shell would split it, so these two would end the argument that they stand in.
_ONE_ARGUMENT = r'^[^"\\]*$'
# `python` is the worker's own, by its PATH. -P: a folder named `deployments` in the working directory is not ours.
_COMMAND = (
    'python -P -m deployments.launcher "--conda={{ conda }}" "--environment={{ environment }}" "--gpus={{ gpus }}" '
    "-- python -m prefect flow-run execute"
)
_VARIABLES: dict[str, dict[str, Any]] = {
    "environment": {
        "title": "Environment of the flow",
        "description": "Name of a conda environment, or the folder of a conda or virtual environment, with Tuneline "
        "installed in it. Empty: the environment the worker runs in.",
        "type": "string",
        "pattern": _ONE_ARGUMENT,
        "default": "",
    },
    "conda": {
        "title": "Conda executable",
        "description": "conda, mamba or micromamba, or its path on the host. Empty: a folder given as the environment "
        "is used as it is, without its activation scripts.",
        "type": "string",
        "pattern": _ONE_ARGUMENT,
        "default": "conda",
    },
    "gpus": {
        "title": "GPUs",
        "description": "Which GPUs of the host this pool may use: numbers or UUIDs of nvidia-smi, such as 0,1; `none`: "
        "none. Empty: what the worker may use.",
        "type": "string",
        "pattern": r"^[\w/,-]*$",
        "default": "",
    },
    "working_dir": {
        "title": "Working directory",
        "description": "Folder that the flow runs in. Empty: a temporary one.",
        "anyOf": [{"type": "string", "format": "path"}, {"type": "null"}],
        "default": None,
    },
    "env": {
        "title": "Environment variables",
        "description": "Set for every flow run of this pool.",
        "type": "object",
        "additionalProperties": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "default": {},
    },
    "name": {
        "title": "Name",
        "description": "Name of the process as Prefect records it.",
        "anyOf": [{"type": "string"}, {"type": "null"}],
        "default": None,
    },
    "labels": {
        "title": "Labels",
        "description": "Labels of the process as Prefect records them.",
        "type": "object",
        "additionalProperties": {"type": "string"},
        "default": {},
    },
    "stream_output": {
        "title": "Stream output",
        "description": "Show what the launcher says in the worker's log. The flow's own output has a file of its own.",
        "type": "boolean",
        "default": True,
    },
}


def base_job_template(defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The template of every Tuneline pool; `defaults` are the values of its variables where a run names none.

    Raises UserError for a default that is no variable.
    """
    given = dict(defaults or {})
    if unknown := sorted(set(given) - set(_VARIABLES)):
        raise UserError(
            "a work pool has no such variable", field=unknown[0], expected=f"one of {', '.join(_VARIABLES)}"
        )
    properties = {
        name: {**schema, "default": given.get(name, schema["default"])} for name, schema in _VARIABLES.items()
    }
    passed_on = ("env", "labels", "name", "stream_output", "working_dir")
    return {
        "job_configuration": {"command": _COMMAND, **{name: f"{{{{ {name} }}}}" for name in passed_on}},
        "variables": {"type": "object", "properties": properties},
    }


def checked_pool(name: str) -> str:
    """The name, if it can be one of a work pool: it becomes part of addresses, files and deployments' names.

    Raises UserError if it cannot.
    """
    if not _POOL_NAME.fullmatch(name):
        raise UserError(
            "this is no name of a work pool",
            field="pool",
            value=name,
            expected="letters, digits, `.`, `_` and `-`, at most 64, such as gpu-a100",
        )
    return name


def ensure_pool(client: SyncPrefectClient, name: str = WORK_POOL, defaults: Mapping[str, Any] | None = None) -> None:
    """Make the pool if it is missing, give it our template if it has another, and its queues high, default and low.

    Defaults that somebody has set on the page are kept unless `defaults` names them. Raises UserError for an
    impossible name or a pool of another type.
    """
    from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    checked_pool(name)
    try:
        pool = client.read_work_pool(name)
    except ObjectNotFound:
        template = base_job_template(defaults)
        try:
            pool = client.create_work_pool(WorkPoolCreate(name=name, type="process", base_job_template=template))
        except ObjectAlreadyExists:  # somebody was quicker
            pool = client.read_work_pool(name)
    template = base_job_template({**_kept_defaults(pool), **(defaults or {})})
    if pool.base_job_template != template:
        client.update_work_pool(name, WorkPoolUpdate(base_job_template=template))
    _ensure_queues(client, name)


def _kept_defaults(pool: WorkPool) -> dict[str, Any]:
    if pool.type != "process":
        raise UserError(
            "this work pool is not Tuneline's",
            field="pool",
            value=pool.name,
            expected=f"a pool of type process; it is of type {pool.type}",
            mend="choose another name",
        )
    properties: dict[str, dict[str, Any]] = pool.base_job_template.get("variables", {}).get("properties", {})
    return {name: properties[name]["default"] for name in _VARIABLES if "default" in properties.get(name, {})}


def _ensure_queues(client: SyncPrefectClient, pool: str) -> None:
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound

    for queue, priority in QUEUES.items():
        try:
            client.read_work_queue_by_name(queue, work_pool_name=pool)
        except ObjectNotFound:
            try:
                client.create_work_queue(queue, priority=priority, work_pool_name=pool)
            except ObjectAlreadyExists:
                continue
