"""Weights in pytorch_model.bin become safetensors, bit by bit; what is no weights is refused and leaves nothing."""

from __future__ import annotations

import json
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import pytest

from configs.errors import UserError
from configs.settings import Settings
from tasks import bin_weights
from tasks.bin_weights import convert_model


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "tf_model.h5").touch()
    return folder


def nothing_left(target: Path) -> bool:
    """Whether neither the target nor a half of it is there."""
    return not target.exists() and not list(target.parent.glob(f".{target.name}-*"))


def test_shards_ties_dtypes_and_odd_values_are_kept_bit_by_bit(source: Path, settings: Settings) -> None:
    import torch
    from safetensors.torch import load_file

    embedding = torch.randn(6, 4)
    one = {"embed.weight": embedding, "lm_head.weight": embedding, "turned": torch.randn(3, 5).T}
    other = {
        "half": torch.tensor([float("nan"), float("inf"), -0.0], dtype=torch.bfloat16),
        "count": torch.tensor(7),
        "none": torch.empty(0, 3),
    }
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    torch.save(one, source / names[0])
    torch.save(other, source / names[1], _use_new_zipfile_serialization=False)  # the older format of many models
    placed = dict.fromkeys(one, names[0]) | dict.fromkeys(other, names[1])
    (source / bin_weights.INDEX).write_text(json.dumps({"weight_map": placed}))
    (source / "modeling_own.py").write_text("raise SystemExit('nobody imports this')")
    done = convert_model(str(source), None, settings)
    assert done.folder == settings.base_models / "converted" / "pickled"
    assert done.tensors == 6
    assert done.shared == ["embed.weight", "lm_head.weight"]
    assert done.not_copied == ["tf_model.h5"]
    index = json.loads((done.folder / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {*one, *other}
    assert index["metadata"]["total_size"] == done.bytes
    for name, tensor in {**one, **other}.items():
        written = load_file(done.folder / index["weight_map"][name])[name]
        assert (written.dtype, written.shape) == (tensor.dtype, tensor.shape)
        if tensor.numel():
            bits = [each.contiguous().reshape(-1).view(torch.uint8) for each in (written, tensor)]
            assert torch.equal(*bits)
    assert {file.name for file in done.folder.iterdir()} == {
        "config.json",
        "modeling_own.py",
        "model.safetensors.index.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
    }


class _Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


@pytest.mark.parametrize("form", ["zip", "plain pickle"])
def test_a_pickle_that_calls_something_is_refused_in_one_sentence(
    source: Path, settings: Settings, tmp_path: Path, form: str
) -> None:
    mark, target = tmp_path / "was-run", tmp_path / "target"
    evil = pickle.dumps({"weight": _Evil(mark)}, protocol=2)
    file = source / "pytorch_model.bin"
    if form == "zip":
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr("archive/data.pkl", evil)
            archive.writestr("archive/version", "3")
            archive.writestr("archive/byteorder", "little")
    else:
        file.write_bytes(evil)
    with pytest.raises(UserError, match="these weights are not converted") as refused:
        convert_model(str(source), target, settings)
    assert "system" in str(refused.value) or "plain file of weights" in str(refused.value)
    assert str(refused.value).count("\n") == 0
    assert "weights_only=False" not in str(refused.value)
    assert not mark.exists()
    assert nothing_left(target)


def test_what_is_no_named_tensors_is_refused(source: Path, settings: Settings, tmp_path: Path) -> None:
    import torch

    cases: dict[str, Any] = {
        "expected a tensor under each name": {"weight": torch.ones(2), "step": 3},
        "expected tensors by name": [torch.ones(2)],
        "twice the size": {"weight": torch.ones(1).expand(100_000)},
    }
    for told, content in cases.items():
        torch.save(content, source / "pytorch_model.bin")
        with pytest.raises(UserError, match=told):
            convert_model(str(source), tmp_path / "target", settings)
        assert nothing_left(tmp_path / "target")
    (source / "pytorch_model.bin").write_bytes(b"no weights at all")
    with pytest.raises(UserError, match="not converted"):
        convert_model(str(source), tmp_path / "target", settings)


def test_an_index_that_names_files_elsewhere_is_refused(source: Path, settings: Settings, tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    for name in ("../pytorch_model.bin", "/etc/passwd", "pytorch_model-00009.bin"):
        (source / bin_weights.INDEX).write_text(json.dumps({"weight_map": {"weight": name}}))
        with pytest.raises(UserError, match="not there"):
            convert_model(str(source), tmp_path / "target", settings)


def test_a_target_that_exists_is_kept_and_a_folder_without_bin_is_told(source: Path, settings: Settings) -> None:
    with pytest.raises(UserError, match="this folder exists"):
        convert_model(str(source), source, settings)
    with pytest.raises(UserError, match=r"no pytorch_model\.bin"):
        convert_model(str(source), source.parent / "target", settings)


def test_the_sandbox_has_no_keys_no_network_and_limits(
    source: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in the place of the converter says what it finds."""
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("TUNELINE_PASSWORD", "secret")
    spy = tmp_path / "spy.py"
    spy.write_text(
        "import json, os, resource, socket, sys\n"
        f"sys.path.insert(0, {str(bin_weights.PROGRAM.parent)!r})\n"
        "from convert_bin import limit_process\n"
        "limit_process(json.load(open(sys.argv[4])))\n"
        "nets = [name for _, name in socket.if_nameindex()]\n"
        "kinds = (resource.RLIMIT_AS, resource.RLIMIT_CPU, resource.RLIMIT_FSIZE)\n"
        "limits = [resource.getrlimit(kind)[1] for kind in kinds]\n"
        "json.dump({'refused': json.dumps([dict(os.environ), nets, limits])}, open(sys.argv[3], 'w'))\n"
    )
    monkeypatch.setattr(bin_weights, "PROGRAM", spy)
    (source / "pytorch_model.bin").write_bytes(b"x" * 1000)
    with pytest.raises(UserError) as refused:
        convert_model(str(source), tmp_path / "target", settings)
    environment, networks, limits = json.loads(str(refused.value).partition("not converted: ")[2])
    assert "secret" not in environment.values()
    assert set(environment) <= {
        *bin_weights._KEPT_VARIABLES,
        "HOME",
        "TMPDIR",
        "OMP_NUM_THREADS",
        "HF_HUB_OFFLINE",
        "LC_CTYPE",
    }
    assert all(limit > 0 for limit in limits)
    if bin_weights._without_network():
        assert networks == ["lo"]
