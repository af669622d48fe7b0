"""Virtual environments, really made from the index, run in, checked, locked and removed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.environments import EnvironmentFile, platform_marker, read_environment, read_lock
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings, load_settings
from methods.registry import Method, read_manifest
from tasks import environments
from tasks.environments import check_environment, create_environment, lock_environment, remove_environment
from tasks.stages import run_stage
from tests.methods.stage_jobs import small_job, wait_for

STAGE = """
import sys, time
import six
from methods import contract

def main(job):
    while job.inputs.get("wait") and not (job.folder / "go").exists():
        time.sleep(0.02)
    return {"six": six.__version__, "prefix": sys.prefix, "file": six.__file__}

if __name__ == "__main__":
    contract.run(main)
"""


def write_method(folder: Path, **changes: object) -> EnvironmentFile:
    """A method whose training stage runs in an environment of its own, made from its `environment.yml`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "training.py").write_text(STAGE)
    manifest = {
        "name": "with-six",
        "description": "A method that needs six.",
        "types": ["chat"],
        "lifecycle": ["customized"],
        "stages": {"training": {"file": "training.py", "environment": "six-env"}},
    }
    (folder / "method.yaml").write_text(yaml.safe_dump(manifest))
    content = {
        "name": "six-env",
        "channels": ["conda-forge"],
        "dependencies": ["python>=3.11", {"pip": ["six"]}],
    }
    (folder / "environment.yml").write_text(yaml.safe_dump({**content, **changes}))
    return read_environment(folder / "environment.yml")


def pip(prefix: Path, *arguments: str) -> None:
    command = [sys.executable, "-m", "pip", "--python", str(prefix / "bin" / "python"), *arguments]
    subprocess.run([*command, "--disable-pip-version-check"], check=True, capture_output=True)


