"""Alerts: the channels on the Prefect server, its automations that send through them, and who is told when.

A train's subscriptions become tags of its flow run (`alert:ops:failed`); one automation for each channel and kind
hears of the states of runs. So the server sends, whatever has become of the worker. Without a standing server the
train's own process sends, because the embedded one ends with it.

The trap: an event of a run has the tags that the run had when the server saw it first, and keeps them for minutes
(`_flow_run_resource_data_cache` in prefect/server/models/events.py). A trigger that matched tags set by the train would
miss every short one. So the trigger matches the state alone, and the message, for which the server reads the run
afresh, is empty unless the run has the tag.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, get_args
from uuid import UUID

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from configs.alerts import TAG_PREFIX, AlertKind, AlertMessage, ChannelName, Subscription, alert_tag, alert_tags
from configs.aliases import nearest
from configs.errors import UserError
from configs.records import TrainRecord, TrainStatus
from deployments.automations import Change
from tasks.events import MODEL_PROMOTED

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import BlockDocument
    from prefect.events.schemas.automations import AutomationCore
    from prefect.types import KeyValueLabels

    from deployments.alert_blocks import AlertChannel

AUTOMATION_PREFIX = "tuneline alert: "
_KINDS: tuple[AlertKind, ...] = get_args(AlertKind)
_STATES: dict[AlertKind, list[str]] = {
    "completed": ["COMPLETED"],
    "failed": ["FAILED", "CRASHED"],
    "cancelled": ["CANCELLED"],
}
_LABEL = "tuneline."
_PAGE = 200
_log = logging.getLogger(__name__)


class Channel(BaseModel):
    """A registered channel, as everybody may see it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    kind: str
    target: str


# --- channels ----------------------------------------------------------------------------------------------


def list_channels() -> list[Channel]:
    """Every channel of the Prefect server, by name, without its secrets."""
    from prefect.client.orchestration import get_client

    from deployments.alert_blocks import target_of

    with get_client(sync_client=True) as client:
        found = [
            Channel(name=str(document.name), kind=channel.kind, target=target_of(channel))
            for document, channel in _channels(client)
        ]
    return sorted(found, key=lambda item: item.name)


def add_channel(name: str, channel: AlertChannel, *, replace: bool = False) -> Channel:
    """Register a channel and the automations that send through it; its secrets are kept encrypted by Prefect.

    Raises UserError for a name that is none, or that is taken and not to be replaced.
    """
    from prefect.client.orchestration import get_client

    from deployments.alert_blocks import target_of

    _check_name(name)
    taken = {item.name: item for item in list_channels()}.get(name)
    if taken is not None and not replace:
        raise UserError(
            f"there is a channel of this name: {taken.kind}, {taken.target}",
            field="name",
            value=name,
            mend="choose another name, or --replace it",
        )
    if taken is not None and taken.kind != channel.kind:
        remove_channel(name)
    channel.save(name, overwrite=True)
    with get_client(sync_client=True) as client:
        match_automations(client)
    return Channel(name=name, kind=channel.kind, target=target_of(channel))


def remove_channel(name: str) -> None:
    """Take away a channel and its automations. Raises UserError with the known ones if there is none."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        client.delete_block_document(_find(client, name)[0].id)
        match_automations(client)


def test_channel(name: str) -> str:
    """Send a test message through a channel; returns what the receiver answered.

    Raises UserError with the known channels if there is none, or with what the receiver said if it did not take it.
    """
    from prefect.blocks.abstract import NotificationError
    from prefect.client.orchestration import get_client

    from deployments.alert_blocks import deliver, target_of

    with get_client(sync_client=True) as client:
        channel = _find(client, name)[1]
    message = AlertMessage(kind="test", train="none", state="Test", reason=f"sent by `tuneline alerts test {name}`")
    try:
        return deliver(channel, message.model_dump_json())
    except NotificationError as error:
        raise UserError(
            f"the test message did not arrive: {error.log}",
            field="channel",
            value=f"{name} ({target_of(channel)})",
            mend=f"mend what it says; `tuneline alerts add {name} … --replace` gives another address",
        ) from None


def check_subscriptions(subscriptions: list[Subscription]) -> None:
    """Refuse a subscription whose channel there is not. Raises UserError with those there are."""
    if not subscriptions:
        return
    known = [channel.name for channel in list_channels()]
    for subscription in subscriptions:
        if subscription.to not in known:
            raise _unknown(subscription.to, known, "alerts")


def _check_name(name: str) -> None:
    try:
        TypeAdapter(ChannelName).validate_python(name)
    except ValidationError:
        expected = "a-z, 0-9 and single - inside (at most 40)"
        raise UserError("this is no name for a channel", field="name", value=name, expected=expected) from None


def _find(client: SyncPrefectClient, name: str) -> tuple[BlockDocument, AlertChannel]:
    found = {str(document.name): (document, channel) for document, channel in _channels(client)}
    if name not in found:
        raise _unknown(name, sorted(found), "channel")
    return found[name]


def _unknown(name: str, known: list[str], field: str) -> UserError:
    near = nearest(name, known)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    return UserError(
        "there is no such alert channel",
        field=field,
        value=name,
        expected=f"one of {', '.join(known)}" if known else "the name of a channel; none is registered yet",
        mend=f"{hint}`tuneline alerts add {name} --webhook` (or --slack, --mail) registers it",
    )


def _channels(client: SyncPrefectClient) -> Iterator[tuple[BlockDocument, AlertChannel]]:
    from prefect.exceptions import ObjectNotFound

    from deployments.alert_blocks import CHANNEL_TYPES

    for channel_type in CHANNEL_TYPES:
        slug = channel_type.get_block_type_slug()
        documents: list[BlockDocument] = []
        try:
            while len(documents) % _PAGE == 0:
                page = client.read_block_documents_by_type(slug, limit=_PAGE, offset=len(documents))
                if not page:
                    break
                documents += page
        except ObjectNotFound:  # no channel of this type was ever registered
            continue
        for document in documents:
            yield document, channel_type.model_validate(document.data)


# --- automations -------------------------------------------------------------------------------------------


def describe_automations(client: SyncPrefectClient) -> list[AutomationCore]:
    """The automations that the server's channels ask for: one for each channel and kind."""
    channels = sorted(_channels(client), key=lambda item: str(item[0].name))
    return [_automation(document, kind) for document, _ in channels for kind in _KINDS]


