"""The target `custom`: a deploying file of twenty lines, run as the contract says."""

from __future__ import annotations

import sys
from pathlib import Path

import openai
import pytest

from configs.endpoints import Probe
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings
from tasks import endpoints
from tests.tiny_models import greedy_answer, make_tiny_adapter, make_tiny_chat_model, prompt_tokens

QUESTION = [{"role": "user", "content": "switch the light on"}]

DEPLOYING = """
import json, sys
sys.path.insert(0, {root!r})
from http.server import ThreadingHTTPServer
from pathlib import Path
from methods import contract
from tests.serving.tiny_answers import Answering, handler

job = contract.Job(Path(sys.argv[1]))
given = job.inputs
base = Path(given.get("model") or given["base_model"])
adapters = {{given["name"]: Path(given["adapter"])}} if "adapter" in given else {{}}
answering = Answering(base, base, adapters)
routes = {{
    "GET /health": lambda _: (200, {{}}),
    "POST /v1/chat/completions": lambda asked: answering.chat(asked, given["name"] if adapters else ""),
}}
if {tokenize}:
    routes["POST /tokenize"] = lambda asked: (200, {{"tokens": answering.tokens(asked["messages"])}})
ThreadingHTTPServer((given["host"], given["port"]), handler(routes)).serve_forever()
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("custom")
    model = make_tiny_chat_model(root / "model", seed=1)
    return model, make_tiny_adapter(root / "adapter", model, seed=2)


def probe_of(models: tuple[Path, Path], adapter: bool, answer: str | None = None) -> Probe:
    known = answer if answer is not None else greedy_answer(models[0], QUESTION, 8, models[1] if adapter else None)
    return Probe(messages=QUESTION, prompt_token_ids=prompt_tokens(models[0], QUESTION), answer=known, max_new_tokens=8)


@pytest.mark.parametrize(("adapter", "tokenize", "compared"), [(False, True, "tokens"), (True, False, "counts")])
def test_a_deploying_file_serves_what_was_trained(
    models: tuple[Path, Path], tmp_path: Path, adapter: bool, tokenize: bool, compared: str
) -> None:
    program = tmp_path / "deploying.py"
    program.write_text(DEPLOYING.format(root=str(PROJECT_ROOT), tokenize=tokenize))
    settings, probe = Settings(home=tmp_path / "home"), probe_of(models, adapter)
    endpoint = endpoints.deploy(
        "own", "lights", models[adapter], probes=[probe], target="custom", program=program, python=sys.executable,
        settings=settings,
    )  # fmt: skip
    try:
        current = endpoint.current_deployment
        assert current is not None
        assert current.verification is not None
        assert current.verification.prompts_compared == compared
        client = openai.OpenAI(base_url=endpoint.address, api_key="none needed", max_retries=0)
        said = client.chat.completions.create(model="own", messages=QUESTION, temperature=0, max_tokens=8)
        assert (said.choices[0].message.content or "").strip() == str(probe.answer).strip()
    finally:
        endpoints.undeploy("own", settings=settings)


def test_a_server_that_answers_otherwise_is_not_switched_to(models: tuple[Path, Path], tmp_path: Path) -> None:
    program = tmp_path / "deploying.py"
    program.write_text(DEPLOYING.format(root=str(PROJECT_ROOT), tokenize=True))
    settings = Settings(home=tmp_path / "home")
    with pytest.raises(UserError, match="greedy answer is another one"):
        endpoints.deploy(
            "own", "lights", models[0], probes=[probe_of(models, False, "never said")], target="custom",
            program=program, python=sys.executable, settings=settings,
        )  # fmt: skip
    assert endpoints.load_endpoint("own", settings=settings).current is None


def test_a_file_that_ends_at_once_is_told_with_its_last_words(models: tuple[Path, Path], tmp_path: Path) -> None:
    program = tmp_path / "deploying.py"
    program.write_text("import sys; sys.exit('no such engine here')")
    settings = Settings(home=tmp_path / "home")
    with pytest.raises(UserError, match="no such engine here"):
        endpoints.deploy(
            "own", "lights", models[0], probes=[probe_of(models, False)], target="custom", program=program,
            python=sys.executable, settings=settings,
        )  # fmt: skip
