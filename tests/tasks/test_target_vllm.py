"""The target `vllm` up to its exact command, and through a stand-in that takes what vLLM documents (no GPU here)."""

from __future__ import annotations

import json
import shutil
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest

from configs.endpoints import Deployment, Probe
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings
from tasks import endpoints, target_vllm
from tests.tiny_models import greedy_answer, make_tiny_adapter, make_tiny_chat_model, prompt_tokens

QUESTION = [{"role": "user", "content": "switch the light on"}]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("vllm")
    model = make_tiny_chat_model(root / "model", seed=1)
    return model, make_tiny_adapter(root / "adapter", model, seed=2)


@pytest.fixture
def vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment whose `vllm` is the stand-in."""
    program = tmp_path / "vllm-env" / "bin" / "vllm"
    program.parent.mkdir(parents=True)
    program.write_text(
        f"#!{sys.executable}\nimport os, sys\nsys.path.insert(0, {str(PROJECT_ROOT)!r})\n"
        "assert not [name for name in os.environ if name in ('VLLM_API_KEY', 'TUNELINE_ENDPOINT_KEY')]\n"
        "from tests.serving.tiny_answers import main\nmain()\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("TUNELINE_VLLM", str(program.parent.parent))
    monkeypatch.setenv("VLLM_API_KEY", "for another server")
    return program


def deployment(path: Path, **changes: Any) -> Deployment:
    given: dict[str, Any] = {
        "model": "lights_d_ab12",
        "model_name": "lights",
        "model_path": path,
        "target": "vllm",
        "python": Path(sys.executable),
        "port": 8123,
        "log": Path("log"),
        "created_at": datetime.now(UTC),
    }
    return Deployment(**(given | changes))


def test_command_of_a_complete_model(models: tuple[Path, Path], vllm: Path) -> None:
    model, _ = models
    words = target_vllm.command(deployment(model, quantization="fp8", dtype="bfloat16"), model)
    assert words == [
        *(str(vllm), "serve", str(model), "--host", "127.0.0.1", "--port", "8123", "--dtype", "bfloat16"),
        *("--served-model-name", "lights_d_ab12", "--quantization", "fp8"),
    ]


def test_command_of_an_adapter_names_base_and_lora_module(models: tuple[Path, Path], vllm: Path) -> None:
    model, adapter = models
    words = target_vllm.command(deployment(adapter), adapter)
    assert words == [
        *(str(vllm), "serve", str(model), "--host", "127.0.0.1", "--port", "8123", "--dtype", "auto"),
        *("--served-model-name", "lights_d_ab12.base"),
        *("--enable-lora", "--lora-modules", f"lights_d_ab12={adapter}", "--max-lora-rank", "8"),
    ]


def test_environment_is_offline_and_has_no_key_of_another_server(vllm: Path) -> None:
    environment = target_vllm.environment()
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert environment["VLLM_NO_USAGE_STATS"] == "1"
    assert "VLLM_API_KEY" not in environment


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "bias"),
        ({"r": 600}, "r"),
        ({"rank_pattern": {"q_proj": 513}}, "r"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused(
    models: tuple[Path, Path], vllm: Path, tmp_path: Path, changes: dict[str, Any], field: str
) -> None:
    adapter = shutil.copytree(models[1], tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match="tuneline save") as refused:
        target_vllm.check(deployment(adapter))
    assert refused.value.field == field


def test_a_host_without_vllm_says_what_is_missing(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_VLLM", "/nowhere")
    assert "TUNELINE_VLLM" in str(target_vllm.ready())
    with pytest.raises(UserError, match="no vLLM on this host"):
        target_vllm.check(deployment(models[0]))


@pytest.mark.parametrize("which", ["model", "adapter"])
def test_deployed_to_the_stand_in_it_is_verified_and_answers(
    models: tuple[Path, Path], vllm: Path, tmp_path: Path, which: str
) -> None:
    model, adapter = models
    served = model if which == "model" else adapter
    answer = greedy_answer(model, QUESTION, 8, adapter if which == "adapter" else None)
    probe = Probe(messages=QUESTION, prompt_token_ids=prompt_tokens(model, QUESTION), answer=answer, max_new_tokens=8)
    settings = Settings(home=tmp_path / "home")
    endpoint = endpoints.deploy("gpu", "lights", served, probes=[probe], target="vllm", settings=settings)
    try:
        current = endpoint.current_deployment
        assert current is not None
        assert current.verification is not None
        assert (current.verification.prompts_compared, current.verification.answers_checked) == ("tokens", 1)
        client = openai.OpenAI(base_url=endpoint.address, api_key="none needed", max_retries=0)
        said = client.chat.completions.create(model="gpu", messages=QUESTION, temperature=0, max_tokens=8)
        assert (said.choices[0].message.content or "").strip() == answer.strip()
    finally:
        endpoints.undeploy("gpu", settings=settings)