def match_automations(client: SyncPrefectClient) -> dict[str, Change]:
    """Make the server's alert automations those of its channels; returns what was done, by name.

    One that was paused on the page stays paused.
    """
    changes: dict[str, Change] = {}
    wanted = {item.name: item for item in describe_automations(client)}
    found = {item.name: item for item in _automations(client)}
    for name, automation in wanted.items():
        if name not in found:
            client.create_automation(automation)
            changes[name] = "created"
        elif _content(found[name]) != _content(automation):
            # Written out in full: the client sends only what was set, which `type` of a trigger never is.
            complete = automation.model_dump() | {"enabled": found[name].enabled}
            client.update_automation(found[name].id, type(automation).model_validate(complete))
            changes[name] = "updated"
        else:
            changes[name] = "unchanged"
    for name, old in found.items():
        if name not in wanted:
            client.delete_automation(old.id)
            changes[name] = "removed"
    return changes


def _automations(client: SyncPrefectClient) -> list[Any]:
    found: list[Any] = []
    while True:
        page = client.read_automations(limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            return [item for item in found if item.name.startswith(AUTOMATION_PREFIX)]


def _content(automation: AutomationCore) -> dict[str, Any]:
    content = automation.model_dump(mode="json", include={"description", "trigger", "actions"})
    content["trigger"].pop("id", None)
    return content


def _automation(document: BlockDocument, kind: AlertKind) -> AutomationCore:
    from prefect.events.actions import SendNotification
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    name = str(document.name)
    tag: dict[str, str | list[str]] = {
        "prefect.resource.id": f"prefect.tag.{alert_tag(name, kind)}",
        "prefect.resource.role": "tag",
    }
    promoted = kind == "promoted"
    trigger = EventTrigger(
        expect={MODEL_PROMOTED} if promoted else {"prefect.flow-run.*"},
        match={} if promoted else {"prefect.resource.id": "prefect.flow-run.*", "prefect.state-type": _STATES[kind]},
        match_related=tag if promoted else {},
        for_each={"prefect.resource.id"},
        posture=Posture.Reactive,
        threshold=1,
    )
    ended = f'{{% if flow_run and "{alert_tag(name, kind)}" in flow_run.tags %}}{_ENDED}{{% endif %}}'
    body = _PROMOTED if promoted else ended.replace("KIND", kind)
    return AutomationCore(
        name=f"{AUTOMATION_PREFIX}{name} {kind}",
        description=f"Tells the channel {name} of trains with the tag {alert_tag(name, kind)}.",
        trigger=trigger,
        actions=[SendNotification(block_document_id=document.id, subject="Tuneline", body=body)],
    )


def _label(name: str) -> str:
    return f'{{{{ flow_run.labels["{_LABEL}{name}"] | default("", true) | tojson }}}}'


def _given(name: str) -> str:
    return f'{{{{ event.payload["{name}"] | default("", true) | tojson }}}}'


# Rendered by the server; `tojson` keeps it valid JSON whatever the words of an error are.
_ENDED = (
    '{"kind": "KIND", '
    f'"train": {{{{ flow_run.labels["{_LABEL}train"] | default(flow_run.name, true) | tojson }}}}, '
    '"state": {{ flow_run.state.name | tojson }}, '
    '"reason": {{ flow_run.state.message | default("", true) | tojson }}, '
    f'"model": {_label("model")}, "scores": {_label("scores")}, '
    f'"prefect": {_label("prefect")}, "mlflow": {_label("mlflow")}}}'
)
_PROMOTED = (
    '{"kind": "promoted", "state": "Promoted", '
    + ", ".join(f'"{name}": {_given(name)}' for name in ("train", "reason", "model", "scores", "prefect", "mlflow"))
    + "}"
)


# --- what a train tells ------------------------------------------------------------------------------------


def server_sends() -> bool:
    """Whether a standing Prefect server will send; otherwise this process has to."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def run_tags(subscriptions: list[Subscription]) -> set[str]:
    """The tags that a flow run needs so that the server tells these subscribers of it; none if it will not."""
    return set(alert_tags(subscriptions)) if server_sends() else set()


def without_alert_tags(tags: Iterable[str]) -> set[str]:
    """The other tags: a run that was copied on the page brings along those of the run that it is a copy of."""
    return {tag for tag in tags if not tag.startswith(TAG_PREFIX)}


def run_labels(record: TrainRecord, prefect_page: str | None, mlflow_page: str | None) -> KeyValueLabels:
    """What the server can tell of a train whose process is dead: labels for its flow run."""
    told = {"train": record.id, "prefect": prefect_page or "", "mlflow": mlflow_page or ""}
    return {f"{_LABEL}{name}": value for name, value in told.items()}


def prepare_end(record: TrainRecord, *, asked_to_stop: bool) -> list[str]:
    """Make the end of a train known to its subscribers; to be called before its flow run is in its last state.

    The server tells them when it sees that state, and needs the scores for it; without a standing server they are
    told here. A flow run that was asked to stop passes through Failed or Crashed on its way to Cancelled: its
    subscribers are not told that it has failed. Nothing that goes wrong here harms the train: it is returned.
    """
    if not record.config.alerts:
        return []
    try:
        if not server_sends():
            return _send_end(record)
        _prepare_run(record, asked_to_stop)
        return []
    except Exception as error:
        return [f"the subscribers of {record.id} may not be told how it ended: {error}"]


def take_over_crashed(record: TrainRecord) -> None:
    """Tell that a train was killed, in place of its dead process, if no standing server does it.

    To be called before its flow run is marked as crashed.
    """
    if not record.config.alerts or server_sends():
        return
    try:
        if record.flow_run_id is not None:
            _drop_tags(record.flow_run_id, alert_tags(record.config.alerts))
        problems = _send_end(record)
    except Exception as error:
        problems = [f"the subscribers of {record.id} could not be told that it was killed: {error}"]
    for problem in problems:
        _log.warning("%s", problem)


def send_promotion(subscriptions: list[Subscription], message: AlertMessage) -> list[str]:
    """Tell of a promotion from this process, where no standing server hears the event; returns what went wrong."""
    return _send(subscriptions, "promoted", message)


def _prepare_run(record: TrainRecord, asked_to_stop: bool) -> None:
    from prefect.client.orchestration import get_client

    if record.flow_run_id is None:
        return
    labels: KeyValueLabels = {f"{_LABEL}model": record.model or "", f"{_LABEL}scores": json.dumps(record.evaluation)}
    with get_client(sync_client=True) as client:
        client.update_flow_run_labels(UUID(record.flow_run_id), labels)
        state = client.read_flow_run(UUID(record.flow_run_id)).state
    if asked_to_stop or (state is not None and (state.is_cancelling() or state.is_cancelled())):
        _drop_tags(record.flow_run_id, alert_tags(record.config.alerts, ["failed"]))


def _drop_tags(flow_run_id: str, tags: list[str]) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    with get_client(sync_client=True) as client:
        try:
            found = client.read_flow_run(UUID(flow_run_id)).tags
        except ObjectNotFound:  # it is on another Prefect server
            return
        client.update_flow_run(UUID(flow_run_id), tags=[tag for tag in found if tag not in tags])


_ENDS: dict[TrainStatus, tuple[AlertKind, str]] = {
    "completed": ("completed", "Completed"),
    "failed": ("failed", "Failed"),
    "cancelled": ("cancelled", "Cancelled"),
    "interrupted": ("failed", "Crashed"),
}


def _send_end(record: TrainRecord) -> list[str]:
    kind, state = _ENDS[record.status]
    message = AlertMessage(
        kind=kind,
        train=record.id,
        state=state,
        reason=record.reason,
        model=record.model,
        scores=record.evaluation,
    )
    return _send(record.config.alerts, kind, message)


def _send(subscriptions: list[Subscription], kind: AlertKind, message: AlertMessage) -> list[str]:
    from prefect.blocks.abstract import NotificationError
    from prefect.client.orchestration import get_client

    from deployments.alert_blocks import deliver

    problems = []
    for name in sorted({subscription.to for subscription in subscriptions if kind in subscription.on}):
        try:
            with get_client(sync_client=True) as client:
                channel = _find(client, name)[1]
            deliver(channel, message.model_dump_json())
        except NotificationError as error:
            problems.append(f"the alert channel {name} was not told of {message.train}: {error.log}")
        except UserError as error:
            problems.append(f"the alert channel {name} was not told of {message.train}: {error.problem}")
    return problems
