"""Code that models bring: what is refused, what consent covers, and where consent can come from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.base_models import BaseModelEntry
from configs.errors import UserError
from configs.remote_code import allow_code, read_allowed_code, revoke_code
from configs.settings import Settings
from methods.contract import Refused
from methods.toolkit import remote_code as stage_side
from tasks.base_models import fetch_base_model
from tasks.code_listing import list_code, warnings_of
from tasks.model_folders import complete_model_only
from tasks.model_server import server_environment
from tasks.remote_code import admit, allowed_digests, model_code, refuse_code
from tasks.stages import StageJob, run_stage, stage_environment
from tests.own_code_models import AUTO_MAP, write_code

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path / "home"))
    return Settings(home=tmp_path / "home")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder with code and a file of weights that nobody reads."""
    write_code(tmp_path / "packed")
    (tmp_path / "packed" / "model.safetensors").write_bytes(b"")
    return tmp_path / "packed"


def entry_of(folder: Path) -> BaseModelEntry:
    return BaseModelEntry(name="packed", title="packed", path=folder)


def allow(folder: Path, settings: Settings) -> str:
    code = model_code(folder)
    assert code is not None
    allow_code(code.digest, code.digest, settings)
    return code.digest


def map_config(folder: Path, auto_map: Any) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "packed_llama", "auto_map": auto_map}))


# --- without consent ----------------------------------------------------------------------------------------


def test_code_is_refused_by_default_with_files_digest_and_commands(folder: Path, settings: Settings) -> None:
    with pytest.raises(UserError, match="brings its own Python code, which is not allowed") as refused:
        fetch_base_model(entry_of(folder), settings)
    told = str(refused.value)
    for expected in (
        "configuration_packed.py, modeling_packed.py, tokenization_packed.py",
        stage_side.code_of(folder).digest,  # type: ignore[union-attr]
        f"tuneline models code {folder} --source",
        f"tuneline models allow-code {folder}",
    ):
        assert expected in told


def test_a_stage_does_not_import_code_that_is_not_allowed(folder: Path, tmp_path: Path) -> None:
    mark = tmp_path / "was-run"
    for file in folder.glob("*.py"):
        file.write_text(f"open({str(mark)!r}, 'w')\n" + file.read_text())
    load = (
        "import sys\nfrom methods.contract import Refused\nfrom methods.toolkit import chat, models\n"
        "for load in (chat.load_tokenizer, lambda path: models.load_model(path, 'float32')):\n"
        "    try:\n        load(sys.argv[1])\n    except Refused as refusal:\n        print('REFUSED', refusal)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", load, str(folder)],
        env=stage_environment() | {"HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.count("REFUSED") == 2, done.stdout + done.stderr
    assert done.stdout.count("is not allowed") == 2
    assert not mark.exists()


def test_a_model_that_transformers_has_itself_is_used_without_its_code(folder: Path, settings: Settings) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "auto_map": AUTO_MAP}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    view = fetch_base_model(entry_of(folder), settings)
    assert view != folder
    assert json.loads((view / "config.json").read_text()) == {"model_type": "llama"}
    assert list(view.rglob("*.py")) == []
    assert stage_side.code_of(view) is None
    assert (view / "model.safetensors").resolve() == folder / "model.safetensors"
    allow(folder, settings)  # then it is used
    assert stage_side.code_of(fetch_base_model(entry_of(folder), settings)) is not None


# --- with consent -------------------------------------------------------------------------------------------


def test_allowed_code_is_copied_into_the_store_and_its_digest_is_the_stage_s_input(
    folder: Path, settings: Settings
) -> None:
    digest = allow(folder, settings)
    view = fetch_base_model(entry_of(folder), settings)
    assert view.parent == settings.base_models
    assert not any(file.is_symlink() for file in view.glob("*.py"))
    assert allowed_digests([view, view], settings) == [digest]
    assert fetch_base_model(entry_of(folder), settings) == view


def test_a_template_does_not_part_a_model_from_its_code(folder: Path, settings: Settings) -> None:
    digest = allow(folder, settings)
    entry = entry_of(folder).model_copy(update={"chat_template": "{{ messages[0]['content'] }}"})
    view = fetch_base_model(entry, settings)
    assert (view / "chat_template.jinja").is_file()
    assert allowed_digests([view], settings) == [digest]


@pytest.mark.parametrize("change", ["byte", "new file", "name"])
def test_code_that_changes_after_consent_is_refused(folder: Path, settings: Settings, change: str) -> None:
    allow(folder, settings)
    view = fetch_base_model(entry_of(folder), settings)
    for place in (folder, view):
        if change == "byte":
            with (place / "modeling_packed.py").open("a") as file:
                file.write("#")
        elif change == "new file":
            (place / "sub").mkdir()
            (place / "sub" / "more.py").touch()
        else:
            (place / "other.py").write_bytes((place / "tokenization_packed.py").read_bytes())
    with pytest.raises(UserError, match="not allowed"):
        fetch_base_model(entry_of(folder), settings)
    with pytest.raises(UserError, match="not allowed"):  # what a train, a question or a server asks at each start
        allowed_digests([view], settings)


