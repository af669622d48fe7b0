"""A schedule of seconds on real servers: it retrains on new rows, promotes, refuses, skips, deploys, and goes back."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from configs.endpoints import Endpoint
from configs.retraining import RetrainOutcome
from deployments import services
from deployments.flow_deployments import deploy_flows
from tests.deployments.server import Server, installation_with_servers, processes_naming, wait_for
from tests.flows.command_line import printed, tuneline

pytestmark = pytest.mark.operations

LINE = "switch"
TITLE = f"retrain/{LINE}"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("schedule")
    with installation_with_servers(root) as server:
        try:
            yield server
        finally:
            command(server, "undeploy", LINE)
    assert processes_naming(str(root / "home")) == []


def command(server: Server, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    extra = {"TUNELINE_GPU_LOCKS": str(server.root / "gpu-locks"), "TUNELINE_GRACE_SECONDS": "20"}
    return tuneline(*arguments, home=server.settings.root, cwd=server.root, extra=extra, seconds=240)


def add_rows(server: Server, name: str, answer: str, first: int, rows: int = 24) -> None:
    path = server.root / f"{name}.jsonl"
    lines = [{"prompt": f"switch the light {number}", "completion": answer} for number in range(first, first + rows)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    printed(command(server, "datasets", "add", path, "--name", name))


def history(server: Server) -> list[RetrainOutcome]:
    path = server.settings.retraining / LINE / "history.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [RetrainOutcome.model_validate_json(line) for line in lines]


def next_outcome(server: Server, result: str, since: int, seconds: float = 240) -> RetrainOutcome:
    """The first outcome of that kind after the first `since` ones; nothing but skips may come before it."""

    def found() -> list[RetrainOutcome]:
        return [each for each in history(server)[since:] if each.result == result or each.result != "skipped"]

    wait_for(found, seconds)
    assert found()[0].result == result, found()[0]
    return found()[0]


def endpoint(server: Server) -> Endpoint:
    return Endpoint.model_validate_json((server.settings.endpoints / LINE / "endpoint.json").read_bytes())


def served(server: Server) -> str | None:
    current = endpoint(server).current_deployment
    return current.model_name if current is not None else None


def answer(server: Server) -> str:
    record = endpoint(server)
    client = openai.OpenAI(base_url=record.address, api_key="none")
    said = client.chat.completions.create(
        model=str(record.current),
        messages=[{"role": "user", "content": "switch the light 1001"}],
        temperature=0,
        max_tokens=4,
    )
    return str(said.choices[0].message.content).strip()


def runs(server: Server) -> list[dict[str, Any]]:
    """The runs of the deployment whose time has come."""
    of_line = {"deployments": {"id": {"any_": [server.deployment(TITLE)["id"]]}}, "limit": 200}
    found = server.post("/flow_runs/filter", of_line)
    return [run for run in found if run["state"]["type"] != "SCHEDULED" or run["state"]["name"] == "Late"]


def events(server: Server, name: str) -> list[dict[str, Any]]:
    asked = {"occurred": {"since": "2020-01-01T00:00:00Z"}, "event": {"name": [name]}}
    return list(server.post("/events/filter", {"filter": asked})["events"])


def test_a_schedule_promotes_refuses_and_skips_and_the_endpoint_follows(server: Server) -> None:
    add_rows(server, "lights", "off", 0)
    add_rows(server, "held-out", "on", 1000, rows=32)
    given = server.train(LINE, max_steps=120, learning_rate=0.02, lr_scheduler="constant")
    given["train"] |= {"dataset": "lights", "max_new_tokens": 4}
    run = server.start("customized/sft", given).json()["id"]
    wait_for(lambda: server.state(run) in ("Completed", "Failed", "Crashed"), 180)
    assert server.state(run) == "Completed"
    champion = server.record(LINE).model

    policy = ("--evaluation-dataset", "held-out", "--margin", "5", "--then", "deployed")
    told = printed(command(server, "retrain", "schedule", LINE, "--every", "15s", "--on-new-data", *policy))
    assert f"deployed as {TITLE}" in told
    deployment = server.deployment(TITLE)
    assert [item["schedule"]["interval"] for item in deployment["schedules"]] == [15.0]
    assert deployment["concurrency_options"]["collision_strategy"] == "CANCEL_NEW"

    # Nothing is new.
    skipped = next_outcome(server, "skipped", 0)
    assert f"the champion {champion} was trained on" in skipped.reason
    assert len(server.records(LINE)) == 1

    # Better rows: promoted, completed, deployed.
    before = len(history(server))
    add_rows(server, "lights", "on", 100)
    promoted = next_outcome(server, "promoted", before)
    assert (promoted.champion, promoted.endpoint) == (champion, LINE)
    assert "_s_" in str(promoted.model)
    assert answer(server) == "on"
    wait_for(lambda: events(server, "tuneline.model.promoted"), 30)  # the server writes them down every few seconds
    (event,) = events(server, "tuneline.model.promoted")
    assert event["resource"]["prefect.resource.id"] == f"tuneline.line.{LINE}"
    assert event["resource"]["tuneline.model"] == promoted.model
    assert event["payload"]["reason"] == promoted.reason

    # Worse rows: refused, the endpoint stays.
    before = len(history(server))
    add_rows(server, "lights", "off", 200)
    refused = next_outcome(server, "refused", before)
    assert (refused.champion, refused.model) == (promoted.model, None)
    assert answer(server) == "on"

    # Nothing is new again.
    skipped = next_outcome(server, "skipped", len(history(server)))
    assert f"refused with {refused.dataset}" in skipped.reason
    assert len(server.records(LINE)) == 3

    # New rows had started it at once as well, not only the schedule.
    created = {run["created_by"]["type"] for run in runs(server) if run["created_by"]}
    assert created == {"SCHEDULE", "AUTOMATION"}


def test_runs_missed_while_everything_was_down_do_not_run_one_after_the_other(server: Server) -> None:
    def missed() -> list[dict[str, Any]]:
        return [run for run in runs(server) if run["state"]["name"] == "Late"]

    services.down(server.settings)
    time.sleep(50)  # three or four times are missed, which were planned while the server stood
    since = len(history(server))
    services.up(server.settings)
    next_outcome(server, "skipped", since)
    wait_for(lambda: not missed())
    cancelled = [run for run in runs(server) if run["state"]["type"] == "CANCELLED"]
    assert cancelled
    assert {run["state"]["message"] for run in cancelled} == {"Deployment concurrency limit reached."}
    assert len(server.records(LINE)) == 3


def test_the_schedule_is_made_anew_on_a_server_that_has_lost_it_and_stays_as_the_page_has_it(server: Server) -> None:
    server.http.delete(f"/deployments/{server.deployment(TITLE)['id']}").raise_for_status()
    changes = {item.deployment: item.change for item in deploy_flows(server.settings, server.api)}
    assert changes[TITLE] == "created"
    deployment = server.deployment(TITLE)
    assert [item["schedule"]["interval"] for item in deployment["schedules"]] == [15.0]
    assert deployment["parameters"] == {"line": LINE}
    (schedule,) = deployment["schedules"]
    path = f"/deployments/{deployment['id']}/schedules/{schedule['id']}"
    server.http.patch(path, json={"active": False}).raise_for_status()

    changes = {item.deployment: item.change for item in deploy_flows(server.settings, server.api)}

    assert set(changes.values()) == {"unchanged"}
    assert [item["active"] for item in server.deployment(TITLE)["schedules"]] == [False]


def test_a_rollback_takes_the_endpoint_along(server: Server) -> None:
    promotion = next(each for each in history(server) if each.result == "promoted")
    told = printed(command(server, "retrain", "rollback", LINE))
    assert str(promotion.champion) in told
    assert served(server) == promotion.champion
    assert answer(server) != "on"


def test_a_deployment_that_fails_leaves_champion_and_endpoint_and_is_recorded(server: Server) -> None:
    champion = history(server)[-1].model
    blocked = server.settings.endpoints / "blocked"
    blocked.write_text("no folder can be made here")
    add_rows(server, "lights", "on", 300)
    done = command(server, "retrain", "run", LINE, "--endpoint", "blocked")
    assert done.returncode != 0
    last = history(server)[-1]
    assert (last.result, last.champion, last.model) == ("not_deployed", champion, None)
    assert "blocked" in last.reason
    shown = json.loads(printed(command(server, "models", "list", "--json")))
    assert [each["name"] for each in shown["mine"] if "champion" in each["aliases"]] == [champion]
    assert served(server) == champion
    blocked.unlink()


def test_an_unscheduled_line_has_neither_deployment_nor_automation(server: Server) -> None:
    named = f"retrain {LINE} on new data"
    assert [item for item in server.post("/automations/filter", {}) if named in item["name"]]
    printed(command(server, "retrain", "unschedule", LINE))
    assert server.http.get(f"/deployments/name/{TITLE}").status_code == 404
    assert not [item for item in server.post("/automations/filter", {}) if named in item["name"]]


def test_the_champion_can_be_named_by_hand(server: Server) -> None:
    promotion = next(each for each in history(server) if each.result == "promoted")
    told = printed(command(server, "models", "champion", str(promotion.model)))
    assert told.strip() == f"{promotion.model} is the champion of {LINE} instead of {promotion.champion}"
    shown = json.loads(printed(command(server, "models", "list", "--json")))
    assert [each["name"] for each in shown["mine"] if "champion" in each["aliases"]] == [promotion.model]
