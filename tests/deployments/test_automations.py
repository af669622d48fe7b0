"""The shipped automations on a real Prefect server: there once, mended, removed, and switched off if somebody wants."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import DoNothing
from prefect.events.schemas.automations import Automation, AutomationCore, EventTrigger, Posture

from configs.settings import HEARTBEAT_SECONDS, SILENCE_SECONDS, Settings, apply_environment
from deployments.automations import SHIPPED, train_tag
from deployments.flow_deployments import deploy_flows

ZOMBIES = "tuneline: crash runs without a heartbeat"
CRASHED = "tuneline: take up crashed trains (tuneline)"


class Page:
    """The automations of a server, as its page shows and changes them."""

    def __init__(self, settings: Settings, api: str, client: SyncPrefectClient) -> None:
        self.settings, self.api, self.client = settings, api, client

    def deploy(self, pool: str = "tuneline") -> dict[str, str]:
        changes = deploy_flows(self.settings, self.api, pool)
        said = {item.deployment.removeprefix("automation "): item.change for item in changes}
        ours = ("tuneline: crash runs", "tuneline: take up", "tuneline: of ")  # the subscribers have theirs as well
        return {name: change for name, change in said.items() if name.startswith(ours)}

    def automation(self, name: str) -> Automation:
        (found,) = [item for item in self.client.read_automations() if item.name == name]
        return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    from prefect.settings import PREFECT_API_URL
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        api = PREFECT_API_URL.value()
        assert api is not None
        with SyncPrefectClient(api) as client:
            made = Page(Settings(home=tmp_path_factory.mktemp("home")), api, client)
            assert made.deploy() == {ZOMBIES: "created", CRASHED: "created"}
            yield made


def test_what_is_there_is_not_made_again(page: Page) -> None:
    before = page.client.read_automations()
    assert page.deploy() == {ZOMBIES: "unchanged", CRASHED: "unchanged"}
    assert page.client.read_automations() == before


def test_a_run_is_crashed_after_no_less_than_three_heartbeats(
    page: Page, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trigger = page.automation(ZOMBIES).trigger
    assert isinstance(trigger, EventTrigger)
    assert trigger.posture == Posture.Proactive
    assert trigger.within == timedelta(seconds=SILENCE_SECONDS) >= timedelta(seconds=3 * HEARTBEAT_SECONDS)
    assert trigger.for_each == {"prefect.resource.id"}  # else one living run would speak for all of them

    # What a process was given before is the trap: with Prefect's default of 180 s every run would be crashed.
    monkeypatch.setenv("PREFECT_FLOWS_HEARTBEAT_FREQUENCY", "180")
    apply_environment(Settings(home=tmp_path))
    assert os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] == str(HEARTBEAT_SECONDS)


def test_a_crashed_train_is_given_to_the_flow_that_decides_about_it(page: Page) -> None:
    (action,) = page.automation(CRASHED).model_dump(mode="json")["actions"]
    deployment = page.client.read_deployment_by_name("resume/after-crash")
    assert action["deployment_id"] == str(deployment.id)
    assert "flow_run.id" in str(action["parameters"]["crashed_flow_run"])
    assert action["schedule_after"] >= 10  # or the report of the old attempt would come after it


def test_what_somebody_has_changed_is_mended_and_what_he_has_switched_off_stays_off(page: Page) -> None:
    page.client.pause_automation(page.automation(CRASHED).id)
    zombies = page.automation(ZOMBIES)
    changed = zombies.model_dump(exclude={"id", "owner_resource"}) | {"description": "mine", "enabled": False}
    page.client.update_automation(zombies.id, AutomationCore(**changed))
    assert page.deploy() == {ZOMBIES: "updated", CRASHED: "unchanged"}
    assert page.automation(ZOMBIES).description.startswith("Marks a flow run")
    assert (page.automation(ZOMBIES).enabled, page.automation(CRASHED).enabled) == (False, False)
    for name in (ZOMBIES, CRASHED):
        page.client.resume_automation(page.automation(name).id)
    assert page.deploy() == {ZOMBIES: "unchanged", CRASHED: "unchanged"}


def test_what_is_described_no_more_is_removed_and_what_others_made_is_kept(page: Page) -> None:
    trigger = EventTrigger(expect={"never"}, posture=Posture.Reactive)
    others = {
        "of an earlier version": [SHIPPED],
        "of somebody else": ["tuneline"],
        "of another pool": [SHIPPED, train_tag("x")],
    }
    for name, tags in others.items():
        page.client.create_automation(
            AutomationCore(name=f"tuneline: {name}", tags=tags, trigger=trigger, actions=[DoNothing()])
        )
    assert page.deploy()["tuneline: of an earlier version"] == "removed"
    names = {item.name for item in page.client.read_automations()}
    assert names == {ZOMBIES, CRASHED, "tuneline: of somebody else", "tuneline: of another pool"}


def test_each_pool_takes_up_its_own_trains_and_all_share_one_watch(page: Page) -> None:
    assert page.deploy("gpu-a100") == {ZOMBIES: "unchanged", "tuneline: take up crashed trains (gpu-a100)": "created"}
    assert page.deploy() == {ZOMBIES: "unchanged", CRASHED: "unchanged"}
    (action,) = page.automation("tuneline: take up crashed trains (gpu-a100)").model_dump(mode="json")["actions"]
    theirs = page.client.read_deployment_by_name("resume/after-crash@gpu-a100")
    assert action["deployment_id"] == str(theirs.id)
