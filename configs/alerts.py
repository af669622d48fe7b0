"""Who is told how a train went: the subscriptions of a train, and the message that a channel sends."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_validator
from pydantic_core import PydanticCustomError, from_json

AlertKind = Literal["completed", "failed", "cancelled", "promoted"]
TAG_PREFIX = "alert:"

_WORDS: dict[AlertKind, str] = {
    "completed": "is completed",
    "failed": "has failed",
    "cancelled": "was cancelled",
    "promoted": "has given the new champion",
}


def _channel_name(value: str) -> str:
    if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", value):
        raise PydanticCustomError("channel", "not usable as the name of a channel")
    return value


ChannelName = Annotated[
    str,
    BeforeValidator(lambda value: _channel_name(value) if isinstance(value, str) else value),
    Field(
        min_length=1,
        max_length=40,
        json_schema_extra={
            "limits": "a-z, 0-9 and single - inside (at most 40)",
            "pattern": r"^[a-z0-9]+(-[a-z0-9]+)*$",
        },
    ),
]


class Subscription(BaseModel):
    """One channel, and what it is told of a train."""

    model_config = ConfigDict(extra="forbid")

    to: ChannelName = Field(title="Channel", description="Name of a channel; `tuneline alerts list` shows them.")
    on: list[AlertKind] = Field(
        default=["completed", "failed", "promoted"],
        min_length=1,
        title="When",
        description="What is told: completed, failed (a crash or a lost host as well), cancelled, promoted "
        "(retraining has made a better model the champion).",
    )

    @field_validator("on", mode="before")
    @classmethod
    def _list(cls, value: object) -> object:
        """`on: failed` is `on: [failed]`."""
        return [value] if isinstance(value, str) else value


def alert_tag(channel: str, kind: AlertKind) -> str:
    """The tag by which the automation of a channel knows what it is to tell: `alert:ops:failed`."""
    return f"{TAG_PREFIX}{channel}:{kind}"


def alert_tags(subscriptions: Iterable[Subscription], kinds: Iterable[AlertKind] | None = None) -> list[str]:
    """The tags of these subscriptions, those of `kinds` only if given; sorted, each once."""
    chosen = None if kinds is None else set(kinds)
    return sorted({alert_tag(s.to, kind) for s in subscriptions for kind in s.on if chosen is None or kind in chosen})


class AlertMessage(BaseModel):
    """What a channel is told of a train; a webhook gets exactly this as JSON, with `text` added.

    `scores` are in percent, by `base` and `tuned` (champion and challenger for a promotion), then by metric.
    """

    model_config = ConfigDict(extra="forbid")

    kind: AlertKind | Literal["test"]
    train: str = Field(description="Id of the train; its flow run's name if it failed before it had one.")
    state: str = Field(description="State of the flow run, such as Completed, Failed, Crashed, TimedOut.")
    reason: str | None = None
    model: str | None = Field(default=None, description="The newest model that it made.")
    scores: dict[str, dict[str, float]] = {}
    prefect: str | None = Field(default=None, description="Page of the flow run.")
    mlflow: str | None = Field(default=None, description="Page of the MLflow run.")

    @field_validator("scores", mode="before")
    @classmethod
    def _scores(cls, value: object) -> object:
        """Labels of a flow run are text: scores travel in them as JSON."""
        return from_json(value) if isinstance(value, str) and value else (value or {})

    @field_validator("reason", "model", "prefect", "mlflow", mode="before")
    @classmethod
    def _nothing(cls, value: object) -> object:
        return value or None

    def subject(self) -> str:
        """One line: what happened to which train."""
        if self.kind == "test":
            return "Tuneline: this is a test"
        crashed = self.kind == "failed" and self.state == "Crashed"
        return f"Tuneline: {self.train} {'has crashed' if crashed else _WORDS[self.kind]}"

    def text(self) -> str:
        """The whole message for people, without its subject."""
        lines = [f"{self.state}: {self.reason}" if self.reason else self.state]
        lines += [f"{name}: {value}" for name, value in self._named() if value]
        metrics = sorted({metric for scores in self.scores.values() for metric in scores})
        for metric in metrics:
            values = ", ".join(f"{which} {found[metric]:g}" for which, found in self.scores.items() if metric in found)
            lines.append(f"{metric}: {values}")
        return "\n".join(lines)

    def _named(self) -> list[tuple[str, str | None]]:
        return [("Model", self.model), ("Prefect", self.prefect), ("MLflow", self.mlflow)]

    def payload(self) -> dict[str, Any]:
        """What a webhook is sent."""
        return {**self.model_dump(mode="json"), "text": f"{self.subject()}\n{self.text()}"}
