"""The commands that keep the best checkpoint of a train and save an earlier one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.flows.command_line import printed, read_json, tuneline
from tests.flows.tiny_trains import installation, train_file

pytestmark = pytest.mark.lifecycle


def test_a_train_keeps_its_best_step_and_an_earlier_checkpoint_is_saved(tmp_path: Path) -> None:
    with installation(tmp_path) as settings:
        home = settings.root
        hyper = {"evaluation_steps": 2, "keep_best": "eval_loss", "keep_checkpoints": 9}
        file = train_file(tmp_path, "steps", hyper=hyper, validation_dataset=str(tmp_path / "validation.jsonl"))
        text = printed(tuneline("train", file, home=home, cwd=tmp_path, seconds=600))
        assert "best_step" in text
        shown = read_json(tuneline("trains", "show", "steps", "--json", home=home, cwd=tmp_path, seconds=600))
        assert [each["step"] for each in shown["checkpoints"]] == [2, 4, 6]
        assert [each["step"] for each in shown["checkpoints"] if each["best"]] == [shown["outcome"]["best_step"]]
        assert "--checkpoint STEP" in printed(tuneline("trains", "show", "steps", home=home, cwd=tmp_path, seconds=600))
        unknown = tuneline("save", "steps", "--checkpoint", "3", home=home, cwd=tmp_path, seconds=600)
        assert unknown.returncode != 0
        assert "one of 2, 4, 6, last, best" in unknown.stderr
        saved = printed(tuneline("save", "steps", "--checkpoint", "4", home=home, cwd=tmp_path, seconds=600))
        assert "_step4_s_" in saved
        models = read_json(tuneline("models", "list", "--json", home=home, cwd=tmp_path, seconds=600))["mine"]
        stages = {model["stage"]: model["step"] for model in models if model["from_checkpoint"]}
        assert stages == {"customized": 4, "complete": 4}, json.dumps(models)
