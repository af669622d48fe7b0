"""Trains, as far as they need no run."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import TypeAdapter

from configs.endpoints import ModelName
from configs.records import TrainRecord
from configs.train import TrainConfig
from tasks.trains import trained_model


@pytest.mark.parametrize(
    ("base", "kept"), [("b" * 60, "b" * 60), ("训" * 60, "训" * 20), ("é" * 29 + "训练", "é" * 29)]
)
def test_the_longest_names_still_make_a_folder_that_can_be_deployed(
    base: str, kept: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(tmp_path))
    config = TrainConfig(name="练" * 33 + "x", base_model=base, dataset="d")
    record = TrainRecord(
        id=f"{config.name}_20261122_ab12", config=config, run_id="run", base=base, base_path=tmp_path / "base"
    )
    name = trained_model(record).name
    assert name == f"{kept}_{record.id}"
    deployed = f"{name}_s_ab12_d_ab12_bnb-4bit"
    assert TypeAdapter(ModelName).validate_python(deployed) == deployed
    (tmp_path / f".{deployed}.0123456789abcdef").mkdir()
