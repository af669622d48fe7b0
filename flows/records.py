"""Flows over single verbs, so that each can be done from the Prefect page as well."""

from __future__ import annotations

from pathlib import Path

from prefect import flow
from prefect.logging import get_run_logger

from configs.base_models import BaseModelEntry
from configs.datasets import Columns, RequestedShape
from configs.endpoints import Endpoint
from configs.errors import UserError
from configs.settings import load_settings
from tasks import base_models, datasets, deploying


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
    return version.reference


@flow(name="add-base-model")
def register_base_model(
    name: str,
    path: str | None = None,
    hub: str | None = None,
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
        revision=revision,
        description=description,
        license=license,
    )
    return base_models.register_base_model(entry, load_settings())


def _absolute(text: str, field: str) -> Path:
    # A worker runs its flows in a temporary folder: a relative path would be looked for there.
    path = Path(text).expanduser()
    if not path.is_absolute():
        raise UserError("this path is not absolute", field=field, value=text, expected="a path that begins with /")
    return path
