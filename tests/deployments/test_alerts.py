"""Alerts through a real Prefect server: it tells a webhook, a Slack-like one and a mail receiver how trains end."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from configs.alerts import alert_tags
from configs.records import TrainRecord
from configs.settings import PROJECT_ROOT, load_settings
from deployments.databases import prefect_database_uri
from tests.flows.command_line import files_below, printed, read_json, tuneline
from tests.flows.tiny_trains import installation, processes_naming, train_file, wait_for
from tests.receivers import MailReceiver, WebReceiver, make_certificate

PASSWORD = "s3cret-pass-9f2c"
HOOK_KEY = "k3y-of-the-hook-71aa"


class Bench:
    """A standing Prefect server of an installation, with three channels that listen and one that does not."""

    def __init__(self, root: Path) -> None:
        self.root, self.home = root, root / "home"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.api = f"http://127.0.0.1:{self.port}/api"
        self.web = WebReceiver()
        self.mail = MailReceiver(make_certificate(root, "127.0.0.1"), login=("tuner", PASSWORD))
        self.environment = {
            "PREFECT_HOME": str(self.home / "prefect"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "SSL_CERT_FILE": str(root / "cert.pem"),  # the server trusts this mail receiver
        }
        self.database = prefect_database_uri(load_settings())
        if self.database is not None:  # the embedded server of the home asks the same one
            self.environment["PREFECT_API_DATABASE_CONNECTION_URL"] = self.database
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(self.port)]
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.home,
                env=os.environ | self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        wait_for(self.answers, 120, 0.2)

    def answers(self) -> bool:
        try:
            return httpx.get(f"{self.api}/health", timeout=2, trust_env=False).is_success
        except httpx.TransportError:
            return False

    def stop_server(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def end(self) -> None:
        self.stop_server()
        self.web.end()
        self.mail.end()

    def run(self, *arguments: str | Path, **secrets: str) -> subprocess.CompletedProcess[str]:
        extra = {"PREFECT_API_URL": self.api, "SSL_CERT_FILE": self.environment["SSL_CERT_FILE"], **secrets}
        return tuneline(*arguments, home=self.home, cwd=self.root, extra=extra)

    def train(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """Run a train to its end as a worker does it, and wait for what the webhook is told of it."""
        alerts = [{"to": channel, "on": ["completed", "failed"]} for channel in ("hook", "team", "boss", "dead")]
        file = train_file(self.root, name, **{"alerts": alerts, **fields})
        self.flow(file).wait(120)
        wait_for(lambda: self.told("/hook/", name) and self.told("/team/", name) and self.mails(name), 30, 0.1)
        time.sleep(1)  # what would be told twice
        return self.told("/hook/", name)

    def flow(self, file: Path, environment: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        with (self.root / "flow.log").open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-m", "flows.customized", str(file)],
                cwd=PROJECT_ROOT,
                env=os.environ | (environment or {"PREFECT_API_URL": self.api}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def told(self, path: str, name: str) -> list[dict[str, Any]]:
        return [body for where, body in self.web.posted if where.startswith(path) and name in body["text"]]

    def mails(self, name: str) -> list[Any]:
        return [mail for mail in self.mail.mails if name in str(mail["Subject"])]

    def record(self, name: str) -> TrainRecord:
        (path,) = (self.home / "trains").glob(f"{name}_*/train.json")
        return TrainRecord.model_validate_json(path.read_bytes())

    def post(self, path: str, body: Any) -> Any:
        answer = httpx.post(f"{self.api}{path}", json=body, timeout=20, trust_env=False)
        answer.raise_for_status()
        return answer.json() if answer.content else None


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    root = tmp_path_factory.mktemp("alerts")
    with installation(root), pytest.MonkeyPatch.context() as patch:
        for name in ("PREFECT_API_URL", "PREFECT_HOME"):
            patch.delenv(name, raising=False)
        made = Bench(root)
        try:
            made.start()
            _add_channels(made)
            yield made
        finally:
            made.end()
    assert not processes_naming(str(root))


def _add_channels(bench: Bench) -> None:
    hook = f"{bench.web.address}/hook/{HOOK_KEY}"
    printed(bench.run("alerts", "add", "hook", "--webhook", TUNELINE_ALERT_URL=hook))
    printed(bench.run("alerts", "add", "team", "--slack", TUNELINE_ALERT_URL=f"{bench.web.address}/team/{HOOK_KEY}"))
    printed(bench.run("alerts", "add", "dead", "--webhook", TUNELINE_ALERT_URL=f"http://127.0.0.1:9/{HOOK_KEY}"))
    server = ("--smtp-host", "127.0.0.1", "--smtp-port", str(bench.mail.port), "--username", "tuner")
    people = ("--from", "tuneline@lab.example", "--to", "boss@lab.example")
    printed(bench.run("alerts", "add", "boss", "--mail", *server, *people, TUNELINE_ALERT_PASSWORD=PASSWORD))


@pytest.mark.operations
def test_success_is_told_once_to_each_and_a_dead_receiver_does_no_harm(bench: Bench) -> None:
    (told,) = bench.train("lights", evaluation_dataset=str(bench.root / "test.jsonl"))
    record = bench.record("lights")
    assert record.status == "completed"
    assert (told["kind"], told["train"], told["state"]) == ("completed", record.id, "Completed")
    assert told["model"] == record.model
    assert told["scores"] == record.evaluation
    assert told["prefect"].endswith(f"/runs/flow-run/{record.flow_run_id}")
    (slack,) = bench.told("/team/", "lights")
    assert set(slack) == {"text"}
    (mail,) = bench.mails("lights")
    assert mail["Subject"] == f"Tuneline: {record.id} is completed"
    assert mail["To"] == "boss@lab.example"


@pytest.mark.operations
def test_failure_is_told_once_with_its_reason_as_valid_json(bench: Bench) -> None:
    bad = bench.root / 'ba"d.jsonl'
    bad.write_text('{"prompt": "one", "completion": "two"}\n{"prompt": "no answer"}\n', encoding="utf-8")
    (told,) = bench.train("broken", dataset=str(bad))
    assert (told["kind"], told["state"]) == ("failed", "Failed")
    assert "\n" in told["reason"]
    assert 'ba"d.jsonl' in told["reason"]
    assert told["train"] == bench.record("broken").id
    assert len(bench.told("/team/", "broken")) == len(bench.mails("broken")) == 1


@pytest.mark.operations
def test_crash_is_a_failure_and_told_although_the_process_is_dead(bench: Bench) -> None:
    alerts = [{"to": "hook", "on": ["failed"]}, {"to": "boss", "on": ["completed"]}]
    flow = bench.flow(train_file(bench.root, "killed", alerts=alerts, hyper={"max_steps": 5000}))
    wait_for(lambda: list((bench.home / "trains").glob("killed_*/training/events.jsonl")), 60)
    os.killpg(flow.pid, signal.SIGKILL)
    flow.wait()
    record = bench.record("killed")
    state = {"type": "CRASHED", "name": "Crashed", "message": "No heartbeat"}  # what the heartbeat automation does
    bench.post(f"/flow_runs/{record.flow_run_id}/set_state", {"state": state})
    wait_for(lambda: bench.told("/hook/", "killed"), 30, 0.1)
    wait_for(lambda: not processes_naming(record.id), 60)
    time.sleep(1)
    (told,) = bench.told("/hook/", "killed")
    assert (told["kind"], told["train"], told["state"], told["reason"]) == (
        "failed",
        record.id,
        "Crashed",
        "No heartbeat",
    )
    assert told["text"].startswith(f"Tuneline: {record.id} has crashed")
    assert not bench.mails("killed")


@pytest.mark.operations
def test_cancel_is_told_as_a_cancel_and_not_as_a_failure(bench: Bench) -> None:
    alerts = [{"to": "hook", "on": ["failed", "cancelled", "completed"]}]
    flow = bench.flow(train_file(bench.root, "stopped", alerts=alerts, hyper={"max_steps": 5000}))
    wait_for(lambda: list((bench.home / "trains").glob("stopped_*/training/checkpoints/*")), 60)
    printed(bench.run("trains", "cancel", bench.record("stopped").id))
    flow.wait(60)
    wait_for(lambda: bench.told("/hook/", "stopped"), 30, 0.1)
    time.sleep(1)
    (told,) = bench.told("/hook/", "stopped")
    assert (told["kind"], told["state"]) == ("cancelled", "Cancelled")


@pytest.mark.operations
def test_promotion_is_told_to_its_subscribers(bench: Bench) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from configs.alerts import Subscription
    from tasks import events

    tags = alert_tags([Subscription(to="hook", on=["promoted"]), Subscription(to="boss")], ["promoted"])
    payload = {"train": "nightly_1", "model": "tiny_nightly_1", "reason": 'accuracy is "7" points better'}
    with temporary_settings({PREFECT_API_URL: bench.api}):
        assert events.emit(events.MODEL_PROMOTED, "line", "nightly", {}, payload, tags)
    wait_for(lambda: bench.told("/hook/", "nightly_1") and bench.mails("nightly_1"), 30, 0.1)
    time.sleep(1)
    (told,) = bench.told("/hook/", "nightly_1")
    assert (told["kind"], told["reason"]) == ("promoted", payload["reason"])
    (mail,) = bench.mails("nightly_1")
    assert mail["Subject"] == "Tuneline: nightly_1 has given the new champion"
    assert not bench.told("/team/", "nightly_1")


@pytest.mark.operations
def test_unknown_channel_is_refused_before_anything_is_begun(bench: Bench) -> None:
    before = files_below(bench.home / "trains")
    file = train_file(bench.root, "nobody", alerts=[{"to": "hock", "on": "failed"}])
    refused = bench.run("train", file)
    assert refused.returncode == 2
    assert "one of boss, dead, hook, team" in refused.stderr
    assert "did you mean hook" in refused.stderr
    assert bench.flow(file).wait(60) != 0
    assert files_below(bench.home / "trains") == before


@pytest.mark.operations
def test_channels_are_listed_tested_and_removed(bench: Bench) -> None:
    listed = {item["name"]: item for item in read_json(bench.run("alerts", "list", "--json"))}
    assert listed["hook"]["target"] == f"{bench.web.address}/…"
    assert listed["boss"]["target"] == f"boss@lab.example through 127.0.0.1:{bench.mail.port} (starttls)"
    assert "taken by 127.0.0.1" in printed(bench.run("alerts", "test", "boss"))
    assert bench.mail.mails[-1]["Subject"] == "Tuneline: this is a test"
    dead = bench.run("alerts", "test", "dead")
    assert dead.returncode == 2
    assert "cannot be reached" in dead.stderr
    printed(bench.run("alerts", "remove", "dead"))
    names = [
        item["name"] for item in bench.post("/automations/filter", {}) if item["name"].startswith("tuneline alert")
    ]
    assert sorted({name.split()[2] for name in names}) == ["boss", "hook", "team"]
    assert len(names) == 3 * 4


@pytest.mark.operations
def test_channel_of_a_taken_name_is_only_replaced_when_asked(bench: Bench) -> None:
    again = bench.run("alerts", "add", "hook", "--webhook", TUNELINE_ALERT_URL=f"{bench.web.address}/other")
    assert again.returncode == 2
    assert "--replace" in again.stderr


@pytest.mark.operations
def test_without_a_standing_server_the_train_itself_tells(bench: Bench) -> None:
    """In the same home folder, whose channels the embedded server knows too."""
    bench.stop_server()
    alerts = [{"to": "hook", "on": ["failed"]}, {"to": "boss", "on": ["completed"]}]
    bad = bench.root / "bad.jsonl"
    bad.write_text('{"prompt": "no answer"}\n', encoding="utf-8")
    file = train_file(bench.root, "alone", alerts=alerts, dataset=str(bad))
    environment = {"PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "true", **bench.environment}
    bench.flow(file, environment).wait(120)
    (told,) = bench.told("/hook/", "alone")
    assert (told["kind"], told["state"]) == ("failed", "Failed")
    assert "bad.jsonl" in told["reason"]
    assert not bench.mails("alone")


@pytest.mark.operations
def test_secrets_lie_nowhere_in_clear(bench: Bench) -> None:
    """The last test of this file: everything that was written by then."""
    secrets = [PASSWORD.encode(), HOOK_KEY.encode()]
    paths = [path for path in bench.root.rglob("*") if path.is_file()]
    assert any(path.name == "prefect.db" for path in paths) or bench.database is not None
    assert [path for path in paths if any(secret in path.read_bytes() for secret in secrets)] == []
