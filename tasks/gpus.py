"""GPU slots of this host: which train holds which GPU, who waits for one, and in which order they are served.

A slot is a file that is flock'ed by every process of the train that holds it: the one that runs the train, and the
supervisors of its stages, which inherit the descriptor. So a slot is free once the last of them has ended, however
it ended. Who waits has a ticket, a file as well, flock'ed by the waiting process: a killed one's is swept away.
Everything is looked at and changed under one short lock, and all slots of a train are taken at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, get_args

from pydantic import BaseModel, Field, ValidationError

from configs.errors import UserError
from configs.records import QueueName, now
from configs.settings import Settings, load_settings
from configs.train import TrainConfig
from methods.registry import find_method
from tasks.files import write_text

_POLL_SECONDS = 0.5
_HOLDER_VARIABLE = "STAGE_GPU_HOLDER"
_QUEUES: tuple[QueueName, ...] = get_args(QueueName)  # in the order in which they are served


class Withdrawn(Exception):
    """Somebody has taken back the ticket of a waiting train: it is cancelled."""


class Holder(BaseModel):
    """Who has a slot; kept in the slot's file."""

    train: str
    pid: int
    since: datetime = Field(default_factory=now)
    token: str = Field(description="Told to the stages, so that what is left of a killed train is known by it.")


class Ticket(BaseModel):
    """A place in the queue; kept in a file whose name sorts by queue and arrival."""

    train: str
    pid: int
    gpus: int
    slots: list[str] = Field(description="The slots that it may be given: installations may name different ones.")
    queue: QueueName
    created: datetime = Field(default_factory=now)


class SlotState(BaseModel):
    """A slot as it is now."""

    device: str
    holder: Holder | None


@dataclass
class _Held:
    """What this process holds: it runs one train at a time."""

    train: str
    devices: list[str]
    files: list[BinaryIO]
    token: str


_held: _Held | None = None


# --- what the host has ------------------------------------------------------------------------------------------


def host_slots(settings: Settings | None = None) -> dict[str, str]:
    """The CUDA devices that trains on this host may use, by the name of their slot. Raises UserError.

    A slot is named by the GPU's UUID where `nvidia-smi` tells it, so that `0` and the UUID of the same GPU are one.
    """
    given = (settings or load_settings()).gpus
    uuids = _uuids(shutil.which("nvidia-smi"))
    devices = list(uuids.values()) if given is None else [part.strip() for part in given.split(",") if part.strip()]
    slots: dict[str, str] = {}
    for device in devices:
        name = uuids.get(device, device).replace("/", "_")
        if name in slots:
            raise UserError("the same GPU is named twice", field="TUNELINE_GPUS", value=given, expected="each GPU once")
        slots[name] = device
    return slots


@cache
def _uuids(nvidia_smi: str | None) -> dict[str, str]:
    """What `nvidia-smi -L` lists: index of the GPU to its UUID; a GPU that is cut up, as its MIG devices."""
    if nvidia_smi is None:
        return {}
    done = subprocess.run([nvidia_smi, "-L"], capture_output=True, text=True, timeout=60, check=False)
    if done.returncode != 0:
        logging.getLogger(__name__).warning("nvidia-smi lists no GPUs: %s", (done.stdout + done.stderr).strip()[:500])
        return {}
    found: dict[str, str] = {}
    index = ""
    for line in done.stdout.splitlines():
        if whole := re.match(r"GPU (\d+):.*\(UUID: (GPU-[\w-]+)\)", line):
            index = whole[1]
            found[index] = whole[2]
        elif part := re.match(r"\s+MIG .*Device\s+(\d+):.*\(UUID: (MIG-[\w/-]+)\)", line):
            found.pop(index, None)  # CUDA cannot use a GPU as a whole once it is cut up
            found[f"{index}:{part[1]}"] = part[2]
    return found


