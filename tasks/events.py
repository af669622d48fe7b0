"""Events on the Prefect server that automations wait for: a model was promoted, a dataset has a new version."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, Literal

MODEL_PROMOTED = "tuneline.model.promoted"
MODEL_REFUSED = "tuneline.model.refused"
RETRAIN_SKIPPED = "tuneline.retrain.skipped"
DATASET_ADDED = "tuneline.dataset.added"

ResourceKind = Literal["line", "dataset"]


def resource_id(kind: ResourceKind, name: str) -> str:
    """The id of what an event is about, which an automation matches: `tuneline.line.NAME`."""
    return f"tuneline.{kind}.{name}"


def emit(
    event: str,
    kind: ResourceKind,
    name: str,
    labels: Mapping[str, str] | None = None,
    payload: Mapping[str, Any] | None = None,
    tags: Iterable[str] = (),
) -> bool:
    """Tell the Prefect server that something happened to a line of models or to a dataset; True if it was told.

    `labels` become `tuneline.LABEL` of the resource, which a trigger can match; `payload` is for its reader; each tag
    becomes a related resource with the role `tag`, as Prefect's own events have them. Nothing is told where no
    server stands, because no automation could hear it. A server that does not take it is logged and does no harm:
    what happened is recorded elsewhere.
    """
    # Importing Prefect takes a second, which a command that needs no server would wait for.
    if "prefect" not in sys.modules and "PREFECT_API_URL" not in os.environ:
        return False
    from prefect.settings import PREFECT_API_URL

    if not PREFECT_API_URL.value():
        return False
    from prefect.client.orchestration import get_client
    from prefect.events.schemas.events import Event, RelatedResource, Resource

    resource = {"prefect.resource.id": resource_id(kind, name), "prefect.resource.name": name}
    related = [{"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"} for tag in tags]
    told = Event(
        event=event,
        resource=Resource.model_validate(
            resource | {f"tuneline.{key}": value for key, value in (labels or {}).items()}
        ),
        related=[RelatedResource.model_validate(item) for item in related],
        payload=dict(payload or {}),
    )
    try:
        # Not Prefect's `emit_event`: it sends in the background, and the process may end before it has.
        with get_client(sync_client=True) as client:
            client.request("POST", "/events", json=[told.model_dump(mode="json")]).raise_for_status()
    except Exception as error:
        logging.getLogger(__name__).warning("the Prefect server was not told of %s: %s", event, error)
        return False
    return True
