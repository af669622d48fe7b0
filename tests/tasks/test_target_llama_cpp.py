"""The target `llama.cpp`, built once on this host and really run; `make test-targets`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from configs.endpoints import Probe, Quantization
from configs.errors import UserError
from configs.settings import Settings
from tasks import endpoints, llama_cpp
from tests.tiny_models import greedy_answer, make_tiny_adapter, make_tiny_chat_model, prompt_tokens

pytestmark = pytest.mark.targets

QUESTION = [{"role": "user", "content": "switch the light on"}]
TOKENS = 8


@pytest.fixture(scope="module")
def built() -> llama_cpp.LlamaCpp:
    """llama.cpp of this host; minutes of compiling the first time."""
    return llama_cpp.install(say=lambda text: print(text, file=sys.stderr))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_chat_model(tmp_path_factory.mktemp("llama") / "model", seed=1)


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Settings]:
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    yield settings
    endpoints.undeploy("edge", settings=settings)


def probe_of(model: Path) -> Probe:
    answer = greedy_answer(model, QUESTION, TOKENS)
    return Probe(
        messages=QUESTION, prompt_token_ids=prompt_tokens(model, QUESTION), answer=answer, max_new_tokens=TOKENS
    )


def test_it_is_built_once_and_found_afterwards(built: llama_cpp.LlamaCpp) -> None:
    assert built.server.is_file()
    assert built.quantiser.is_file()
    assert built.converter.is_file()
    assert llama_cpp.installed() == built
    said: list[str] = []
    assert llama_cpp.install(say=said.append) == built
    assert said == []


@pytest.mark.parametrize("quantization", [None, "q8_0", "q4_K_M", "q4_K_S"])
def test_each_quantisation_is_served_under_a_name_that_tells_it(
    built: llama_cpp.LlamaCpp, model: Path, settings: Settings, quantization: Quantization | None
) -> None:
    probe = probe_of(model)
    endpoint = endpoints.deploy(
        "edge", "lights", model, probes=[probe], target="llama.cpp", quantization=quantization, settings=settings
    )
    current = endpoint.current_deployment
    assert current is not None
    assert current.verification is not None
    assert current.verification.prompts_compared == "tokens"
    if quantization is None:
        assert current.verification.answers_checked == 1
    else:
        assert current.model.endswith(f"_{quantization}")
        assert current.verification.answers_checked == 0
        assert current.verification.answers_same is not None
    client = openai.OpenAI(base_url=endpoint.address, api_key="none needed", max_retries=0)
    whole = client.chat.completions.create(model="edge", messages=QUESTION, temperature=0, max_tokens=TOKENS)
    said = whole.choices[0].message.content or ""
    if quantization is None:
        assert said.strip() == str(probe.answer).strip()
    stream = client.chat.completions.create(
        model="edge", messages=QUESTION, temperature=0, max_tokens=TOKENS, stream=True
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices) == said


def test_rollback_serves_the_unquantised_one_again(settings: Settings, model: Path) -> None:
    before = endpoints.load_endpoint("edge", settings=settings)
    first = before.deployments[0].model
    endpoint = endpoints.roll_back("edge", to=first, settings=settings)
    assert endpoint.current == first
    client = openai.OpenAI(base_url=endpoint.address, api_key="none needed", max_retries=0)
    said = client.chat.completions.create(model="edge", messages=QUESTION, temperature=0, max_tokens=TOKENS)
    assert (said.choices[0].message.content or "").strip() == greedy_answer(model, QUESTION, TOKENS).strip()


def test_an_adapter_is_refused_with_the_command_that_completes_it(
    built: llama_cpp.LlamaCpp, model: Path, settings: Settings, tmp_path: Path
) -> None:
    adapter = make_tiny_adapter(tmp_path / "adapter", model, seed=2)
    current = endpoints.load_endpoint("edge", settings=settings).current
    with pytest.raises(UserError, match="tuneline save"):
        endpoints.deploy("edge", "lights", adapter, probes=[probe_of(model)], target="llama.cpp", settings=settings)
    assert endpoints.load_endpoint("edge", settings=settings).current == current
