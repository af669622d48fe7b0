"""Environments made by a real conda from a channel of files, with packages of conda's and of pip's in them."""

from __future__ import annotations

import io
import json
import sys
import tarfile
import venv
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.environments import read_environment
from configs.settings import load_settings
from tasks.environments import check_environment, create_environment, lock_environment, packages_of, remove_environment
from tests.conda import real_conda

pytestmark = pytest.mark.operations

VERSION = "{}.{}.{}".format(*sys.version_info)


def write_package(channel: Path, name: str, version: str, files: dict[str, bytes | str]) -> None:
    """A `noarch` package of conda's; a file given as text is a link to that path."""
    index = {"name": name, "version": version, "build": "0", "build_number": 0, "depends": [], "subdir": "noarch"}
    paths = [
        {"_path": path, "path_type": "softlink" if isinstance(content, str) else "hardlink"}
        | {"sha256": sha256(content if isinstance(content, bytes) else b"").hexdigest(), "size_in_bytes": len(content)}
        for path, content in files.items()
    ]
    info: dict[str, bytes | str] = {
        "info/index.json": json.dumps(index).encode(),
        "info/files": "".join(f"{path}\n" for path in files).encode(),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}).encode(),
    }
    folder = channel / "noarch"
    folder.mkdir(parents=True, exist_ok=True)
    archive = folder / f"{name}-{version}-0.tar.bz2"
    with tarfile.open(archive, "w:bz2") as tar:
        for path, content in {**info, **files}.items():
            entry = tarfile.TarInfo(path)
            if isinstance(content, str):
                entry.type, entry.linkname = tarfile.SYMTYPE, content
                tar.addfile(entry)
            else:
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
    listed = folder / "repodata.json"
    data: dict[str, Any] = {"info": {"subdir": "noarch"}, "packages": {}, "packages.conda": {}, "repodata_version": 1}
    if listed.exists():
        data = json.loads(listed.read_text())
    content = archive.read_bytes()
    data["packages"][archive.name] = {**index, "sha256": sha256(content).hexdigest(), "size": len(content)}
    listed.write_text(json.dumps(data))


@pytest.fixture
def channel(tmp_path: Path) -> Path:
    """A channel with this Python, as an interpreter that knows no packages but its own prefix's, and a marker."""
    made = tmp_path / "channel"
    pattern = tmp_path / "pattern"
    venv.create(pattern, with_pip=False)
    settings = (pattern / "pyvenv.cfg").read_bytes()
    python = str((pattern / "bin" / "python").resolve())
    links: dict[str, bytes | str] = {"bin/python": python, "bin/python3": python, "pyvenv.cfg": settings}
    write_package(made, "python", VERSION, links)
    write_package(made, "marker", "1.0", {"share/marker": b"one\n"})
    write_package(made, "marker", "2.0", {"share/marker": b"two\n"})
    return made


def test_a_real_conda_makes_what_the_file_asks_for_and_the_lock_repeats_it(
    home: Path, tmp_path: Path, channel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELINE_CONDA", str(real_conda()))
    monkeypatch.setenv("CONDA_ADD_PIP_AS_PYTHON_DEPENDENCY", "false")  # conda's pip is not in this channel
    monkeypatch.setenv("CONDA_PKGS_DIRS", str(tmp_path / "packages"))  # what is kept links into this test's own folder
    settings = load_settings()
    path = tmp_path / "environment.yml"
    content: dict[str, Any] = {
        "name": "from-conda",
        "channels": [channel.as_uri(), "nodefaults"],
        "dependencies": ["python>=3.11", "marker=1", {"pip": ["six==1.16.0"]}],
    }
    path.write_text(yaml.safe_dump(content))
    file = read_environment(path)

    record = create_environment(file, settings)
    prefix = settings.environments / "from-conda"
    assert (record.manager, record.installed["conda marker"], record.installed["six"]) == ("conda", "1.0=0", "1.16.0")
    assert (prefix / "share" / "marker").read_text() == "one\n"
    assert packages_of(prefix / "bin" / "python") == {"six": "1.16.0"}
    assert check_environment(file, settings) == []

    lock = lock_environment(file, settings).read_text().splitlines()
    assert any(line.endswith(": marker=1.0=0") for line in lock)
    content["dependencies"] = ["python>=3.11", "marker", {"pip": ["six"]}]
    path.write_text(yaml.safe_dump(content))
    changed = read_environment(path)
    assert [each.what for each in check_environment(changed, settings)] == ["environment.yml"]
    again = create_environment(changed, settings)
    assert (again.installed["conda marker"], again.installed["six"]) == ("1.0=0", "1.16.0")  # not the newest: locked

    changed.lock.unlink()
    (meta,) = (prefix / "conda-meta").glob("marker-*.json")
    meta.unlink()
    assert [(each.what, each.found) for each in check_environment(changed, settings)] == [("conda marker", "missing")]
    newest = create_environment(changed, settings)
    assert newest.installed["conda marker"] == "2.0=0"
    remove_environment("from-conda", settings)
    assert not prefix.exists()
