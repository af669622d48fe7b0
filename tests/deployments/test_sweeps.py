"""A sweep that is cancelled on its page: its trains save and stop, nothing is left, and the same sweep goes on."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml

from methods import contract
from tasks import sweeping
from tests.deployments.server import Server, installation_with_servers, processes_naming, wait_for

pytestmark = pytest.mark.operations


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with installation_with_servers(tmp_path_factory.mktemp("sweeps")) as made:
        yield made


def test_a_sweep_cancelled_on_its_page_stops_its_trains_with_their_checkpoints(server: Server) -> None:
    file = server.root / "rates.yaml"
    train = server.train("rates", max_steps=1_000_000, checkpoint_steps=1_000_000)["train"]
    file.write_text(
        yaml.safe_dump({**train, "sweep": {"grid": {"learning_rate": [0.01, 0.003]}, "at_once": 2, "by": "loss"}})
    )
    run = server.start("sweep/train", {"source": str(file)}).raise_for_status().json()["id"]
    sweep = sweeping.plan_sweep(str(file))

    def steps_of_all() -> list[int]:
        files = server.settings.trains.glob(f"rates_*/training/{contract.EVENTS_FILE}")
        events = [[json.loads(line) for line in file.read_text().splitlines() if '"metrics"' in line] for file in files]
        return [int(each[-1]["step"]) for each in events if each]

    wait_for(lambda: len(steps_of_all()) == 2, tell=lambda: server.told(run))
    server.post(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING", "name": "Cancelling"}})
    wait_for(lambda: server.state(run) == "Cancelled", tell=lambda: server.told(run))
    wait_for(lambda: processes_naming(sweep.id) == processes_naming("rates_") == [])
    records = sweeping.trains_of(sweep)
    assert {record.status for record in records.values()} == {"cancelled"}
    assert len(records) == 2
    for record in records.values():
        saved = contract.complete_checkpoints(server.settings.trains / record.id / "training" / "checkpoints")
        assert len(saved) == 1
        assert server.state(str(record.flow_run_id)) == "Cancelled"
    assert not (sweeping.sweep_folder(sweep.id) / sweeping.OUTCOME_FILE).exists()
