"""A vision-language train through its whole life with the real program: trained, scored, merged, served, asked."""

from __future__ import annotations

import base64
from pathlib import Path

import httpx
import pytest

from configs.settings import PROJECT_ROOT
from methods.vision_language import check
from tests.flows.command_line import printed, read_json, tuneline

pytestmark = [pytest.mark.methods, pytest.mark.timeout(1800)]
EXAMPLE = PROJECT_ROOT / "configs" / "examples" / "vision_language.yaml"
PICTURE = PROJECT_ROOT / "configs" / "samples" / "shapes" / "images" / "blue_circle_5.png"
SEEN = ["tuning=full", "learning_rate=2e-3", "epochs=40"]  # what the example's own words say for the tiny model
GLANCED = ["tuning=lora", "learning_rate=1e-3", "epochs=1"]


@pytest.mark.parametrize("changes", [SEEN, GLANCED], ids=["full", "lora"])
def test_the_example_trains_and_serves_a_model_that_is_asked_about_a_picture(
    changes: list[str], home: Path, tmp_path: Path
) -> None:
    check.main(tmp_path / "tiny")
    values = [f"base_model={tmp_path / 'tiny' / 'base_model'}", "through=deployed", "name=shapes-vision", *changes]
    words = [word for value in values for word in ("--set", value)]
    try:
        printed(tuneline("train", EXAMPLE, *words, home=home, cwd=PROJECT_ROOT, seconds=900))
        (train,) = read_json(tuneline("trains", "list", "--json", home=home, cwd=PROJECT_ROOT))
        (endpoint,) = read_json(tuneline("deployments", "--json", home=home, cwd=PROJECT_ROOT))
        image = "data:image/png;base64," + base64.b64encode(PICTURE.read_bytes()).decode()
        question = [
            {"type": "image_url", "image_url": {"url": image}},
            {"type": "text", "text": "What colour is the circle?"},
        ]
        asked = {"model": endpoint["current"], "messages": [{"role": "user", "content": question}]}
        asked |= {"temperature": 0, "max_tokens": 16}
        answer = httpx.post(f"{endpoint['address']}/chat/completions", json=asked, timeout=60).json()
        words = [train["model"], "What colour is the circle?", "--image", PICTURE, "--max-new-tokens", "16"]
        told = tuneline("infer", *words, home=home, cwd=tmp_path)
        rows = EXAMPLE.parents[1] / "samples" / "shapes" / "test.jsonl"
        asking = ["deployments", "evaluate", "shapes-vision", "--dataset", rows, "--max-new-tokens", "16", "--json"]
        (served,) = read_json(tuneline(*asking, home=home, cwd=PROJECT_ROOT, seconds=300))
        refused = tuneline("infer", train["model"], "What?", "--text", "more", home=home, cwd=tmp_path)
    finally:
        tuneline("undeploy", "shapes-vision", home=home, cwd=PROJECT_ROOT)
    scores = {which: train["evaluation"][which]["accuracy"] for which in ("base", "tuned")}
    print(f"accuracy on 8 pictures that were not trained on: base {scores['base']}, tuned {scores['tuned']}")
    assert scores["base"] == 0
    assert served["accuracy"] == scores["tuned"]
    assert served["failed"] == {}
    if changes == SEEN:
        assert scores["tuned"] >= 7 / 8 * 100
        assert answer["choices"][0]["message"]["content"].strip() == "The circle is blue."
    assert answer["usage"]["prompt_tokens"] > 20
    assert printed(told).strip() == answer["choices"][0]["message"]["content"].strip()
    assert "--image, --system" in refused.stderr
