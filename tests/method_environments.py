"""The environments that methods name, made as `tuneline envs create` makes them and kept for the next test run."""

from __future__ import annotations

from pathlib import Path

from configs.settings import PROJECT_ROOT, Settings
from tasks.environments import create_environment, files_of

HOME = PROJECT_ROOT / "build" / "method-environments"


def method_python(folder: str, name: str) -> Path:
    """The interpreter of the environment `name` of the method in `methods/FOLDER`; minutes where it is new."""
    settings = Settings(home=HOME)
    (file,) = (each for each in files_of(PROJECT_ROOT / "methods" / folder) if each.name == name)
    create_environment(file, settings)
    return (settings.environments / name).resolve() / "bin" / "python"
