"""Doctor on this machine as it is, and on faults made on purpose."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from configs.settings import Settings
from deployments import doctor


def test_this_machine_is_well_and_nothing_is_changed(tmp_path: Path) -> None:
    home = tmp_path / "home"
    with socket.socket() as first, socket.socket() as second:
        first.bind(("127.0.0.1", 0))
        second.bind(("127.0.0.1", 0))
        ports = first.getsockname()[1], second.getsockname()[1]
    settings = Settings(home=home, prefect_port=ports[0], mlflow_port=ports[1])
    checks = {check.name: check for check in doctor.diagnose(settings)}
    needed = {"python", "torch", "disk", "memory", "home", "prefect", "mlflow", "worker", "conda", "clock", "gpu slots"}
    assert needed | {"libraries"} == set(checks)
    assert [name for name in needed if not checks[name].ok] == []
    assert "trains on" in checks["torch"].found
    assert checks["mlflow"].found == f"not running; port {ports[1]} is free"
    assert not home.exists()


def test_every_failed_check_says_how_to_mend_it(tmp_path: Path) -> None:
    wrong = tmp_path / "constraints.txt"
    wrong.write_text("pydantic==0.0.1\n")
    failed = [
        doctor.check_python((3, 10, 4)),
        doctor.check_libraries(wrong),
        doctor.check_torch("/bin/false"),
        doctor.check_torch(str(tmp_path / "no-python")),
        doctor.check_disk(tmp_path, least_gb=1e9),
        doctor.check_memory(least_gb=1e9),
        doctor.check_clock(now=1_000_000_000.0),
    ]
    assert [(check.name, check.ok) for check in failed if check.ok] == []
    assert all(check.found and check.mend for check in failed)


def test_a_version_other_than_pinned_and_a_missing_requirement_are_named(tmp_path: Path) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("# header\nPyYAML==0.1\nno-such-library==1.0\n")
    check = doctor.check_libraries(constraints)
    # no-such-library is pinned but nothing of Tuneline requires it: that it is absent is no fault.
    assert check.found.startswith("0 as pinned; pyyaml ")
    assert check.found.endswith("(pinned 0.1)")


def test_a_local_suffix_is_not_another_version(tmp_path: Path) -> None:
    import importlib.metadata

    constraints = tmp_path / "constraints.txt"
    constraints.write_text(f"torch=={importlib.metadata.version('torch').partition('+')[0]}\n")
    assert doctor.check_libraries(constraints).ok


def test_a_torch_that_cannot_be_imported_is_told_with_its_error(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} -S -E -I "$@"\n')
    python.chmod(0o755)
    check = doctor.check_torch(str(python))
    assert not check.ok
    assert "torch" in check.found


def test_a_taken_port_is_named_with_its_holder(tmp_path: Path) -> None:
    with socket.socket() as stranger:
        stranger.bind(("127.0.0.1", 0))
        stranger.listen()
        port = stranger.getsockname()[1]
        checks = {check.name: check for check in doctor.check_services(Settings(home=tmp_path, mlflow_port=port))}
    assert not checks["mlflow"].ok
    assert f"port {port} is in use by pid {os.getpid()}" in checks["mlflow"].found
    assert "TUNELINE_MLFLOW_PORT" in checks["mlflow"].mend


def test_a_home_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    # A file where a folder is needed fails for root as well, whom permissions do not stop.
    blocked = tmp_path / "file"
    blocked.write_text("")
    check = doctor.check_home(blocked / "home")
    assert not check.ok
    assert "TUNELINE_HOME" in check.mend


def test_a_damaged_record_is_reported_and_not_raised(tmp_path: Path) -> None:
    settings = Settings(home=tmp_path)
    settings.services.mkdir()
    (settings.services / "mlflow.json").write_text("no record")
    (check,) = (each for each in doctor.check_services(settings) if not each.ok)
    assert "mlflow.json" in check.mend


@pytest.mark.parametrize("name", ["conda", "micromamba"])
def test_a_conda_on_the_path_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    exe = tmp_path / name
    exe.write_text("#!/bin/sh\n")
    exe.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CONDA_EXE", raising=False)
    assert doctor.check_conda().found == str(exe)