def wanted_gpus(config: TrainConfig, settings: Settings | None = None) -> int:
    """How many slots the train takes: what it asks for, else one a process if the host has any and the method uses it.

    Raises UserError if the host has fewer.
    """
    available = len(host_slots(settings))
    wanted = config.gpus
    if wanted is None:
        wanted = config.processes if available and find_method(config.method).hardware.gpu != "none" else 0
    if wanted > available:
        raise UserError(
            "the train asks for more GPUs than this host has",
            field="processes" if config.gpus is None else "gpus",
            value=wanted,
            expected=f"at most {available}" if available else "0: trains on this host may use no GPU",
            mend="ask for fewer, start it in the work pool of another host, or name more in TUNELINE_GPUS",
        )
    return wanted


# --- taking and giving back -------------------------------------------------------------------------------------


def take_slots(train: str, count: int, queue: QueueName, on_wait: Callable[[str], None]) -> list[str]:
    """Wait for `count` slots and hold them until `release_slots`; returns their CUDA devices.

    `on_wait` is told what is waited for, each time it changes. Raises Withdrawn if the train was cancelled meanwhile.
    """
    global _held
    if _held is not None:
        raise RuntimeError(f"{train} wants GPU slots while {_held.train} runs in this process")
    settings = load_settings()
    slots = host_slots(settings)
    token = secrets.token_hex(8)
    if count == 0:
        _held = _Held(train, [], [], token)
        return []
    wanted = Ticket(train=train, pid=os.getpid(), gpus=count, slots=list(slots), queue=queue)
    files = _wait_for_slots(_folder(settings), wanted, token, on_wait)
    _held = _Held(train, [slots[name] for name in files], list(files.values()), token)
    return _held.devices


def release_slots(train: str) -> None:
    """Give back what this process holds for the train; harmless if it holds nothing."""
    global _held
    if _held is None or _held.train != train:
        return
    for file in _held.files:
        file.close()
    _held = None


@contextmanager
def borrowing_slot(name: str, on_events: Callable[[list[dict[str, Any]]], None]) -> Iterator[None]:
    """Hold one slot for a stage that runs outside of a train; inside of one, its slots are the stage's."""
    if _held is not None or not host_slots():
        yield
        return

    def tell(text: str) -> None:
        on_events([{"type": "phase", "time": time.time(), "name": text}])

    take_slots(name, 1, "default", tell)
    try:
        yield
    finally:
        release_slots(name)


def stage_variables() -> dict[str, str]:
    """The environment of a stage started now: the GPUs held and no other; nothing on a host without slots."""
    if not host_slots():
        return {}
    held = {_HOLDER_VARIABLE: _held.token} if _held is not None else {}
    devices = ",".join(_held.devices) if _held is not None else ""
    # By default CUDA numbers the fastest GPU first; in this order its numbers are those of nvidia-smi.
    return {"CUDA_VISIBLE_DEVICES": devices, "CUDA_DEVICE_ORDER": "PCI_BUS_ID", **held}


def slot_descriptors() -> list[int]:
    """The descriptors that a stage's supervisor inherits, so that a slot is held as long as the stage runs."""
    return [file.fileno() for file in _held.files] if _held is not None else []


def withdraw_ticket(train: str) -> bool:
    """Take back the ticket of a waiting train, which cancels it; False if it does not wait."""
    folder = _folder(load_settings())
    if not folder.is_dir():
        return False
    with _mutex(folder):
        paths = [path for path, ticket in _waiting(folder).items() if ticket.train == train]
        for path in paths:
            path.unlink()
    return bool(paths)


# --- looking on -------------------------------------------------------------------------------------------------


def slot_states(settings: Settings) -> list[SlotState]:
    """Every slot of this host and who holds it. Raises UserError for an impossible TUNELINE_GPUS."""
    slots, folder = host_slots(settings), _folder(settings)
    if not folder.is_dir():
        return [SlotState(device=device, holder=None) for device in slots.values()]
    with _mutex(folder):
        return [SlotState(device=device, holder=_holder(folder / _slot_file(name))) for name, device in slots.items()]


def waiting_trains(settings: Settings) -> list[Ticket]:
    """Who waits for slots of this host, in the order in which they are served."""
    folder = _folder(settings)
    if not folder.is_dir():
        return []
    with _mutex(folder):
        return list(_waiting(folder).values())


