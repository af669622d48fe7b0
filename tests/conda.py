"""A real conda without any conda channel: the one that PyPI's conda-lock carries, with environments made of links.

conda-lock vendors conda 24.7 with its command line, and lacks only the shell functions. It is built once into
`$XDG_CACHE_HOME/tuneline-tests`; environments are made for each test session.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import site
import subprocess
import sys
from pathlib import Path

from configs.settings import PROJECT_ROOT

CONDA_LOCK = "conda-lock==4.0.3"
# What `conda run` and `conda env list` import.
_NEEDED = ("boltons", "ruamel.yaml", "tqdm", "pluggy", "frozendict", "requests", "packaging", "platformdirs")
_NEEDED_TO_CREATE = ("archspec", "conda-package-handling", "pycosat", "click")

_PROGRAM = '''#!{python}
"""conda, as conda-lock carries it, under its own name."""
import importlib
import importlib.util
import os
import pathlib
import sys
import types


class UnderItsOwnName:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "conda":
            return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec):
        return importlib.import_module("conda_lock._vendor." + spec.name)

    def exec_module(self, module):
        pass


for name, value in {settings!r}.items():
    os.environ.setdefault(name, value)
# The package itself would import all of conda-lock, which takes two seconds.
carrier = types.ModuleType("conda_lock")
carrier.__path__ = [{package!r}]
sys.modules["conda_lock"] = carrier
sys.meta_path.insert(0, UnderItsOwnName())
activate = importlib.import_module("conda.activate")
activate.PosixActivator.hook_source_path = pathlib.Path({hook!r})
if __name__ == "__main__":  # conda looks for a GPU in a process that imports this file
    sys.exit(importlib.import_module("conda.cli.main").main())
'''
_HOOK = """conda() {
  case "$1" in
    activate | deactivate) commands="$("$CONDA_EXE" shell.posix "$@")" && eval "$commands" ;;
    *) "$CONDA_EXE" "$@" ;;
  esac
}
"""


def real_conda() -> Path:
    """The conda executable, built by its first user; needs the package index then."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuneline-tests"
    root = cache / f"conda-{sys.version_info.major}.{sys.version_info.minor}"
    executable = root / "bin" / "conda"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not executable.exists():
            shutil.rmtree(root, ignore_errors=True)
            _build(root, executable)
    return executable


def _build(root: Path, executable: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
    python = root / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*install, *_NEEDED, *_NEEDED_TO_CREATE], check=True)
    subprocess.run([*install, "--no-deps", CONDA_LOCK], check=True)
    (package,) = root.glob("lib/python*/site-packages/conda_lock")
    hook = root / "etc" / "profile.d" / "conda.sh"
    hook.parent.mkdir(parents=True)
    hook.write_text(_HOOK)
    (root / "conda-meta").mkdir()
    (root / "conda-meta" / "history").touch()
    settings = {
        "CONDA_OFFLINE": "1",
        "CONDA_SOLVER": "classic",
        "CONDA_REPORT_ERRORS": "false",
        "CONDA_AUTO_ACTIVATE_BASE": "false",
    }
    text = _PROGRAM.format(python=python, settings=settings, package=str(package), hook=str(hook))
    unfinished = executable.with_suffix(".new")
    unfinished.write_text(text)
    unfinished.chmod(0o755)
    unfinished.replace(executable)  # last, so that a build that was cut off is done again


def make_conda_environment(prefix: Path) -> Path:
    """A conda environment with this interpreter's packages and Tuneline in it, and an activation script.

    Activated by conda, it sets ACTIVATED_BY_CONDA to its name, which nothing else does.
    """
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(prefix)], check=True)
    (prefix / "conda-meta").mkdir()
    (prefix / "conda-meta" / "history").touch()
    scripts = prefix / "etc" / "conda" / "activate.d"
    scripts.mkdir(parents=True)
    (scripts / "marker.sh").write_text(f"export ACTIVATED_BY_CONDA={prefix.name}\n")
    link_packages(prefix)
    return prefix


def link_packages(prefix: Path) -> None:
    """Let a virtual environment find the packages of this interpreter, and Tuneline."""
    (packages,) = prefix.glob("lib/python*/site-packages")
    lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    (packages / "host.pth").write_text("\n".join([*lines, str(PROJECT_ROOT), ""]))
