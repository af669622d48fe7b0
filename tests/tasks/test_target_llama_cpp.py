"""The target llama.cpp: commands, conversion, what is told and what is left, on stand-ins of its programs.

The programs themselves are built and run by `test_llama_cpp.py` (`make test-targets`).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import openai
import pytest

from configs.endpoints import Deployment, Probe
from configs.errors import UserError
from tasks import endpoints, target_llama_cpp
from tests.stand_ins import LlamaCppStandIn, llama_cpp

PROBES = [
    Probe(messages=[{"role": "user", "content": "light on"}], prompt_token_ids=[1, 5, 9], answer="it is on now"),
    Probe(messages=[{"role": "user", "content": "light off"}], prompt_token_ids=[1, 5, 8], answer="it is off now"),
]


@pytest.fixture
def programs(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LlamaCppStandIn]:
    monkeypatch.setenv("TUNELINE_LLAMA_CPP", str(tmp_path / "llama.cpp"))
    made = llama_cpp(tmp_path / "llama.cpp")
    made.server.knows(PROBES)
    yield made
    for status in endpoints.list_endpoints():
        endpoints.undeploy(status.name)


def model(folder: Path, **config: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}), encoding="utf-8")
    (folder / "model.safetensors").write_bytes(b"0" * 1000)
    return folder


def gguf_files(home: Path) -> list[str]:
    return sorted(file.name for file in home.rglob("*.gguf"))


def deployment(path: Path, **fields: Any) -> Deployment:
    given = {"model": "m_d_1a2b", "model_name": "m", "target": "llama.cpp", "port": 8000, **fields}
    return Deployment(
        model_path=path, python=Path("python"), log=path / "server.log", created_at=datetime.now(UTC), **given
    )


def test_the_server_shows_no_page_and_nothing_of_others(programs: LlamaCppStandIn, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    words = target_llama_cpp.command(deployment(tmp_path), file)
    assert words == [
        *(str(programs.server.folder / "llama-server"), "--model", str(file), "--alias", "m_d_1a2b", "--jinja"),
        *("--offline", "--host", "127.0.0.1", "--port", "8000", "--no-ui", "--no-slots"),
    ]
    assert target_llama_cpp.command(deployment(tmp_path, device="cpu"), file) == [*words, "--device", "none"]


def test_variables_of_other_servers_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "8")
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("OTHER", "kept")
    environment = target_llama_cpp.environment()
    assert not any(name.startswith("LLAMA_") for name in environment)
    assert environment["OTHER"] == "kept"


def test_without_llama_cpp_it_is_told_how_to_build_it(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TUNELINE_LLAMA_CPP", str(tmp_path / "none"))
    assert "tuneline targets install llama.cpp" in str(target_llama_cpp.ready())
    with pytest.raises(UserError, match="not installed") as refused:
        endpoints.deploy("lights", "m", model(tmp_path / "m"), probes=PROBES, target="llama.cpp")
    assert "tuneline targets install llama.cpp" in str(refused.value)


def test_an_adapter_is_refused(programs: LlamaCppStandIn, tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    content = {"peft_type": "LORA", "base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(UserError, match="complete models only") as refused:
        endpoints.deploy("lights", "m", adapter, probes=PROBES, target="llama.cpp")
    assert "tuneline save" in str(refused.value)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        ({"dtype": "float32"}, "f32"),
        ({"torch_dtype": "float16"}, "f16"),
        ({"dtype": "bfloat16"}, "bf16"),
        ({}, "auto"),
    ],
)
def test_weights_keep_their_type(
    programs: LlamaCppStandIn, tmp_path: Path, home: Path, config: dict[str, str], kind: str
) -> None:
    path = model(tmp_path / "m", **config)
    record = endpoints.deploy("lights", "m", path, probes=PROBES, target="llama.cpp")
    argv = programs.converter.started["argv"]
    assert argv[0] == str(path)
    assert argv[3:5] == ["--outtype", kind]
    assert gguf_files(home) == [f"{record.current}.gguf"]


def test_quantised_answers_are_counted_and_the_name_says_it(
    programs: LlamaCppStandIn, tmp_path: Path, home: Path
) -> None:
    path = model(tmp_path / "m")
    programs.server.knows(PROBES, {"answer": "another one"})
    record = endpoints.deploy("lights", "m", path, probes=PROBES, target="llama.cpp", quantization="q4_K_M")

    assert str(record.current).endswith("_q4_K_M")
    assert programs.quantiser.started["argv"][2] == "Q4_K_M"
    deployed = record.current_deployment
    assert deployed is not None
    assert deployed.verification is not None
    assert (deployed.verification.prompts_checked, deployed.verification.answers_checked) == (2, 0)
    assert deployed.verification.answers_same == 0
    assert deployed.notes == ["3 of 9 tensors have no shape for q4_K_M and keep more bits"]
    assert gguf_files(home) == [f"{record.current}.gguf"]
    client = openai.OpenAI(base_url=record.address, api_key="none", max_retries=0)
    answer = client.chat.completions.create(model="lights", messages=PROBES[0].messages)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == "another one"


def test_going_back_converts_nothing_again(programs: LlamaCppStandIn, tmp_path: Path) -> None:
    path = model(tmp_path / "m")
    first = endpoints.deploy("lights", "m", path, probes=PROBES, target="llama.cpp", quantization="q8_0").current
    second = endpoints.deploy("lights", "m", path, probes=PROBES, target="llama.cpp").current
    (programs.converter.folder / "convert_hf_to_gguf.py").unlink()
    assert endpoints.roll_back("lights").current == first
    assert endpoints.roll_back("lights", to=second).current == second
    assert endpoints.endpoint_status("lights").state == "up"


def test_a_model_that_cannot_be_converted_is_told_with_the_log_and_leaves_no_file(
    programs: LlamaCppStandIn, tmp_path: Path, home: Path
) -> None:
    with pytest.raises(UserError, match="Model architecture is not supported") as refused:
        endpoints.deploy("lights", "m", model(tmp_path / "m", model_type="new"), probes=PROBES, target="llama.cpp")
    assert "target transformers" in str(refused.value)
    assert gguf_files(home) == []


def test_a_model_that_fails_its_proof_leaves_no_file_and_the_one_before_up(
    programs: LlamaCppStandIn, tmp_path: Path, home: Path
) -> None:
    path = model(tmp_path / "m")
    first = endpoints.deploy("lights", "m", path, probes=PROBES, target="llama.cpp").current
    programs.server.knows(PROBES, {"tokens": [1, 5]})
    with pytest.raises(UserError, match="other prompt tokens"):
        endpoints.deploy("lights", "m", path, probes=PROBES, target="llama.cpp")
    status = endpoints.endpoint_status("lights")
    assert (status.current, status.state) == (first, "up")
    assert gguf_files(home) == [f"{first}.gguf"]


def test_too_little_space_is_told_before_anything_is_converted(
    programs: LlamaCppStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = model(tmp_path / "m", dtype="float32")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr("tasks.gguf_files.shutil.disk_usage", lambda _: usage._replace(free=1999))
    with pytest.raises(UserError, match="too little space"):
        endpoints.deploy("lights", "m", path, probes=PROBES, target="llama.cpp", quantization="q8_0")
    assert not (programs.converter.folder / "started.json").exists()
    endpoints.deploy("lights", "m", path, probes=PROBES, target="llama.cpp")  # unquantised, 1000 bytes are enough


def test_a_quantisation_of_another_target_is_refused(programs: LlamaCppStandIn, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot quantise so") as refused:
        endpoints.deploy(
            "lights", "m", model(tmp_path / "m"), probes=PROBES, target="llama.cpp", quantization="bnb-4bit"
        )
    assert "q8_0, q4_K_M, q4_K_S" in str(refused.value)