def _holder(path: Path) -> Holder | None:
    if not path.exists():
        return None
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return Holder.model_validate_json(file.read())
    return None


# --- the queue, all under the mutex -----------------------------------------------------------------------------


def _folder(settings: Settings) -> Path:
    return settings.gpu_locks.expanduser().resolve()


@contextmanager
def _mutex(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _wait_for_slots(folder: Path, wanted: Ticket, token: str, on_wait: Callable[[str], None]) -> dict[str, BinaryIO]:
    path, file = _queue_up(folder, wanted)
    told = ""
    try:
        while True:
            with _mutex(folder):
                waiting = _waiting(folder)
                if path not in waiting:
                    raise Withdrawn(wanted.train)
                before = _before(waiting, path)
                if not before and (found := _lock_free(folder, wanted, token)):
                    return found
            text = _said(wanted, before)
            if text != told:
                on_wait(text)
                told = text
            time.sleep(_POLL_SECONDS)
    finally:
        with _mutex(folder):
            path.unlink(missing_ok=True)
        file.close()


def _queue_up(folder: Path, wanted: Ticket) -> tuple[Path, BinaryIO]:
    with _mutex(folder):
        counter = folder / "arrivals"
        arrival = int(counter.read_text() or 0) + 1 if counter.exists() else 1
        write_text(counter, str(arrival))
        path = folder / f"{_QUEUES.index(wanted.queue)}-{arrival:012d}.ticket"
        file = path.open("xb")
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(wanted.model_dump_json().encode())
        file.flush()
    return path, file


def _waiting(folder: Path) -> dict[Path, Ticket]:
    """The tickets of living processes, in order; those of dead ones are swept away."""
    found: dict[Path, Ticket] = {}
    for path in sorted(folder.glob("*.ticket")):
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                found[path] = Ticket.model_validate_json(file.read())
            else:
                path.unlink()
    return found


def _before(waiting: dict[Path, Ticket], path: Path) -> list[Ticket]:
    """Who is served first. Nobody overtakes the head, however few it asks for: a big request would wait for ever."""
    own = waiting[path]
    return [ticket for other, ticket in waiting.items() if other < path and set(ticket.slots) & set(own.slots)]


def _said(wanted: Ticket, before: list[Ticket]) -> str:
    what = "1 GPU" if wanted.gpus == 1 else f"{wanted.gpus} GPUs"
    if not before:
        return f"waiting for {what}: it is the next"
    return f"waiting for {what}: {len(before)} train{'s' if len(before) > 1 else ''} before it"


def _slot_file(name: str) -> str:
    return f"{name}.slot"


def _lock_free(folder: Path, wanted: Ticket, token: str) -> dict[str, BinaryIO]:
    """All the slots that are wanted, locked and marked; none of them if not as many are free."""
    found: dict[str, BinaryIO] = {}
    for name in wanted.slots:
        file: BinaryIO = (folder / _slot_file(name)).open("a+b")
        if len(found) < wanted.gpus and _lock(file) and not _end_strays(file):
            found[name] = file
        else:
            file.close()
    if len(found) < wanted.gpus:
        for held in found.values():
            held.close()
        return {}
    mark = Holder(train=wanted.train, pid=wanted.pid, token=token).model_dump_json().encode()
    for held in found.values():
        held.truncate(0)
        held.write(mark)
        held.flush()
    return found


def _lock(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _end_strays(file: BinaryIO) -> bool:
    """End what the last holder of a free slot has left running; True if there was anything.

    A stage's child that sits in a session of its own outlives runner and supervisor if both are killed.
    """
    import psutil

    file.seek(0)
    try:
        last = Holder.model_validate_json(file.read())
    except ValidationError:  # nobody had it yet, or was killed as he took it
        return False
    strays = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(_HOLDER_VARIABLE) == last.token and process.status() != psutil.STATUS_ZOMBIE:
                strays.append(process)
    for process in strays:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    if not strays:
        file.truncate(0)
    return bool(strays)
