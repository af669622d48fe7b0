"""The environments that methods name, made as `tuneline envs create` makes them and kept for the next test run.

They lie below TUNELINE_CHECK_HOME, by default in the user's cache: some take gigabytes.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from configs.settings import PROJECT_ROOT, Settings
from tasks.environments import create_environment, files_of

HOME = Path(os.environ.get("TUNELINE_CHECK_HOME", "~/.cache/tuneline/check-home")).expanduser()


def create_environments(folder: Path) -> None:
    """Make what a method's folder names and is not there yet; minutes where it is new.

    Test files that run side by side wait for each other here: a second maker of an environment is refused.
    """
    HOME.mkdir(parents=True, exist_ok=True)
    with (HOME / "making").open("ab") as making:
        fcntl.flock(making, fcntl.LOCK_EX)
        for file in files_of(folder):
            create_environment(file, Settings(home=HOME))


def method_python(folder: str, name: str) -> Path:
    """The interpreter of the environment `name` of the method in `methods/FOLDER`."""
    create_environments(PROJECT_ROOT / "methods" / folder)
    return (Settings(home=HOME).environments / name).resolve() / "bin" / "python"
