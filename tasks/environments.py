"""The verbs of environments: make, check against the lock, lock, remove. One folder a name in the home's `envs`.

An environment is built in a folder of its own below `envs/.built`, and only when it is finished, with its record in
it, does the link `envs/NAME` turn to it. Whatever a killed `create` has left is swept away by the next one.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from packaging.utils import canonicalize_name

from configs.environments import (
    FILE,
    RECORD,
    Difference,
    EnvironmentFile,
    EnvironmentRecord,
    Lock,
    Manager,
    lock_lines,
    read_environment,
    read_lock,
    split_dependency,
)
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings
from methods.registry import load_methods
from tasks.files import held, last_lines, read_record, write_record, write_text

_CONDAS = ("conda", "mamba", "micromamba")
# What installs packages is none of the packages asked for, unless a lock names it.
_TOOLS = ("pip", "setuptools", "wheel")
_LIST = """
import importlib.metadata, json
found = [(each, each.metadata["Name"]) for each in importlib.metadata.distributions()]
print(json.dumps([[name, each.version, (each.read_text("INSTALLER") or "").strip()] for each, name in found if name]))
"""


# --- finding ----------------------------------------------------------------------------------------------------


def find_files(reference: str, settings: Settings) -> list[EnvironmentFile]:
    """The environment files of a method, of a path, or of the environment of that name. Raises UserError."""
    path = Path(reference).expanduser()
    if path.suffix in (".yml", ".yaml"):
        return [read_environment(path)]
    methods = load_methods(settings)
    if reference in methods:
        found = files_of(methods[reference].folder)
        if not found:
            raise UserError(
                f"the method {reference} has no environment of its own",
                field="method",
                value=reference,
                expected=f"a file {FILE} in {methods[reference].folder}",
            )
        return found
    return [read_environment(load_record(reference, settings).file)]


def files_of(folder: Path) -> list[EnvironmentFile]:
    """The environment files of a method's folder: `environment.yml`, or several named `environment-*.yml`."""
    return [read_environment(path) for path in sorted(folder.glob("environment*.yml"))]


def load_record(name: str, settings: Settings) -> EnvironmentRecord:
    """The record of an environment that was made. Raises UserError with those there are."""
    names = [record.name for record in list_environments(settings)]
    if name not in names:
        raise UserError(
            "there is no such environment",
            field="environment",
            value=name,
            expected=f"one of {', '.join(names)}" if names else "none was made yet",
            mend="`tuneline envs create METHOD` makes that of a method",
        )
    return read_record(settings.environments / name / RECORD, EnvironmentRecord)


def list_environments(settings: Settings) -> list[EnvironmentRecord]:
    """Every finished environment of this installation, by name."""
    paths = sorted(settings.environments.glob(f"[!.]*/{RECORD}"))
    return [read_record(path, EnvironmentRecord) for path in paths]


def stages_of(name: str, settings: Settings) -> list[str]:
    """The stages that run in an environment, as METHOD/STAGE."""
    return [
        f"{method.name}/{stage}"
        for method in load_methods(settings).values()
        for stage, file in method.stages.items()
        if file.environment == name
    ]


def packages_of(python: Path) -> dict[str, str]:
    """The packages that an interpreter can import: canonical name to version. Raises UserError."""
    return {name: version for name, (version, _) in _distributions(python).items()}


def installed(python: Path) -> dict[str, str]:
    """Those of the packages that pip has installed."""
    return {name: version for name, (version, installer) in _distributions(python).items() if installer != "conda"}


