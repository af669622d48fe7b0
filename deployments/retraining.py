"""When a line is retrained: its schedule, the trigger on new rows, and the deployment `retrain/LINE` that has both."""

from __future__ import annotations

import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import UUID
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from configs.errors import UserError
from configs.retraining import RetrainPolicy
from configs.settings import Settings
from configs.strict_yaml import read_yaml
from deployments import forms
from deployments.automations import SHIPPED, train_tag
from deployments.work_pools import WORK_POOL
from tasks.events import DATASET_ADDED, resource_id
from tasks.files import write_text

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

FLOW = "retrain"
_SCHEDULE_FILE = "schedule.yaml"
_POLICY_FILE = "policy.yaml"
_SLUG = "retraining"
Kept = TypeVar("Kept", bound=BaseModel)
_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


class RetrainSchedule(BaseModel):
    """When a line is retrained. Kept as `schedule.yaml` beside its policy; a line without one has no deployment."""

    model_config = ConfigDict(extra="forbid")

    cron: str | None = Field(default=None, description="Cron expression of five fields.")
    every: str | None = Field(default=None, description="A number and s, m, h, d or w: 7d.")
    timezone: str = Field(default="UTC", description="IANA name of the zone that the cron expression is meant in.")
    on_new_data: bool = Field(default=False, description="Whether a new version of the dataset starts it as well.")
    pool: str = Field(default=WORK_POOL, description="Work pool whose hosts have the line's models.")

    def told(self) -> str:
        """The schedule in words."""
        when = [f"cron {self.cron} ({self.timezone})"] if self.cron else []
        when += [f"every {self.every}"] if self.every else []
        when += ["when the dataset has a new version"] if self.on_new_data else []
        return " and ".join(when)


class RetrainedLine(BaseModel):
    """A line with its policy and its schedule."""

    policy: RetrainPolicy
    schedule: RetrainSchedule

    @property
    def title(self) -> str:
        """The name of its deployment, `retrain/LINE`, on another pool than the first one with that pool's name."""
        suffix = "" if self.schedule.pool == WORK_POOL else f"@{self.schedule.pool}"
        return f"{FLOW}/{self.policy.line}{suffix}"


def checked_schedule(
    cron: str | None, every: str | None, timezone: str, on_new_data: bool, policy: RetrainPolicy, pool: str = WORK_POOL
) -> RetrainSchedule:
    """The schedule of these values. Raises UserError for one that is never, twice, or impossible."""
    schedule = RetrainSchedule(cron=cron, every=every, timezone=timezone, on_new_data=on_new_data, pool=pool)
    if (cron is not None and every is not None) or not (cron or every or on_new_data):
        raise UserError(
            "when is it to be retrained?",
            field="--cron, --every, --on-new-data",
            expected="a cron expression or an interval, or that new data start it",
            mend="for example --cron '0 3 * * 1', or --every 7d",
        )
    if on_new_data and Path(policy.dataset).is_absolute():
        raise UserError(
            "nobody is told when a file changes",
            field="--on-new-data",
            value=policy.dataset,
            mend="follow a registered dataset by its name, or read the file on a schedule",
        )
    _prefect_schedule(schedule)
    return schedule


def _prefect_schedule(schedule: RetrainSchedule) -> Any:
    """The schedule as Prefect takes it; None for a line that only new data start."""
    from prefect.client.schemas.schedules import CronSchedule, IntervalSchedule

    try:
        zone = ZoneInfo(schedule.timezone)
    except (ZoneInfoNotFoundError, ValueError) as error:
        raise UserError(
            "there is no such time zone", field="--timezone", value=schedule.timezone, expected="such as Europe/Berlin"
        ) from error
    if schedule.cron is not None:
        try:
            return CronSchedule(cron=schedule.cron, timezone=zone.key)
        except ValidationError as error:
            raise UserError(
                "this is no cron expression",
                field="--cron",
                value=schedule.cron,
                expected="minute, hour, day of month, month, day of week: '0 3 * * 1' is Mondays at 3:00",
            ) from error
    if schedule.every is not None:
        return IntervalSchedule(interval=interval_of(schedule.every))
    return None


def interval_of(text: str) -> timedelta:
    """`7d`, `12h`, `30m`, `45s`, `2w` as a duration. Raises UserError for anything else."""
    found = re.fullmatch(r"(\d{1,4})([smhdw])", text.strip())
    if found is None or int(found[1]) == 0:
        raise UserError("this is no interval", field="--every", value=text, expected="such as 7d, 12h, 30m or 45s")
    return timedelta(**{_UNITS[found[2]]: int(found[1])})


# --- what is kept ------------------------------------------------------------------------------------------


