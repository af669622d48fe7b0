"""Schedules and forms of retrained lines, as they are described for a server."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from configs.errors import UserError
from configs.retraining import RetrainPolicy
from configs.settings import load_settings
from deployments import retraining
from deployments.flow_deployments import describe_deployments
from tasks.retraining import save_policy

pytestmark = pytest.mark.usefixtures("home")
POLICY = RetrainPolicy(line="lights", dataset="rows", evaluation_dataset="test@0123456789ab", margin=2)


def schedule(**given: Any) -> retraining.RetrainSchedule:
    values: dict[str, Any] = {"cron": None, "every": None, "timezone": "UTC", "on_new_data": False, "policy": POLICY}
    return retraining.checked_schedule(**{**values, **given})


@pytest.mark.parametrize(("text", "days"), [("7d", 7), ("2w", 14), ("36h", 1.5), ("720m", 0.5), ("8640s", 0.1)])
def test_intervals(text: str, days: float) -> None:
    assert retraining.interval_of(text) == timedelta(days=days)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "when is it to be retrained"),
        ({"cron": "0 3 * * 1", "every": "7d"}, "when is it to be retrained"),
        ({"cron": "every monday"}, "no cron expression"),
        ({"every": "7"}, "no interval"),
        ({"every": "0d"}, "no interval"),
        ({"cron": "0 3 * * 1", "timezone": "Europe/Nowhere"}, "no such time zone"),
        ({"on_new_data": True, "policy": POLICY.model_copy(update={"dataset": "/data/rows.jsonl"})}, "a file changes"),
    ],
)
def test_an_impossible_schedule_is_refused(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        schedule(**given)


def test_a_scheduled_line_is_described_with_its_form_and_gone_without_its_schedule() -> None:
    settings = load_settings()
    save_policy(POLICY)
    assert "retrain/lights" not in {item.title for item in describe_deployments(settings)}
    retraining.save_schedule(settings, "lights", schedule(cron="0 3 * * 1", timezone="Europe/Berlin"))

    (found,) = (item for item in describe_deployments(settings) if item.flow == "retrain")

    assert found.title == "retrain/lights"
    assert found.form["required"] == ["line"]
    fields = found.form["properties"]
    assert fields["line"]["enum"] == ["lights"]
    assert (fields["margin"]["default"], fields["margin"]["minimum"]) == (2, 0)
    assert fields["metric"]["enum"][0] == "accuracy"
    assert sorted(field["position"] for field in fields.values()) == list(range(len(fields)))
    (planned,) = found.on_creation["schedules"]
    assert (planned.schedule.cron, planned.schedule.timezone) == ("0 3 * * 1", "Europe/Berlin")

    assert retraining.forget_schedule(settings, "lights") is not None
    assert retraining.forget_schedule(settings, "lights") is None
    assert "retrain/lights" not in {item.title for item in describe_deployments(settings)}


def test_a_line_of_another_pool_is_described_for_that_pool_alone() -> None:
    settings = load_settings()
    save_policy(POLICY)
    retraining.save_schedule(settings, "lights", schedule(every="7d", pool="gpu-a100"))
    assert "retrain/lights" not in {item.title for item in describe_deployments(settings)}
    assert "retrain/lights@gpu-a100" in {item.title for item in describe_deployments(settings, "gpu-a100")}


def test_every_parameter_of_the_form_is_one_of_the_flow() -> None:
    import inspect

    from flows.retrain import retrain

    assert set(retraining.retrain_form(POLICY)["properties"]) == set(inspect.signature(retrain.fn).parameters)