def test_revoked_code_is_refused_again(folder: Path, settings: Settings) -> None:
    digest = allow(folder, settings)
    view = fetch_base_model(entry_of(folder), settings)
    assert revoke_code(digest, settings)
    assert not revoke_code(digest, settings)
    with pytest.raises(UserError, match="not allowed"):
        allowed_digests([view], settings)


def test_a_stage_checks_the_digest_itself(folder: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = allow(folder, settings)
    monkeypatch.setenv(stage_side.ALLOWED_VARIABLE, digest)
    assert stage_side.trusted(folder)
    (folder / "modeling_packed.py").write_text("changed = True")
    with pytest.raises(Refused, match="a file has changed since"):
        stage_side.trusted(folder)


# --- where consent comes from -------------------------------------------------------------------------------


def test_the_environment_allows_nothing(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = model_code(folder)
    assert code is not None
    monkeypatch.setenv(stage_side.ALLOWED_VARIABLE, code.digest)
    stage = tmp_path / "stage.py"
    stage.write_text(
        "import os\nfrom methods import contract\n"
        "found = {'allowed': os.environ['STAGE_ALLOWED_CODE'], 'modules': os.environ.get('HF_MODULES_CACHE')}\n"
        "contract.run(lambda job: found)\n"
    )
    monkeypatch.delenv("HF_MODULES_CACHE", raising=False)
    for given, expected in (({}, ""), ({"remote_code": [code.digest]}, code.digest)):
        job = StageJob(stage="saving", parameters={}, inputs=given, output=tmp_path / "output", seed=0)
        result = run_stage(tmp_path / "job", job, Path(sys.executable), stage, 10, lambda _: None)
        assert result["allowed"] == expected
        assert result["modules"] == (str(tmp_path / "job" / "modules") if given else None)
    assert server_environment()[stage_side.ALLOWED_VARIABLE] == ""


@pytest.mark.parametrize(
    "line", ["allow_remote_code: [{digest}]", "trust_remote_code: true", "remote_code: [{digest}]"]
)
def test_a_train_file_allows_nothing(folder: Path, tmp_path: Path, settings: Settings, line: str) -> None:
    from configs.resolve import resolve_train

    code = model_code(folder)
    assert code is not None
    file = tmp_path / "train.yaml"
    own = line.format(digest=code.digest)
    file.write_text(f"name: mine\nbase_model: {folder}\ndataset: rows.jsonl\n{own}\n")
    with pytest.raises(UserError, match=own.split(":")[0]):
        resolve_train(file)


def test_a_list_that_others_can_write_allows_nothing(folder: Path, settings: Settings) -> None:
    allow(folder, settings)
    assert settings.allowed_code.stat().st_mode & 0o777 == 0o600
    settings.allowed_code.chmod(0o666)
    with pytest.raises(UserError, match="chmod 600"):
        read_allowed_code(settings)


@pytest.mark.parametrize("entry", ["sha256:abc", "owner/name@main", "owner/name", "*", "true"])
def test_an_entry_names_a_digest_or_a_full_commit(settings: Settings, entry: str) -> None:
    settings.root.mkdir(parents=True)
    settings.allowed_code.write_text(f"allow_remote_code:\n- {entry!r}\n")
    settings.allowed_code.chmod(0o600)
    with pytest.raises(UserError, match="full commit") as refused:
        read_allowed_code(settings)
    assert refused.value.file == str(settings.allowed_code)
    assert refused.value.line == 1


# --- hub ----------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache with one snapshot of owner/packed, its files links to blobs; returns the snapshot."""
    repository = tmp_path / "hub" / "models--owner--packed"
    snapshot, blobs = repository / "snapshots" / COMMIT, repository / "blobs"
    for place in (snapshot, blobs, repository / "refs"):
        place.mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    for number, file in enumerate(sorted(folder.iterdir())):
        (blobs / f"{number:040x}").write_bytes(file.read_bytes())
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"{number:040x}")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda hub, **named: str(snapshot))
    return snapshot


def test_a_hub_model_is_allowed_at_one_commit_and_its_code_is_pinned(hub: Path, settings: Settings) -> None:
    entry = BaseModelEntry(name="hub", title="hub", hub="owner/packed")
    with pytest.raises(UserError, match="not allowed"):
        fetch_base_model(entry, settings)
    listed = list_code("owner/packed", settings)
    assert listed.entry == f"owner/packed@{COMMIT}"
    settings.root.mkdir(parents=True, exist_ok=True)
    settings.allowed_code.write_text(f"allow_remote_code: ['{listed.entry}']\n")  # as a user writes it by hand
    settings.allowed_code.chmod(0o600)
    view = fetch_base_model(entry, settings)
    assert read_allowed_code(settings).pinned == {listed.entry: listed.code.digest}
    assert allowed_digests([view], settings) == [listed.code.digest]
    blob = (hub / "modeling_packed.py").resolve()
    blob.write_text("changed = True")
    with pytest.raises(UserError, match="not the code that was allowed"):
        fetch_base_model(entry, settings)


