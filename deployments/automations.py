"""The automations that Tuneline ships, one declarative list; `deploy_flows` makes the Prefect server match it.

What makes a flow run ours is the tag `tuneline` of its deployment; what makes an automation ours, the tag SHIPPED.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal
from uuid import UUID

from configs.settings import HEARTBEAT_SECONDS, SILENCE_SECONDS

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import Automation, AutomationCore

SHIPPED = "tuneline-shipped"
# Whoever has crashed reports it once more as it ends; by then it has.
RESUME_AFTER_SECONDS = 15

_COMPARED = ("name", "description", "tags", "trigger", "actions")
_PAGE = 200  # the most automations that Prefect tells at once

Change = Literal["created", "updated", "unchanged", "removed"]


def train_tag(pool: str) -> str:
    """The tag of whatever may train on a pool. Given before a run begins: Prefect's events know no later one."""
    return f"trains-on:{pool}"


def describe_automations(tag: str, pool: str, resume_deployment: UUID) -> list[AutomationCore]:
    """Every shipped automation, as the host of one work pool sees it; `resume_deployment` takes up crashed trains."""
    return [_crash_silent_runs(tag), _resume_crashed_trains(pool, resume_deployment)]


def _crash_silent_runs(tag: str) -> AutomationCore:
    """Prefect has no service for it: a run whose host is gone would be Running for ever, and keep its slot."""
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    ends = {f"prefect.flow-run.{state}" for state in ("Completed", "Failed", "Cancelled", "Crashed")}
    text = f"No heartbeat for {SILENCE_SECONDS} s: its host, its process or the network is gone."
    return AutomationCore(
        name="tuneline: crash runs without a heartbeat",
        description=f"Marks a flow run of Tuneline as Crashed when nothing was heard of it for {SILENCE_SECONDS} s; "
        f"it reports every {HEARTBEAT_SECONDS} s.",
        tags=[SHIPPED],
        trigger=EventTrigger(
            posture=Posture.Proactive,
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.heartbeat", *ends},
            match=_resource("prefect.flow-run.*"),
            match_related=_tag(tag),
            for_each={"prefect.resource.id"},
            threshold=1,
            within=timedelta(seconds=SILENCE_SECONDS),
        ),
        actions=[ChangeFlowRunState(name=None, state=StateType.CRASHED, message=text, force=False)],
    )


def _resume_crashed_trains(pool: str, deployment: UUID) -> AutomationCore:
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    flow_run = {"__prefect_kind": "jinja", "template": "{{ flow_run.id }}"}
    return AutomationCore(
        name=f"tuneline: take up crashed trains ({pool})",
        description="Starts the flow `resume` for a crashed run that had a train. Whether the train goes on by itself "
        "is said by its parameter resume_after_crash; the train's record tells what was decided.",
        tags=[SHIPPED, train_tag(pool)],
        trigger=EventTrigger(
            posture=Posture.Reactive,
            expect={"prefect.flow-run.Crashed"},
            match=_resource("prefect.flow-run.*"),
            match_related=_tag(train_tag(pool)),
            threshold=1,
            within=timedelta(0),
        ),
        actions=[
            RunDeployment(
                source="selected",
                deployment_id=deployment,
                parameters={"crashed_flow_run": flow_run},
                job_variables=None,
                schedule_after=timedelta(seconds=RESUME_AFTER_SECONDS),
            )
        ],
    )


def _resource(identity: str) -> Any:
    from prefect.events.schemas.events import ResourceSpecification

    return ResourceSpecification.model_validate({"prefect.resource.id": [identity]})


def _tag(tag: str) -> Any:
    from prefect.events.schemas.events import ResourceSpecification

    return ResourceSpecification.model_validate(
        {"prefect.resource.role": ["tag"], "prefect.resource.id": [f"prefect.tag.{tag}"]}
    )


def match_automations(client: SyncPrefectClient, pool: str, wanted: Sequence[AutomationCore]) -> dict[str, Change]:
    """Make the server's shipped automations be `wanted`; returns what was done, by name.

    Those of other pools are left alone, and what somebody has switched off stays off.
    """
    found = {item.name: item for item in _shipped(client) if _concerns(item, pool)}
    changes: dict[str, Change] = {item.name: _match(client, item, found.get(item.name)) for item in wanted}
    for name in found.keys() - changes.keys():
        client.delete_automation(found[name].id)
        changes[name] = "removed"
    return changes


def _shipped(client: SyncPrefectClient) -> list[Automation]:
    from prefect.events.filters import AutomationFilter, AutomationFilterTags

    ours = AutomationFilter(tags=AutomationFilterTags(all_=[SHIPPED]))
    found: list[Automation] = []
    while True:
        page = client.read_automations(automations=ours, limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            return found


def _concerns(automation: Automation, pool: str) -> bool:
    return set(automation.tags) <= {SHIPPED, train_tag(pool)}


def _match(client: SyncPrefectClient, wanted: AutomationCore, found: Automation | None) -> Change:
    if found is None:
        client.create_automation(wanted)
        return "created"
    if _compared(found) == _compared(wanted):
        return "unchanged"
    client.update_automation(found.id, wanted.model_copy(update={"enabled": found.enabled}))
    return "updated"


def _compared(automation: AutomationCore) -> dict[str, Any]:
    return automation.model_dump(include=set(_COMPARED))
