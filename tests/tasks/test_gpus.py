"""GPU slots, held and waited for by real processes; the GPUs are only names that are handed over."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.records import TrainRecord
from configs.settings import PROJECT_ROOT, load_settings
from configs.train import TrainConfig
from deployments.doctor import check_gpus
from methods import supervisor
from tasks import gpus, trains
from tasks.checking import check_train
from tasks.model_server import server_environment
from tasks.stages import StageCancelled, run_stage
from tests.methods.stage_jobs import processes_of, small_job, wait_for, write_stage

# Takes slots, says so, and holds them until the file NAME.end is there; with a stage file, for as long as it runs.
TRAIN = """
import signal, sys, time
from pathlib import Path
from tasks import gpus
from tasks.stages import StageJob, run_stage
folder, name, count, queue, stage = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), sys.argv[4], sys.argv[5:]
def say(text):
    with (folder / "said").open("a") as file:
        file.write(f"{name} {text}\\n")
signal.signal(signal.SIGTERM, lambda *_: sys.exit("asked to end"))
try:
    say("has " + ",".join(gpus.take_slots(name, count, queue, say)))
except gpus.Withdrawn:
    say("was withdrawn")
    sys.exit(3)
if stage:
    job = StageJob(stage="training", parameters={}, inputs={}, output=folder / "job" / "output", seed=1)
    run_stage(folder / "job", job, Path(sys.executable), Path(stage[0]), 60.0, lambda events: None)
while not (folder / (name + ".end")).exists():
    time.sleep(0.02)
say("gives back")
gpus.release_slots(name)
"""
SAVES_SLOWLY = """
(job.folder / "ready").touch()
while not (job.cancelled and (job.folder / "saved").exists()):
    time.sleep(0.02)
raise contract.Cancelled
"""
LEAVES_A_CHILD = """
sleep = [sys.executable, "-c", "import time; time.sleep(600)", str(job.folder)]
subprocess.Popen(sleep, start_new_session=True)
(job.folder / "ready").touch()
time.sleep(600)
"""
TELLS_ITS_GPUS = """
names = ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER")
return {"gpus": [os.environ.get(name) for name in names]}
"""
NVIDIA_SMI = """#!/bin/sh
cat <<'END'
GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77)
GPU 1: NVIDIA A100-SXM4-80GB (UUID: GPU-6e1ff3a5-0000-2b2c-524d-9e3d8d2b8a77)
  MIG 3g.40gb     Device  0: (UUID: MIG-c6d4f1ef-42e4-5de3-91c7-45d71c87eb3f)
  MIG 3g.40gb     Device  1: (UUID: MIG-cba663e8-9bed-5b25-b243-5985ef7c9beb)
END
"""


class Host:
    """A host with a number of slots, and the trains that are started on it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, count: int = 1, queue: str = "default", stage: str = "") -> subprocess.Popen[bytes]:
        """A train, as far as it comes: it holds its slots or waits for them."""
        files = [str(write_stage(self.folder / "job", stage))] if stage else []
        command = [sys.executable, "-c", TRAIN, str(self.folder), name, str(count), queue, *files]
        self.started[name] = subprocess.Popen(command, cwd=PROJECT_ROOT, stderr=subprocess.DEVNULL)
        assert wait_for(lambda: self.said(name), 60)
        return self.started[name]

    def end(self, name: str) -> None:
        (self.folder / f"{name}.end").touch()
        assert self.started[name].wait(30) == 0

    def said(self, name: str = "") -> list[str]:
        """What the trains have said, in order; of one train, without its name."""
        path = self.folder / "said"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.removeprefix(f"{name} ") for line in lines if line.startswith(f"{name} ") or not name]

    def got(self) -> list[str]:
        """The trains that were given slots, in order."""
        return [line.split()[0] for line in self.said() if " has " in line]