def _distributions(python: Path) -> dict[str, tuple[str, str]]:
    # -I: what PYTHONPATH and the user's own folder add is not in the environment.
    done = subprocess.run([str(python), "-I", "-c", _LIST], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UserError("this interpreter does not run", file=python, value=done.stderr.strip()[-500:])
    return {canonicalize_name(name): (version, installer) for name, version, installer in json.loads(done.stdout)}


def _conda_packages(prefix: Path) -> dict[str, str]:
    """What conda has installed: name to version=build."""
    found = [json.loads(path.read_text(encoding="utf-8")) for path in (prefix / "conda-meta").glob("*.json")]
    return {each["name"]: f"{each['version']}={each['build']}" for each in found}


# --- making -----------------------------------------------------------------------------------------------------


def choose_manager(manager: Manager | None, conda: str | None, settings: Settings) -> tuple[Manager, str | None]:
    """The manager and its executable: conda where there is one, else a virtual environment with pip.

    Raises UserError if conda is asked for and there is none.
    """
    given = conda if conda is not None else settings.conda
    exe = shutil.which(given) if given else None
    if given and exe is None:
        raise UserError("there is no such program", field="conda", value=given, expected="conda, mamba or micromamba")
    if given is None:
        exe = next(filter(None, map(shutil.which, _CONDAS)), None)
    if manager == "venv" or (manager is None and exe is None):
        return "venv", None
    if exe is None:
        raise UserError(
            "no conda was found",
            field="manager",
            value=manager,
            expected=" or ".join(_CONDAS),
            mend="name its path with --conda or TUNELINE_CONDA, or take --manager venv",
        )
    return "conda", exe


def create_environment(
    file: EnvironmentFile, settings: Settings, manager: Manager | None = None, conda: str | None = None
) -> EnvironmentRecord:
    """Make an environment, unless it is there and nothing differs; an earlier one is used until this one is finished.

    Installs the versions of the lock if it has any for this platform. Raises UserError with the end of the log.
    """
    chosen, exe = choose_manager(manager, conda, settings)
    lock = read_lock(file.lock)
    with _alone(file.name, settings) as built:
        if not check_environment(file, settings):
            record = load_record(file.name, settings)
            if manager in (None, record.manager):
                return record
        _sweep(built, settings.environments / file.name)
        prefix = built / f"{file.name}-{secrets.token_hex(4)}"
        log = built.parent / f".{file.name}.log"
        log.unlink(missing_ok=True)
        try:
            if exe is not None:
                _make_conda(file, lock, exe, prefix, log)
            else:
                _make_venv(file, prefix, log)
            _install(file, lock, prefix, log)
            record = EnvironmentRecord(
                name=file.name,
                manager=chosen,
                file=file.path,
                file_digest=_digest(file.path),
                lock_digest=_digest(file.lock) if lock else None,
                installed=_contents(prefix),
            )
            write_record(prefix / RECORD, record)
        except BaseException:
            shutil.rmtree(prefix, ignore_errors=True)
            raise
        _turn_link(settings.environments / file.name, prefix)
        _sweep(built, settings.environments / file.name)
    return record


@contextmanager
def _alone(name: str, settings: Settings) -> Iterator[Path]:
    """The folder of everything built for a name, for oneself. Raises UserError if somebody else works in it."""
    built = settings.environments / ".built" / name
    with held(built) as free:
        if not free:
            raise UserError(
                "this environment is being made or removed right now", field="environment", value=name, mend="wait"
            )
        yield built


def _sweep(built: Path, link: Path) -> None:
    """Remove what no link leads to: a half-made environment, or an earlier one in which nothing runs any more."""
    current = link.resolve()
    for folder in built.iterdir():
        if folder.is_dir() and folder != current and not running_in(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _turn_link(link: Path, prefix: Path) -> None:
    temporary = link.with_name(f".{link.name}.{secrets.token_hex(4)}")
    temporary.symlink_to(prefix)
    temporary.replace(link)


def _make_conda(file: EnvironmentFile, lock: Lock, exe: str, prefix: Path, log: Path) -> None:
    specs = [f"{name}={version}" for name, version in lock.conda.items()] or file.dependencies
    channels = [part for each in file.channels if each != "nodefaults" for part in ("--channel", each)]
    if "nodefaults" in file.channels:
        channels.append("--override-channels")
    _run([exe, "create", "--yes", "--prefix", str(prefix), *channels, *specs], file, log)


def _make_venv(file: EnvironmentFile, prefix: Path, log: Path) -> None:
    if file.conda_only:
        raise UserError(
            f"only conda can install {', '.join(file.conda_only)}",
            file=file.path,
            field="dependencies",
            value=file.conda_only,
            expected="python and pip, and everything else in the `pip:` section",
            mend="name a conda with --conda, or the same packages in the `pip:` section",
        )
    with_pip = any(split_dependency(each)[0] == "pip" for each in file.dependencies)
    options = [] if with_pip else ["--without-pip"]  # ours installs into it
    _run([_interpreter(file), "-m", "venv", *options, str(prefix)], file, log)


def _interpreter(file: EnvironmentFile) -> str:
    """Our own interpreter, or another one of this host that has a version the file allows. Raises UserError."""
    own = "{}.{}.{}".format(*sys.version_info)
    if own in file.python:
        return sys.executable
    for other in _other_interpreters():
        if _version(other) in file.python:
            return other
    raise UserError(
        "no Python of this host has a version that the environment allows",
        file=file.path,
        field="dependencies",
        value=f"python{file.python}",
        expected=f"python {own}, which is what there is, or another one on the PATH or of pyenv",
        mend="install that Python, or name a conda with --conda",
    )


def _other_interpreters() -> Iterator[str]:
    """Interpreters of this host, newest first: on the PATH, and of pyenv, whose shims run the chosen version only."""
    pyenv = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser() / "versions"
    for minor in range(sys.version_info.minor + 5, 7, -1):
        if on_path := shutil.which(f"python3.{minor}"):
            yield on_path
        yield from map(str, sorted(pyenv.glob(f"3.{minor}.*/bin/python"), reverse=True))


def _version(python: str) -> str:
    """The version of an interpreter; 0 for a name on the PATH that runs none, as version managers put there."""
    code = "import platform; print(platform.python_version())"
    done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "0"


def _install(file: EnvironmentFile, lock: Lock, prefix: Path, log: Path) -> None:
    """Install what pip is to install: the lock's exact versions together with what the file asks for."""
    wanted = [f"{name}=={version}" for name, version in lock.pip.items()] + file.pip
    if not wanted:
        return
    python = prefix / "bin" / "python"
    if not python.exists():
        raise UserError(
            "the packages of the `pip:` section need a Python",
            file=file.path,
            field="dependencies",
            expected="python among the dependencies",
        )
    requirements, constraints = prefix / "requirements.txt", prefix / "constraints.txt"
    write_text(requirements, "".join(f"{each}\n" for each in wanted))
    write_text(constraints, "".join(f"{each}\n" for each in _torch_constraints(wanted)))
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-input"]
    command += ["--disable-pip-version-check", "--requirement", str(requirements), "--constraint", str(constraints)]
    _run(command, file, log)


def _torch_constraints(wanted: list[str]) -> list[str]:
    """The project's own version of torch, unless the environment has settled on another: only some exist for CPUs."""
    path = PROJECT_ROOT / "constraints.txt"
    if not path.exists():  # installed from a wheel
        return []
    pins = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("torch==")]
    return [] if any(each.startswith("torch==") for each in wanted) else pins


def _run(command: list[str], file: EnvironmentFile, log: Path) -> None:
    """Run a program that installs; it ends with us. Raises UserError with the end of what it said."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_USER")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=file.path.parent,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            code = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code != 0:
        raise UserError(
            f"the environment {file.name} could not be made: {Path(command[0]).name} ended with exit code {code}. "
            f"The end of its log:\n{last_lines(log, 15)}",
            file=log,
        )


def _contents(prefix: Path) -> dict[str, str]:
    """Everything that is installed, conda's packages marked as such."""
    python = prefix / "bin" / "python"
    return {**_marked(_conda_packages(prefix)), **(installed(python) if python.exists() else {})}


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# --- checking, locking, removing --------------------------------------------------------------------------------


def check_environment(file: EnvironmentFile, settings: Settings) -> list[Difference]:
    """Everything in which the environment differs from its lock (without one: from what was installed at first)."""
    prefix = settings.environments / file.name
    if not (prefix / RECORD).exists():
        return [Difference(what=file.name, found="not made", expected=f"made from {file.path}")]
    record = read_record(prefix / RECORD, EnvironmentRecord)
    lock = read_lock(file.lock)
    differences = []
    if _digest(file.path) != record.file_digest:
        made = f"as it was when the environment was made, {record.created:%Y-%m-%d %H:%M}"
        differences.append(Difference(what=file.path.name, found="changed", expected=made))
    expected = {**_marked(lock.conda), **lock.pip} if lock else record.installed
    found = _contents(prefix)
    if lock and (record.manager == "venv" or not lock.conda):  # locked by pip alone, or for a conda that is not here
        expected, found = lock.pip, {name: version for name, version in found.items() if not name.startswith("conda ")}
    for name in sorted(expected.keys() | found.keys()):
        if name in _TOOLS and name not in lock.pip:
            continue
        if found.get(name) != expected.get(name):
            here, wanted = found.get(name, "missing"), expected.get(name, "not to be there")
            differences.append(Difference(what=name, found=here, expected=wanted))
    return differences


def _marked(conda: dict[str, str]) -> dict[str, str]:
    """A package of conda's and one of pip's may have the same name."""
    return {f"conda {name}": version for name, version in conda.items()}


def lock_environment(file: EnvironmentFile, settings: Settings) -> Path:
    """Write what is really installed as the exact versions of this platform; returns the lock file.

    Raises UserError if the environment was not made, or not from this file as it is now.
    """
    record = load_record(file.name, settings)
    if _digest(file.path) != record.file_digest:
        raise UserError(
            "the file has changed since the environment was made from it",
            file=file.path,
            mend=f"make it anew first: remove {file.lock.name} if the versions are to be found anew, then "
            f"`tuneline envs create {file.path}`",
        )
    prefix = settings.environments / file.name
    pip = {name: version for name, version in _contents(prefix).items() if not name.startswith("conda ")}
    kept = {name: version for name, version in pip.items() if name not in _TOOLS}
    lines = lock_lines(file.lock, Lock(pip=kept, conda=_conda_packages(prefix)))
    write_text(file.lock, "".join(f"{line}\n" for line in lines))
    record.lock_digest = _digest(file.lock)
    write_record(prefix / RECORD, record)
    return file.lock


def remove_environment(name: str, settings: Settings) -> None:
    """Remove an environment. Raises UserError if there is none, or if something runs in it."""
    load_record(name, settings)
    link = settings.environments / name
    with _alone(name, settings) as built:
        if users := running_in(link.resolve()):
            raise UserError(
                f"something runs in this environment: process {', '.join(map(str, users))}",
                field="environment",
                value=name,
                mend="wait for it, or cancel it: `tuneline status`",
            )
        link.unlink()
        _sweep(built, link)
        (settings.environments / ".built" / f".{name}.log").unlink(missing_ok=True)


def running_in(prefix: Path) -> list[int]:
    """The processes that run a program of the environment."""
    import psutil

    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or []
        # By the command line: the interpreter of a virtual environment is a link to another one.
        named = any(Path(part).parent.resolve() == prefix / "bin" for part in command if part.startswith("/"))
        with contextlib.suppress(psutil.Error):
            if named and process.info["status"] != psutil.STATUS_ZOMBIE and process.pid != os.getpid():
                found.append(process.pid)
    return found