@pytest.fixture
def settings(home: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TUNELINE_CONDA", "")
    return load_settings()


def told(file: EnvironmentFile, settings: Settings) -> list[tuple[str, str, str]]:
    return [(each.what, each.found, each.expected) for each in check_environment(file, settings)]


def test_a_stage_runs_in_an_environment_that_is_made_locked_checked_and_removed(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = settings.methods / "with-six"
    file = write_method(folder, dependencies=["python>=3.11", {"pip": ["six==1.16.0"]}])
    method = read_manifest(folder / "method.yaml")
    with pytest.raises(UserError, match="tuneline envs create with-six"):
        method.stage_python("training")
    assert told(file, settings) == [("six-env", "not made", f"made from {file.path}")]

    record = create_environment(file, settings)
    assert (record.manager, record.installed["six"], record.lock_digest) == ("venv", "1.16.0", None)
    assert told(file, settings) == []
    prefix = (settings.environments / "six-env").resolve()
    assert _run(method, settings) == {
        "status": "completed",
        "six": "1.16.0",
        "prefix": str(prefix),
        "file": _six(prefix),
    }

    lock = lock_environment(file, settings)
    assert f"six==1.16.0 ; {platform_marker()}" in lock.read_text().splitlines()
    assert create_environment(file, settings).created == record.created  # nothing differs: left as it is

    pip(prefix, "install", "--quiet", "six==1.17.0")
    assert told(file, settings) == [("six", "1.17.0", "1.16.0")]
    pip(prefix, "uninstall", "--quiet", "--yes", "six")
    assert told(file, settings) == [("six", "missing", "1.16.0")]
    _put_package(prefix, "stowaway", "3.0")
    assert told(file, settings)[1] == ("stowaway", "3.0", "not to be there")

    mended = create_environment(file, settings)
    assert mended.lock_digest is not None
    assert told(file, settings) == []
    assert not prefix.exists()  # the one before is gone, since nothing runs in it
    assert _run(method, settings)["six"] == "1.16.0"

    write_method(folder)
    changed = read_environment(file.path)
    assert [what for what, *_ in told(changed, settings)] == ["environment.yml"]
    with pytest.raises(UserError, match="changed since"):
        lock_environment(changed, settings)

    remove_environment("six-env", settings)
    assert [path.name for path in (settings.environments / ".built" / "six-env").iterdir()] == ["lock"]
    with pytest.raises(UserError, match="no such environment"):
        remove_environment("six-env", settings)


def _run(method: Method, settings: Settings) -> dict[str, object]:
    job = settings.root / "job"
    return run_stage(
        job, small_job(job), method.stage_python("training"), method.stage_file("training"), 5, lambda _: None
    )


def _six(prefix: Path) -> str:
    version = "python{}.{}".format(*sys.version_info)
    return str(prefix / "lib" / version / "site-packages" / "six.py")


def _put_package(prefix: Path, name: str, version: str) -> None:
    site = prefix / "lib" / "python{}.{}".format(*sys.version_info) / "site-packages"
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)  # pip removes the folder with the last package in it
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


EMPTY = {"dependencies": ["python>=3.11"]}


def test_an_environment_in_which_a_stage_runs_is_neither_removed_nor_taken_from_under_it(
    settings: Settings, tmp_path: Path
) -> None:
    file = write_method(tmp_path / "method", **EMPTY)
    create_environment(file, settings)
    prefix = (settings.environments / "six-env").resolve()
    running = subprocess.Popen([prefix / "bin" / "python", "-c", "import time; time.sleep(600)"])
    try:
        assert wait_for(lambda: environments.running_in(prefix) == [running.pid], 10)
        with pytest.raises(UserError, match=rf"process {running.pid}"):
            remove_environment("six-env", settings)
        (tmp_path / "method" / "environment.yml").write_text(file.path.read_text() + "# changed\n")
        create_environment(read_environment(file.path), settings)
        assert (prefix / "bin" / "python").exists()
        assert (settings.environments / "six-env").resolve() != prefix
    finally:
        running.kill()
        running.wait()
    remove_environment("six-env", settings)
    assert not prefix.exists()


def test_a_create_that_fails_or_is_killed_leaves_nothing_half_made(settings: Settings, tmp_path: Path) -> None:
    file = write_method(tmp_path / "method", dependencies=["python", {"pip": ["six==0.0.0.1"]}])
    with pytest.raises(UserError, match=r"could not be made[\s\S]*six==0\.0\.0\.1"):
        create_environment(file, settings)
    built = settings.environments / ".built" / "six-env"
    assert [path.name for path in built.iterdir()] == ["lock"]
    (built / "six-env-of-a-killed-one" / "bin").mkdir(parents=True)
    assert environments.list_environments(settings) == []
    create_environment(write_method(tmp_path / "method", **EMPTY), settings)
    assert len(list(built.iterdir())) == 2
    assert [record.name for record in environments.list_environments(settings)] == ["six-env"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dependencies": ["python", "cudatoolkit=12", "ffmpeg"]}, "only conda can install cudatoolkit=12, ffmpeg"),
        ({"dependencies": ["python=2.7"]}, "no Python of this host"),
        ({"dependencies": ["python=three"]}, "no versions of Python"),
        ({"dependencies": ["python", {"pip": ["--index-url http://user:pass@host/"]}]}, "an option of pip"),
        ({"dependencies": ["python", {"npm": ["x"]}]}, "field: dependencies"),
        ({"name": "../out"}, "field: name"),
        ({"prefix": "/somewhere"}, "field: prefix"),
    ],
)
def test_a_file_that_cannot_be_made_is_refused_by_what_is_wrong(
    changes: dict[str, object], said: str, settings: Settings, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=said):
        create_environment(write_method(tmp_path / "method", **changes), settings)
    assert environments.list_environments(settings) == []


