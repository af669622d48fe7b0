"""The target vllm: the exact command and environment, and the whole way behind the gateway, on a stand-in.

vLLM needs a GPU, which we have not got: `tests.stand_ins.vllm` takes the options and has the routes it documents.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest

from configs.endpoints import API_KEY_VARIABLE, Deployment, Probe
from configs.errors import UserError
from configs.settings import PROJECT_ROOT
from tasks import endpoints, target_vllm
from tasks.model_server import is_alive
from tests.stand_ins import StandIn, vllm

PROBES = [
    Probe(messages=[{"role": "user", "content": "light on"}], prompt_token_ids=[1, 5, 9], answer="it is on now"),
    Probe(messages=[{"role": "user", "content": "light off"}], prompt_token_ids=[1, 5, 8], answer="it is off now"),
]
KEY = "a-key-of-the-tests-0123456789"


def complete_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def adapter(folder: Path, base: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    content = {"peft_type": "LORA", "r": 16, "base_model_name_or_path": str(base), **config}
    (folder / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def deployment(path: Path, **fields: Any) -> Deployment:
    given = {"model": "m_d_1a2b", "model_name": "m", "target": "vllm", "dtype": "bfloat16", "port": 8000, **fields}
    return Deployment(
        model_path=path, python=Path("python"), log=path / "server.log", created_at=datetime.now(UTC), **given
    )


@pytest.fixture
def stand_in(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    monkeypatch.setenv("TUNELINE_VLLM", str(tmp_path / "vllm"))
    monkeypatch.setenv("VLLM_API_KEY", "of-another-server")
    return vllm(tmp_path / "vllm")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return complete_model(tmp_path / "models" / "base")


@pytest.fixture
def undeployed(home: Path) -> Iterator[None]:
    yield
    for status in endpoints.list_endpoints():
        endpoints.undeploy(status.name)


def test_a_complete_model_is_served_under_its_deployed_name(stand_in: StandIn, base: Path) -> None:
    program = str(stand_in.folder / "vllm")
    expected = [program, "serve", str(base), "--host", "127.0.0.1", "--port", "8000", "--dtype", "bfloat16"]
    expected += ["--served-model-name", "m_d_1a2b"]
    assert target_vllm.command(deployment(base), base) == expected
    quantised = deployment(base, quantization="fp8")
    assert target_vllm.command(quantised, base) == [*expected, "--quantization", "fp8"]


@pytest.mark.parametrize(
    ("config", "rank"),
    [
        ({"r": 4}, 8),
        ({"r": 16}, 16),
        ({"r": 17}, 32),
        ({"r": 8, "rank_pattern": {"q_proj": 65}}, 128),
        ({"r": 512}, 512),
    ],
)
def test_an_adapter_is_a_lora_module_of_its_base(
    stand_in: StandIn, base: Path, tmp_path: Path, config: dict[str, Any], rank: int
) -> None:
    path = adapter(tmp_path / "adapter", base, **config)
    target_vllm.check(deployment(path))
    words = target_vllm.command(deployment(path), path)
    assert words[1:3] == ["serve", str(base)]
    assert words[9:] == [
        *("--served-model-name", "m_d_1a2b.base", "--enable-lora", "--lora-modules", f"m_d_1a2b={path}"),
        *("--max-lora-rank", str(rank)),
    ]
    (path / "tokenizer_config.json").write_text("{}", encoding="utf-8")
    assert target_vllm.command(deployment(path), path)[-2:] == ["--tokenizer", str(path)]


def test_a_float32_base_under_an_adapter_is_held_in_16_bits(stand_in: StandIn, base: Path, tmp_path: Path) -> None:
    path = adapter(tmp_path / "adapter", base)
    words = target_vllm.command(deployment(path, dtype="float32"), path)
    assert words[words.index("--dtype") + 1] == "auto"
    words = target_vllm.command(deployment(base, dtype="float32"), base)
    assert words[words.index("--dtype") + 1] == "float32"


@pytest.mark.parametrize(
    ("config", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 1024}, "r"),
    ],
)
def test_an_adapter_that_vllm_cannot_serve_is_refused(
    stand_in: StandIn, base: Path, tmp_path: Path, config: dict[str, Any], field: str
) -> None:
    path = adapter(tmp_path / "adapter", base, **config)
    with pytest.raises(UserError) as refused:
        target_vllm.check(deployment(path))
    assert refused.value.field == field
    assert "tuneline save" in str(refused.value)


def test_without_vllm_it_is_told_how_to_get_it(home: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TUNELINE_VLLM", raising=False)
    assert "TUNELINE_VLLM" in str(target_vllm.ready())
    monkeypatch.setenv("TUNELINE_VLLM", str(base))
    with pytest.raises(UserError, match=r"bin/vllm"):
        target_vllm.check(deployment(base))


def test_the_environment_has_no_key_and_asks_nobody(stand_in: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")
    monkeypatch.setenv("TUNELINE_ENDPOINT_GPUS", "2,3")
    environment = target_vllm.environment()
    assert not {"VLLM_API_KEY", API_KEY_VARIABLE, "VLLM_ALLOW_RUNTIME_LORA_UPDATING", "PYTHONPATH"} & set(environment)
    assert environment["HF_HUB_OFFLINE"] == environment["VLLM_NO_USAGE_STATS"] == "1"
    assert environment["CUDA_VISIBLE_DEVICES"] == "2,3"


def test_an_adapter_goes_behind_the_gateway_and_back(
    stand_in: StandIn, base: Path, tmp_path: Path, undeployed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in.knows(PROBES)
    first = endpoints.deploy("lights", "plain", base, probes=PROBES, target="vllm").current
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    path = adapter(tmp_path / "adapter", base)
    record = endpoints.deploy("lights", "tuned", path, probes=PROBES, target="vllm", quantization="bitsandbytes")

    assert record.current is not None
    assert record.current.startswith("tuned_d_")
    assert record.current.endswith("_bitsandbytes")
    assert stand_in.started["argv"][-2:] == ["--quantization", "bitsandbytes"]
    assert KEY not in json.dumps(stand_in.started)
    deployed = record.current_deployment
    assert deployed is not None
    assert deployed.verification is not None
    assert (deployed.verification.prompts_checked, deployed.verification.prompts_compared) == (2, "tokens")
    assert deployed.verification.answers_same == 2

    client = openai.OpenAI(base_url=record.address, api_key=KEY, max_retries=0)
    asked: Any = {"model": "lights", "messages": PROBES[0].messages, "temperature": 0}
    assert client.chat.completions.create(**asked).choices[0].message.content == "it is on now"
    pieces = [chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)]
    assert "".join(pieces).strip() == "it is on now"
    assert len(pieces) > 1
    last = stand_in.asked[-1]
    assert last["body"]["model"] == record.current
    assert "authorization" not in last["headers"]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=record.address, api_key="wrong", max_retries=0).chat.completions.create(**asked)
    with pytest.raises(openai.NotFoundError):  # the base below the adapter is nobody's to ask
        client.chat.completions.create(**{**asked, "model": f"{record.current}.base"})

    assert endpoints.roll_back("lights").current == first
    assert endpoints.endpoint_status("lights").state == "up"


def test_other_prompt_tokens_leave_the_deployment_before_up(stand_in: StandIn, base: Path, undeployed: None) -> None:
    stand_in.knows(PROBES)
    first = endpoints.deploy("lights", "plain", base, probes=PROBES, target="vllm").current
    stand_in.knows(PROBES, {"tokens": [1, 7, 9]})
    with pytest.raises(UserError, match="other prompt tokens"):
        endpoints.deploy("lights", "plain", base, probes=PROBES, target="vllm")
    status = endpoints.endpoint_status("lights")
    assert (status.current, status.state) == (first, "up")


@pytest.mark.parametrize("when", ["before the switch", "after it"])
def test_a_server_lives_on_only_if_the_record_keeps_it(
    stand_in: StandIn, base: Path, undeployed: None, when: str
) -> None:
    stand_in.knows(PROBES)
    at_the_proof = "endpoints.verify_answers = lambda *_, **__: os.kill(os.getpid(), 9); "
    program = (
        "import os, sys; from configs.endpoints import Probe; from tasks import endpoints; "
        + (at_the_proof if when == "before the switch" else "")
        + "probes = [Probe.model_validate_json(each) for each in sys.argv[2:]]; "
        "endpoints.deploy('lights', 'plain', sys.argv[1], probes=probes, target='vllm'); os.kill(os.getpid(), 9)"
    )
    words = [sys.executable, "-c", program, str(base), *(probe.model_dump_json() for probe in PROBES)]
    assert subprocess.run(words, cwd=PROJECT_ROOT, check=False, timeout=120).returncode == -9

    (deployment,) = endpoints.load_endpoint("lights").deployments
    if when == "after it":
        assert endpoints.endpoint_status("lights").state == "up"
        return
    deadline = time.monotonic() + 30
    while is_alive(deployment.process):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert endpoints.endpoint_status("lights").state == "undeployed"
