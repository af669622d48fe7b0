"""A model whose generation_config.json penalises repetition: scored without it, served and proved with it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from configs.endpoints import APPLIED_SETTINGS, Deployment, Endpoint
from tasks import endpoints
from tasks.datasets import add_dataset
from tasks.deploying import deploy_model
from tasks.evaluation import evaluate_and_record
from tasks.inference import Generation, answer_prompts, measured_requests
from tasks.models import find_model
from tasks.serving_settings import settings_notes
from tasks.tracking import mlflow_client

pytestmark = pytest.mark.lifecycle  # whole trains and a real server, a minute and more

PUBLISHED = {"repetition_penalty": 1.3, "do_sample": True, "top_k": 20, "temperature": 0.7}
QUESTIONS = ["switch the light in the kitchen on and off", "is the light on on on?", "off"]
CONVERSATIONS = [[{"role": "user", "content": text}] for text in QUESTIONS]
LIMITED = Generation(max_new_tokens=24)


def publish(folder: Path, **settings: object) -> Path:
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.fixture
def penalised(tiny_model: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model, tmp_path / "penalised")
    return publish(tmp_path / "penalised", **PUBLISHED)


@pytest.fixture
def served(home: Path, penalised: Path) -> Iterator[Endpoint]:
    model = find_model(str(penalised))
    yield deploy_model(model, "penalised", "transformers", None, None)
    endpoints.undeploy("penalised")


def test_greedy_answers_are_those_of_the_weights_alone(home: Path, tiny_model: Path, penalised: Path) -> None:
    plain, own = find_model(str(tiny_model)), find_model(str(penalised))
    expected = [answer.answer for answer in answer_prompts(plain, CONVERSATIONS, LIMITED)]
    asked = [{"messages": messages} for messages in CONVERSATIONS]
    found, how = measured_requests(own, asked, LIMITED)
    assert how is not None
    said = how.generation
    assert [answer["answer"] for answer in found] == expected
    assert said["not_used"] == PUBLISHED
    assert said["settings"]["repetition_penalty"] == 1.0
    assert (said["settings"]["do_sample"], said["settings"]["num_beams"]) == (False, 1)
    as_served = LIMITED.model_copy(update={"model_settings": ("repetition_penalty",)})
    assert [answer.answer for answer in answer_prompts(own, CONVERSATIONS, as_served)] != expected


def test_an_evaluation_records_every_setting_that_counted(home: Path, penalised: Path, tmp_path: Path) -> None:
    rows = [{"prompt": text, "completion": "on"} for text in QUESTIONS]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome = evaluate_and_record(find_model(str(penalised)), add_dataset(tmp_path / "rows.jsonl"), LIMITED)
    run = mlflow_client().get_run(str(outcome.run_id))
    assert run.data.params["repetition_penalty"] == "1.0"
    assert run.data.params["do_sample"] in ("False", "false")
    recorded = json.loads(run.data.tags["tuneline.generation_base"])
    assert recorded == outcome.generation
    assert recorded["not_used"] == PUBLISHED


def test_the_server_gives_the_answers_of_the_probe_and_its_record_names_the_penalty(
    served: Endpoint, penalised: Path
) -> None:
    deployment = served.current_deployment
    assert deployment is not None
    assert deployment.verification is not None
    assert deployment.verification.answers_checked == 2
    assert [note for note in deployment.notes if "repetition_penalty to 1.3: this server applies it" in note]
    body = {"model": served.name, "messages": CONVERSATIONS[0], "temperature": 0, "max_tokens": 24}
    answer = httpx.post(f"{served.address}/chat/completions", json=body, timeout=60, trust_env=False).json()
    as_served = LIMITED.model_copy(update={"model_settings": APPLIED_SETTINGS["transformers"]})
    (expected,) = answer_prompts(find_model(str(penalised)), CONVERSATIONS[:1], as_served)
    assert answer["choices"][0]["message"]["content"].strip() == expected.answer


def test_a_target_that_leaves_the_setting_out_is_named_too(penalised: Path) -> None:
    given = {"model": "m_d_1", "model_name": "m", "model_path": penalised, "python": "/p", "log": "/l"}
    deployment = Deployment.model_validate({**given, "created_at": "2026-01-01T00:00:00Z", "target": "llama.cpp"})
    (note,) = settings_notes(deployment)
    assert "this server does not apply it" in note
    publish(penalised, repetition_penalty=1.0, no_repeat_ngram_size=0)
    assert settings_notes(deployment) == []