@pytest.fixture
def host(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("TUNELINE_GPUS", "0")
    made = Host(tmp_path)
    yield made
    for process in made.started.values():
        process.kill()
        process.wait()
    for left in processes_of(tmp_path):
        left.kill()


def holders() -> list[str | None]:
    return [slot.holder.train if slot.holder else None for slot in gpus.slot_states(load_settings())]


def waiting() -> list[str]:
    return [ticket.train for ticket in gpus.waiting_trains(load_settings())]


def tickets() -> list[Path]:
    return list(load_settings().gpu_locks.glob("*.ticket"))


def test_one_gpu_is_given_to_one_train_at_a_time_and_each_is_told_where_it_stands(host: Host) -> None:
    host.start("first")
    host.start("second")
    host.start("third")
    assert (holders(), waiting()) == (["first"], ["second", "third"])
    assert check_gpus(load_settings()).found == "0: first; 2 waiting"
    host.end("first")
    assert wait_for(lambda: "has 0" in host.said("second"), 20)
    assert wait_for(lambda: "waiting for 1 GPU: it is the next" in host.said("third"), 20)
    host.end("second")
    assert wait_for(lambda: "has 0" in host.said("third"), 20)
    host.end("third")
    assert host.said("second")[:2] == ["waiting for 1 GPU: it is the next", "has 0"]
    assert host.said("third")[0] == "waiting for 1 GPU: 1 train before it"
    assert (holders(), waiting(), tickets()) == ([None], [], [])


def test_waiting_trains_are_served_by_queue_and_within_it_by_arrival(host: Host) -> None:
    host.start("holder")
    order = {"low": "low", "first": "default", "second": "default", "high": "high"}
    for name, queue in order.items():
        host.start(name, queue=queue)
    assert waiting() == ["high", "first", "second", "low"]
    host.end("holder")
    for name in ("high", "first", "second", "low"):
        assert wait_for(lambda name=name: "has 0" in host.said(name), 20)  # type: ignore[misc]
        host.end(name)
    assert host.got() == ["holder", "high", "first", "second", "low"]


def test_all_gpus_of_a_train_come_at_once_and_nobody_overtakes_it(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_GPUS", "0,1,2")
    host.start("small")
    host.start("big", 3)
    host.start("late")
    assert host.said("big") == ["waiting for 3 GPUs: it is the next"]
    assert holders() == ["small", None, None]  # it holds no part of what it waits for
    assert host.said("late") == ["waiting for 1 GPU: 1 train before it"]  # although two are free
    host.start("urgent", queue="high")
    assert host.said("urgent") == ["has 1"]
    host.end("small")
    assert holders() == [None, "urgent", None]
    host.end("urgent")
    assert wait_for(lambda: "has 0,1,2" in host.said("big"), 20)
    assert holders() == ["big"] * 3
    host.end("big")
    assert wait_for(lambda: "has 0" in host.said("late"), 20)


def test_trains_of_installations_with_other_gpus_do_not_wait_for_each_other(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.start("here")
    host.start("waits here")
    monkeypatch.setenv("TUNELINE_GPUS", "1")
    host.start("there")
    assert host.said("there") == ["has 1"]


def test_a_killed_train_keeps_its_gpu_until_its_stage_has_ended(host: Host) -> None:
    host.start("killed", stage=SAVES_SLOWLY)
    assert wait_for(lambda: (host.folder / "job" / "ready").exists(), 20)
    host.start("next")
    host.started["killed"].kill()
    host.started["killed"].wait()
    host.start("after next")  # by now the next one has looked
    assert (holders(), host.got()) == (["killed"], ["killed"])
    (host.folder / "job" / "saved").touch()
    assert wait_for(lambda: "has 0" in host.said("next"), 20)
    assert not processes_of(host.folder / "job")


def test_what_a_killed_train_and_supervisor_left_on_a_gpu_is_ended_before_the_next_has_it(host: Host) -> None:
    host.start("killed", stage=LEAVES_A_CHILD)
    assert wait_for(lambda: (host.folder / "job" / "ready").exists(), 20)
    ids = json.loads((host.folder / "job" / supervisor.PROCESS_FILE).read_text())
    host.started["killed"].kill()
    os.kill(ids["supervisor"], signal.SIGKILL)
    host.started["killed"].wait()
    assert wait_for(lambda: len(processes_of(host.folder / "job")) == 1, 20)  # the child in its own session
    host.start("next")
    assert wait_for(lambda: "has 0" in host.said("next"), 20)
    assert not processes_of(host.folder / "job")


@pytest.mark.parametrize("how", ["withdrawn", "SIGTERM", "SIGKILL"])
def test_a_waiting_train_that_is_cancelled_or_killed_leaves_no_ticket(host: Host, how: str) -> None:
    host.start("holder")
    gone = host.start("gone")
    host.start("last")
    if how == "withdrawn":
        assert gpus.withdraw_ticket("gone")
        assert gone.wait(20) == 3
    else:
        gone.send_signal(getattr(signal, how))
        gone.wait(20)
    assert wait_for(lambda: host.said("last")[-1].endswith("it is the next"), 20)
    assert (waiting(), len(tickets())) == (["last"], 1)
    assert not gpus.withdraw_ticket("gone")
    host.end("holder")
    assert wait_for(lambda: "has 0" in host.said("last"), 20)


def test_a_waiting_train_says_so_in_its_record_and_can_be_cancelled(host: Host, tmp_path: Path) -> None:
    host.start("holder")
    trains.own_train("waits_20260101_abcd")
    config = TrainConfig(name="waits", base_model="any", dataset="any")
    record = trains.save_record(TrainRecord(id="waits_20260101_abcd", config=config, run_id="none", queue="high"))
    told: list[str] = []
    ended: list[BaseException] = []

    def take() -> None:
        try:
            trains.take_gpus(record, told.append)
        except BaseException as error:
            ended.append(error)

    thread = threading.Thread(target=take)
    thread.start()
    assert wait_for(lambda: trains.load_train(record.id).waiting, 20)
    assert trains.load_train(record.id).waiting == told[-1] == "waiting for 1 GPU: it is the next"
    assert [ticket.queue for ticket in gpus.waiting_trains(load_settings())] == ["high"]
    trains.cancel_train(record)
    thread.join(20)
    assert isinstance(ended[0], StageCancelled)
    assert (trains.load_train(record.id).waiting, tickets()) == (None, [])

    host.end("holder")
    assert trains.take_gpus(record, told.append).gpus == ["0"]
    assert holders() == [record.id]
    trains.let_go(record.id)
    assert holders() == [None]


def test_a_stage_sees_the_gpus_of_its_train_and_no_other(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)
    file = write_stage(tmp_path / "job", TELLS_ITS_GPUS)

    def seen() -> list[str | None]:
        job = small_job(tmp_path / "job")
        found: list[str | None] = run_stage(tmp_path / "job", job, Path(sys.executable), file, 5, lambda _: None)[
            "gpus"
        ]
        return found

    monkeypatch.setenv("TUNELINE_GPUS", "")
    assert seen() == ["7", None]  # a host without slots: left alone
    monkeypatch.setenv("TUNELINE_GPUS", "0,GPU-1234,3")
    assert seen() == ["", "PCI_BUS_ID"]  # outside of a train: none
    for count, devices in {2: "0,GPU-1234", 0: ""}.items():
        gpus.take_slots("train", count, "default", lambda _: None)
        try:
            assert seen() == [devices, "PCI_BUS_ID"]
        finally:
            gpus.release_slots("train")
    with gpus.borrowing_slot("save", lambda _: None):
        assert seen() == ["0", "PCI_BUS_ID"]
        assert holders() == ["save", None, None]
    assert holders() == [None] * 3


def test_a_train_takes_one_gpu_by_default_and_never_more_than_there_are(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wanted(asked: int | None) -> int:
        return gpus.wanted_gpus(TrainConfig(name="a", base_model="b", dataset="c", gpus=asked))

    monkeypatch.setenv("TUNELINE_GPUS", "0,1")
    assert [wanted(asked) for asked in (None, 0, 1, 2)] == [1, 0, 1, 2]
    with pytest.raises(UserError, match="more GPUs than this host has"):
        wanted(3)
    monkeypatch.setenv("TUNELINE_GPUS", "")
    assert [wanted(asked) for asked in (None, 0)] == [0, 0]
    one = TrainConfig(name="a", base_model="b", dataset="c", gpus=1)
    with pytest.raises(UserError, match="use no GPU"):
        check_train(one)  # what `--dry-run` looks at
    with pytest.raises(UserError, match="use no GPU"):
        trains.open_train(one, {}, [])
    assert not trains.list_trains()


@pytest.mark.parametrize("given", ["x", "0,", "0;1", "0 1", "-1", "GPU-1/../../x"])
def test_gpus_that_are_no_devices_are_refused(given: str, host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_GPUS", given)
    with pytest.raises(UserError, match="TUNELINE_GPUS"):
        gpus.host_slots()


def test_gpus_are_those_nvidia_smi_lists_and_one_gpu_has_one_slot(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No GPU here: the program is a script that prints what NVIDIA documents."""
    program = tmp_path / "bin" / "nvidia-smi"
    program.parent.mkdir()
    program.write_text(NVIDIA_SMI)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    monkeypatch.delenv("TUNELINE_GPUS")
    whole, *parts = gpus.host_slots().values()
    assert (whole, [part[:12] for part in parts]) == (
        "GPU-5d5ba0d6-d33d-2b2c-524d-9e3d8d2b8a77",
        ["MIG-c6d4f1ef", "MIG-cba663e8"],
    )
    monkeypatch.setenv("TUNELINE_GPUS", "0")
    assert gpus.host_slots() == {whole: "0"}
    monkeypatch.setenv("TUNELINE_GPUS", f"0,{whole}")
    with pytest.raises(UserError, match="named twice"):
        gpus.host_slots()
    program.write_text("#!/bin/sh\necho no driver >&2\nexit 9\n")
    gpus._uuids.cache_clear()
    monkeypatch.delenv("TUNELINE_GPUS")
    assert gpus.host_slots() == {}
    gpus._uuids.cache_clear()


def test_model_servers_get_the_gpus_of_their_own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert server_environment()["CUDA_VISIBLE_DEVICES"] == "7"
    monkeypatch.setenv("TUNELINE_ENDPOINT_GPUS", "2,3")
    assert server_environment()["CUDA_VISIBLE_DEVICES"] == "2,3"