def test_another_commit_of_an_allowed_hub_model_is_refused(hub: Path, settings: Settings) -> None:
    allow_code(f"owner/packed@{'f' * 40}", f"sha256:{'0' * 64}", settings)
    with pytest.raises(UserError, match="not allowed"):
        fetch_base_model(BaseModelEntry(name="hub", title="hub", hub="owner/packed"), settings)


# --- attacks by the folder ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("../evil.Class", "no path"),
        ("..evil.Class", "no path"),
        ("sub/evil.Class", "no path"),
        ("/tmp/evil.Class", "no path"),
        ("other/repo--file.Class", "another repository"),
        ("--file.Class", "another repository"),
        ("absent.Class", "holds no absent.py"),
        ("configuration_packed", "no path"),
        ("configuration_packed.PackedConfig\n", "no path"),
        (["configuration_packed.PackedConfig", "other/repo--file.Class"], "another repository"),
        ([7], "expected the name of a class"),
    ],
)
def test_auto_map_to_elsewhere_can_never_be_allowed(
    folder: Path, settings: Settings, reference: Any, told: str
) -> None:
    allow(folder, settings)
    (folder.parent / "evil.py").write_text("")
    map_config(folder, {"AutoConfig": reference})
    with pytest.raises(UserError, match=told):
        fetch_base_model(entry_of(folder), settings)
    with pytest.raises(UserError, match=told):
        list_code(str(folder), settings)
    with pytest.raises(Refused, match=told):
        stage_side.trusted(folder)


@pytest.mark.parametrize("kind", ["file", "folder", "nowhere"])
def test_code_linked_from_elsewhere_is_refused(folder: Path, tmp_path: Path, settings: Settings, kind: str) -> None:
    allow(folder, settings)
    (tmp_path / "elsewhere").mkdir()
    shutil.move(folder / "modeling_packed.py", tmp_path / "elsewhere" / "modeling_packed.py")
    if kind == "folder":
        shutil.copy(tmp_path / "elsewhere" / "modeling_packed.py", folder)
        (folder / "sub").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    else:
        target = "modeling_packed.py" if kind == "file" else "gone.py"
        (folder / "modeling_packed.py").symlink_to(tmp_path / "elsewhere" / target)
    with pytest.raises(UserError, match="link"):
        fetch_base_model(entry_of(folder), settings)


def test_code_that_other_libraries_run_without_asking_is_refused(folder: Path, settings: Settings) -> None:
    cases: dict[str, tuple[str, Any]] = {
        "mlx-lm would run": ("config.json", {"model_type": "llama", "model_file": "evil.py"}),
        "not part of sentence-transformers": ("modules.json", [{"path": "", "type": "evil.Module"}]),
        "of a part of the model": ("unet/config.json", {"auto_map": AUTO_MAP}),
    }
    for told, (name, content) in cases.items():
        plain = folder.parent / name.replace("/", "-")
        (plain / name).parent.mkdir(parents=True)
        (plain / "config.json").write_text("{}")
        (plain / "model.safetensors").touch()
        (plain / name).write_text(json.dumps(content))
        with pytest.raises(UserError, match=told):
            fetch_base_model(entry_of(plain), settings)


def test_servers_that_could_run_other_code_are_refused(folder: Path, settings: Settings) -> None:
    allow(folder, settings)
    with pytest.raises(UserError, match="target transformers"):
        refuse_code(folder, "vllm")
    with pytest.raises(UserError, match="target transformers"):
        complete_model_only(folder, "llama.cpp")


# --- what is shown and carried ------------------------------------------------------------------------------


def test_imports_and_calls_that_can_reach_out_are_listed() -> None:
    source = (
        b"import os, json\nfrom subprocess import run\nx = eval('1')\njson.load(f)\ntorch.load(f)\nfrom .a import b\n"
    )
    assert warnings_of(source) == [
        "line 1: imports os",
        "line 2: imports from subprocess",
        "line 3: calls eval()",
        "line 5: calls torch.load()",
    ]
    assert "cannot be parsed" in warnings_of(b"def (")[0]


def test_a_saved_model_carries_exactly_the_code_of_its_base(folder: Path, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "modeling_packed.py").write_text("as transformers saved it")
    (saved / "left.py").touch()
    (saved / "config.json").write_text(json.dumps({"auto_map": {"AutoConfig": "left.X"}, "hidden_size": 8}))
    stage_side.carry(folder, saved)
    before, after = stage_side.code_of(folder), stage_side.code_of(saved)
    assert before is not None
    assert after is not None
    assert after.digest == before.digest
    assert json.loads((saved / "config.json").read_text()) == {"auto_map": AUTO_MAP, "hidden_size": 8}
    plain = tmp_path / "adapter"
    plain.mkdir()
    stage_side.carry(folder, plain)
    assert list(plain.iterdir()) == []


def test_a_model_without_code_is_used_where_it_is(tmp_path: Path, settings: Settings) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "stray.py").write_text("nobody names this")
    assert admit(tmp_path, settings) is None
    assert stage_side.loading(tmp_path) == {"trust_remote_code": False}
    assert stage_side.loading("owner/name") == {"trust_remote_code": False}
    assert not settings.allowed_code.exists()