def test_a_python_that_only_pyenv_has_is_found_although_its_shim_runs_another_one(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    minor = sys.version_info.minor + 1
    shims, root = tmp_path / "shims", tmp_path / "pyenv"
    for program, version in ((shims / f"python3.{minor}", None), (root / f"versions/3.{minor}.7/bin/python", "7")):
        program.parent.mkdir(parents=True)
        program.write_text(f"#!/bin/sh\n{f'echo 3.{minor}.{version}' if version else 'exit 127'}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(shims))
    monkeypatch.setenv("PYENV_ROOT", str(root))
    file = write_method(tmp_path / "method", dependencies=[f"python=3.{minor}"])
    assert environments._interpreter(file) == str(root / f"versions/3.{minor}.7/bin/python")
    (root / f"versions/3.{minor}.7/bin/python").unlink()
    with pytest.raises(UserError, match="no Python of this host"):
        environments._interpreter(file)


def test_a_lock_keeps_the_versions_of_other_platforms(tmp_path: Path) -> None:
    path = tmp_path / "environment.lock.txt"
    other = 'six==1.15.0 ; sys_platform == "amiga" and platform_machine == "m68k"'
    path.write_text(f"# note\n{other}\n# conda amiga-m68k: zlib=1.2=0\nsix==1.16.0 ; {platform_marker()}\n")
    assert read_lock(path).pip == {"six": "1.16.0"}
    lock = read_lock(path)
    lock.pip["six"] = "1.17.0"
    lines = environments.lock_lines(path, lock)
    assert lines[1:] == [other, "# conda amiga-m68k: zlib=1.2=0", f"six==1.17.0 ; {platform_marker()}"]
    path.write_text("six>=1.0\n")
    with pytest.raises(UserError, match=r"lock\.txt:1: this is no exact version"):
        read_lock(path)


def test_torch_is_the_projects_own_unless_the_environment_names_another() -> None:
    own = [line for line in (PROJECT_ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    assert environments._torch_constraints(["six", "torch>=2"]) == own
    assert len(own) == 1
    assert environments._torch_constraints(["torch==2.0.0"]) == []


def test_conda_is_taken_where_there_is_one_and_missed_by_name(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("micromamba", "mamba"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("TUNELINE_CONDA", raising=False)
    assert environments.choose_manager(None, None, load_settings()) == ("conda", str(tmp_path / "mamba"))
    assert environments.choose_manager("venv", None, load_settings()) == ("venv", None)
    monkeypatch.setenv("TUNELINE_CONDA", str(tmp_path / "micromamba"))
    assert environments.choose_manager(None, None, load_settings())[1] == str(tmp_path / "micromamba")
    monkeypatch.setenv("TUNELINE_CONDA", "")
    assert environments.choose_manager(None, None, load_settings()) == ("venv", None)
    with pytest.raises(UserError, match="no conda was found"):
        environments.choose_manager("conda", None, load_settings())
    with pytest.raises(UserError, match="no such program"):
        environments.choose_manager(None, str(tmp_path / "none"), load_settings())


@pytest.mark.parametrize("outside", ["./../env", "~/env/../../x", "../with-six/../env"])
def test_a_folder_inside_a_method_is_not_outside_of_it(outside: str, settings: Settings, tmp_path: Path) -> None:
    write_method(tmp_path / "method")
    (tmp_path / "env" / "bin").mkdir(parents=True)
    (tmp_path / "env" / "bin" / "python").touch()
    (tmp_path / "method" / "env").symlink_to(tmp_path / "env")
    manifest = tmp_path / "method" / "method.yaml"
    text = manifest.read_text()
    manifest.write_text(text.replace("six-env", "./env"))
    assert read_manifest(manifest).stage_python("training") == tmp_path / "method" / "env" / "bin" / "python"
    manifest.write_text(text.replace("six-env", outside))
    with pytest.raises(UserError, match=r"not inside the method's|no interpreter"):
        read_manifest(manifest).stage_python("training")


def test_packages_of_the_path_are_not_taken_for_installed_ones(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    info = tmp_path / "ghost-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: ghost\nVersion: 1.0\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{PROJECT_ROOT}")
    found = environments.installed(Path(sys.executable))
    assert "ghost" not in found
    assert "pydantic" in found
