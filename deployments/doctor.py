"""What `tuneline doctor` looks at: whether this machine can do the work, and what to mend if not."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path

import psutil
from pydantic import BaseModel, ConfigDict

from configs.errors import UserError
from configs.services import ServiceStatus
from configs.settings import PROJECT_ROOT, Settings
from deployments import services
from deployments.ports import port_holder, port_is_taken
from tasks import gpus

CONSTRAINTS = PROJECT_ROOT / "constraints.txt"
# What the demo leaves behind (base model, checkpoints, merged model) with room to spare.
LEAST_DISK_GB = 5.0
# Both servers and the worker take 0.8 GB, the demo's train about 2 GB.
LEAST_MEMORY_GB = 3.0
GB = 1e9

_TORCH_PROBE = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({
    "version": torch.__version__,
    "cuda": [f"{gpu.name} ({gpu.total_memory / 1e9:.0f} GB)" for gpu in gpus],
    "mps": torch.backends.mps.is_available(),
    "threads": torch.get_num_threads(),
}))
"""


class Check(BaseModel):
    """One thing looked at. `mend` is empty if it is well."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    ok: bool
    found: str
    mend: str = ""


def diagnose(settings: Settings) -> list[Check]:
    """Look at everything a train needs. Changes nothing; takes as long as importing torch, in a process."""
    return [
        check_python(),
        check_libraries(CONSTRAINTS),
        check_torch(sys.executable),
        check_disk(settings.root),
        check_memory(),
        check_home(settings.root),
        *check_services(settings),
        check_conda(),
        check_gpus(settings),
        check_clock(),
    ]


def check_python(version: tuple[int, ...] = tuple(sys.version_info[:3])) -> Check:
    """Whether the interpreter is 3.11 or newer."""
    found = f"{'.'.join(map(str, version))} at {sys.executable}"
    if version >= (3, 11):
        return Check(name="python", ok=True, found=found)
    mend = "make setup PYTHON=/path/to/python3.11, or newer"
    return Check(name="python", ok=False, found=found, mend=mend)


def check_libraries(constraints: Path) -> Check:
    """Whether what is installed has the versions of constraints.txt, and nothing required is missing."""
    if not constraints.is_file():
        return Check(name="libraries", ok=True, found="no constraints.txt here to compare with")
    pins = _pins(constraints)
    required = _required()
    same, other = 0, []
    for name, pinned in pins.items():
        try:
            # The local suffix (+cpu, +cu130) says for which device it was built, not which version it is.
            installed = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            if name in required:
                other.append(f"{name} missing (pinned {pinned})")
            continue
        if installed == pinned:
            same += 1
        else:
            other.append(f"{name} {installed} (pinned {pinned})")
    found = "; ".join([f"{same} as pinned", *other])
    mend = "" if not other else "make setup, or: pip install -c constraints.txt -e ."
    return Check(name="libraries", ok=not other, found=found, mend=mend)


def check_torch(python: str) -> Check:
    """Whether torch can be imported by that interpreter, and which device it would train on."""
    try:
        done = subprocess.run([python, "-c", _TORCH_PROBE], capture_output=True, text=True, timeout=180)
    except (OSError, subprocess.TimeoutExpired) as error:
        return Check(name="torch", ok=False, found=str(error), mend=f"see what {python} -c 'import torch' does")
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"ended with code {done.returncode}"])[-1]
        return Check(name="torch", ok=False, found=last, mend="make setup, in an empty .venv")
    probe = json.loads(done.stdout.splitlines()[-1])
    device = f"CPU, {probe['threads']} threads"
    if probe["mps"]:
        device = "Apple GPU (MPS)"
    if probe["cuda"]:
        device = ", ".join(probe["cuda"])
    return Check(name="torch", ok=True, found=f"{probe['version']}; trains on {device}")


def check_disk(folder: Path, least_gb: float = LEAST_DISK_GB) -> Check:
    """Whether the disk of the home folder has room."""
    free = psutil.disk_usage(str(_existing(folder))).free / GB
    found = f"{free:.1f} GB free for {folder}"
    if free >= least_gb:
        return Check(name="disk", ok=True, found=found)
    mend = f"free {least_gb - free:.1f} GB, or move the home folder: TUNELINE_HOME=/a/larger/disk"
    return Check(name="disk", ok=False, found=found, mend=mend)


def check_memory(least_gb: float = LEAST_MEMORY_GB) -> Check:
    """Whether enough memory is available at this moment."""
    memory = psutil.virtual_memory()
    available = memory.available / GB
    found = f"{available:.1f} GB available of {memory.total / GB:.1f} GB"
    if available >= least_gb:
        return Check(name="memory", ok=True, found=found)
    mend = f"end other programs: even the demo's small model takes {least_gb:.0f} GB"
    return Check(name="memory", ok=False, found=found, mend=mend)


def check_home(folder: Path) -> Check:
    """Whether files can be made in the home folder, or in the folder it would be created in."""
    existing = _existing(folder)
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"tuneline")
    except OSError as error:
        mend = f"chown or chmod {existing}, or choose another home: TUNELINE_HOME=/a/folder/of/yours"
        return Check(name="home", ok=False, found=f"{folder}: {error.strerror}", mend=mend)
    note = "" if folder.is_dir() else " (to be created)"
    return Check(name="home", ok=True, found=f"{folder}{note} is writable")


def check_services(settings: Settings) -> list[Check]:
    """The two servers with their ports, and the worker."""
    try:
        all_told = services.status(settings)
    except UserError as error:
        return [Check(name="services", ok=False, found=error.problem, mend=f"{error.file}: {error.mend}")]
    found = {told.name: told for told in all_told}
    return [
        _check_server(found["prefect"], settings.host, settings.prefect_port, "TUNELINE_PREFECT_PORT"),
        _check_server(found["mlflow"], settings.host, settings.mlflow_port, "TUNELINE_MLFLOW_PORT"),
        *(_check_service(told) for told in all_told if told.name == "worker"),
    ]


def check_conda() -> Check:
    """Which conda there is. None is no fault: stages then run in virtual environments."""
    names = ("conda", "mamba", "micromamba")
    exe = os.environ.get("CONDA_EXE") or next(filter(None, map(shutil.which, names)), None)
    return Check(name="conda", ok=True, found=exe or "none found; stages run in virtual environments")


def check_gpus(settings: Settings) -> Check:
    """Which GPUs trains may use and who holds them. None is no fault: trains then run on what torch finds."""
    try:
        slots, waiting = gpus.slot_states(settings), gpus.waiting_trains(settings)
    except UserError as error:
        return Check(name="gpu slots", ok=False, found=f"{error.problem}: {error.value}", mend="see TUNELINE_GPUS")
    except OSError as error:
        mend = f"make the folder of TUNELINE_GPU_LOCKS writable: {settings.gpu_locks}"
        return Check(name="gpu slots", ok=False, found=str(error), mend=mend)
    held = [f"{slot.device}: {slot.holder.train if slot.holder else 'free'}" for slot in slots]
    queue = [f"{len(waiting)} waiting"] if waiting else []
    return Check(name="gpu slots", ok=True, found="; ".join([*held, *queue]) or "none on this host")


def check_clock(now: float | None = None) -> Check:
    """Whether the clock is later than these files: model names hold the date, records their order."""
    now = time.time() if now is None else now
    found = datetime.fromtimestamp(now).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")
    if now >= Path(__file__).stat().st_mtime:
        return Check(name="clock", ok=True, found=found)
    mend = "set the clock: it is earlier than the installation of Tuneline"
    return Check(name="clock", ok=False, found=found, mend=mend)


def _check_server(told: ServiceStatus, host: str, port: int, variable: str) -> Check:
    if told.state != "not running":
        return _check_service(told)
    if not port_is_taken(host, port):
        return Check(name=told.name, ok=True, found=f"not running; port {port} is free")
    holder = port_holder(port) or "another program"
    mend = f"end that program, or choose another port: {variable}={port + 1}"
    return Check(name=told.name, ok=False, found=f"port {port} is in use by {holder}", mend=mend)


def _check_service(told: ServiceStatus) -> Check:
    if told.state == "not answering":
        mend = f"tuneline down, then tuneline up; its log: {told.log}"
        return Check(name=told.name, ok=False, found=f"pid {told.pid} does not answer", mend=mend)
    found = f"running at {told.address}, pid {told.pid}" if told.pid else "not running"
    return Check(name=told.name, ok=True, found=found)


def _pins(constraints: Path) -> dict[str, str]:
    """Normalised name to version, of every `name==version` line."""
    pins = {}
    for line in constraints.read_text(encoding="utf-8").splitlines():
        name, exact, version = line.partition("#")[0].partition("==")
        if exact:
            pins[_normalise(name)] = version.strip()
    return pins


def _required() -> set[str]:
    """Normalised names of what Tuneline itself cannot run without (the extras left out)."""
    lines = importlib.metadata.requires("tuneline") or []
    return {_normalise(re.split(r"[^A-Za-z0-9._-]", line)[0]) for line in lines if "extra ==" not in line}


def _normalise(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def _existing(folder: Path) -> Path:
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