def save_schedule(settings: Settings, line: str, schedule: RetrainSchedule) -> None:
    """Write the schedule beside the line's policy."""
    import yaml

    content = yaml.safe_dump(schedule.model_dump(exclude_none=True), allow_unicode=True, sort_keys=False)
    write_text(settings.retraining / line / _SCHEDULE_FILE, content)


def forget_schedule(settings: Settings, line: str) -> RetrainSchedule | None:
    """Remove the schedule of a line and return it, None if it had none; its policy and its history stay."""
    path = settings.retraining / line / _SCHEDULE_FILE
    if not path.exists():
        return None
    found = _read(path, RetrainSchedule)
    path.unlink()
    return found


def scheduled_lines(settings: Settings) -> list[RetrainedLine]:
    """Every line of this installation that has a schedule, by name. Raises UserError for a file that is wrong."""
    return [_read_line(path.parent) for path in sorted(settings.retraining.glob(f"*/{_SCHEDULE_FILE}"))]


def _read_line(folder: Path) -> RetrainedLine:
    return RetrainedLine(
        policy=_read(folder / _POLICY_FILE, RetrainPolicy), schedule=_read(folder / _SCHEDULE_FILE, RetrainSchedule)
    )


def _read(file: Path, kind: type[Kept]) -> Kept:
    try:
        return kind.model_validate(read_yaml(file).values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or None
        raise UserError(f"this is wrong: {first['msg']}", file=file, field=name) from error


# --- what is on the server ---------------------------------------------------------------------------------


def retrain_form(policy: RetrainPolicy) -> forms.Schema:
    """The form of `retrain/LINE`: the policy, each value of which can be another one for a run."""
    form = forms.plain_form(RetrainPolicy)
    fields = form["properties"]
    for name, value in policy.model_dump(mode="json", exclude_none=True).items():
        fields[name]["default"] = value
    fields["line"]["enum"] = [policy.line]
    fields["force"] = {
        "type": "boolean",
        "default": False,
        "title": "Train although nothing is new",
        "description": "Otherwise rows that were tried already are skipped.",
        "position": len(fields),
    }
    return form | {"required": ["line"]}


def on_creation(line: RetrainedLine) -> dict[str, Any]:
    """What only a new deployment is given: afterwards it is changed on the page, or by `tuneline retrain schedule`.

    One run at a time, and a run that is due meanwhile is cancelled: missed and slow ones do not pile up.
    """
    from prefect.client.schemas.actions import DeploymentScheduleCreate
    from prefect.client.schemas.objects import ConcurrencyLimitStrategy, ConcurrencyOptions

    when = _prefect_schedule(line.schedule)
    return {
        "parameters": {"line": line.policy.line},
        "schedules": [DeploymentScheduleCreate(schedule=when, active=True, slug=_SLUG)] if when is not None else [],
        "concurrency_limit": 1,
        "concurrency_options": ConcurrencyOptions(collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW),
    }


def describe_automations(lines: Iterable[tuple[RetrainedLine, UUID]]) -> list[AutomationCore]:
    """The triggers on new rows, of lines with the ids of their deployments."""
    from prefect.events.actions import RunDeployment
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
    from prefect.events.schemas.events import ResourceSpecification

    return [
        AutomationCore(
            name=f"tuneline: retrain {line.policy.line} on new data ({line.schedule.pool})",
            description=f"Starts {line.title} when the dataset {line.policy.dataset} has a new version.",
            tags=[SHIPPED, train_tag(line.schedule.pool)],
            trigger=EventTrigger(
                posture=Posture.Reactive,
                expect={DATASET_ADDED},
                match=ResourceSpecification.model_validate(
                    {"prefect.resource.id": [resource_id("dataset", line.policy.dataset)]}
                ),
                threshold=1,
                within=timedelta(0),
            ),
            actions=[
                RunDeployment(
                    source="selected",
                    deployment_id=deployment,
                    parameters={"line": line.policy.line},
                    job_variables=None,
                    schedule_after=timedelta(0),
                )
            ],
        )
        for line, deployment in lines
        if line.schedule.on_new_data
    ]


def replace_schedule(client: SyncPrefectClient, line: RetrainedLine) -> None:
    """Give the line's deployment this schedule instead of those it has, and none but its default parameters."""
    from prefect.client.schemas.actions import DeploymentScheduleUpdate, DeploymentUpdate

    found = client.read_deployment_by_name(line.title)
    when = _prefect_schedule(line.schedule)
    schedules = [DeploymentScheduleUpdate(schedule=when, active=True, slug=_SLUG)] if when is not None else []
    client.update_deployment(
        found.id, DeploymentUpdate(schedules=schedules, parameters={"line": line.policy.line}, paused=False)
    )
