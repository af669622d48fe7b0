"""A .txt file, a base model without a chat template, one command: through training and saving to an endpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from configs.settings import PROJECT_ROOT
from tests.flows.command_line import printed, read_json, tuneline
from tests.tiny_models import make_tiny_chat_model

pytestmark = pytest.mark.lifecycle

SAMPLES = PROJECT_ROOT / "configs" / "samples" / "manual_en"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pretrain")
    make_tiny_chat_model(root / "tiny", seed=1)
    (root / "tiny" / "chat_template.jinja").unlink()
    for file in SAMPLES.iterdir():
        shutil.copy(file, root)
    return root


@pytest.mark.timeout(2400)
def test_a_text_file_is_trained_on_saved_deployed_and_gone_on_from(place: Path) -> None:
    home = place / "home"
    content = {
        "name": "manual",
        "method": "Post-pretrain",
        "base_model": str(place / "tiny"),
        "dataset": "train.txt",
        "validation_split": 0.1,
        "evaluation_dataset": "test.txt",
        "through": "deployed",
        "maxSeqLen": 128,
        "Epoch": 2,
        "学习率": 0.005,
        "正则化系数": 0.01,
        "batch_size": 8,
        "dtype": "float32",
    }
    (place / "train.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), encoding="utf-8")
    done = tuneline("train", "train.yaml", home=home, cwd=place, seconds=1500)
    try:
        assert "100 of 100  text" in printed(done)
        record = read_json(tuneline("trains", "show", "manual", "--json", home=home, cwd=place))
        assert record["status"] == "completed"
        assert record["config"]["method"] == "pretrain"
        base, tuned = record["evaluation"]["base"], record["evaluation"]["tuned"]
        assert set(base) == {"perplexity", "bits_per_character", "bits_per_byte"}
        assert all(tuned[name] < base[name] for name in base)
        told = json.loads((home / "trains" / record["id"] / "training" / "rows.json").read_text())
        assert told["train"]["documents"] + told["validation"]["documents"] == 100
        text = "The brine pump of the Orvelle 40"
        again = read_json(tuneline("infer", "manual", text, "--max-new-tokens", "5", "--json", home=home, cwd=place))
        assert again["tokens"] == 5
        shown = tuneline("evaluate", "manual", "--dataset", "test.txt", "--json", home=home, cwd=place, seconds=300)
        assert read_json(shown)["figures"] == pytest.approx(tuned, rel=1e-6)
        assert read_json(tuneline("deployments", "--json", home=home, cwd=place))[0]["name"] == "manual"
        (endpoint,) = home.glob("endpoints/manual/endpoint.json")
        verification = json.loads(endpoint.read_text())["deployments"][-1]["verification"]
        assert (verification["prompts_checked"], verification["answers_checked"]) == (4, 4)
    finally:
        tuneline("undeploy", "manual", home=home, cwd=place)
