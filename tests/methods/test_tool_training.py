"""Trains on rows with tools on a tiny model: its answers become calls that can be read, are valid and are right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import openai
import pytest

from configs.endpoints import Probe
from configs.settings import Settings
from methods.sft import inference_complete
from methods.toolkit import probing
from methods.toolkit.tool_parsing import Parsed
from tasks import endpoints
from tasks.asking import ask_endpoint
from tasks.inference import Answer, Generation
from tasks.stages import StageJob
from tasks.tool_scores import tool_figures
from tests.methods.stage_jobs import open_job
from tests.methods.training_bench import Bench
from tests.tiny_models import make_tiny_chat_model
from tests.tool_models import HERMES

pytestmark = pytest.mark.methods

LIGHT: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "light",
        "parameters": {"type": "object", "properties": {"room": {"enum": ["hall", "attic"]}}, "required": ["room"]},
    },
}


def row(number: int) -> dict[str, Any]:
    room = ("hall", "attic")[number % 2]
    call = {"id": "call00001", "type": "function", "function": {"name": "light", "arguments": {"room": room}}}
    asked = {"role": "user", "content": f"{room} please"}
    return {
        "line": number + 1,
        "messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}],
        "tools": [LIGHT],
    }


def make_qwen(base: Path) -> None:
    """Put a Qwen2 of the same size into the place of the Llama: servers read its calls."""
    import torch
    from transformers import AutoConfig, Qwen2Config, Qwen2ForCausalLM

    llama = AutoConfig.from_pretrained(base).to_dict()
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    kept = {name: llama[name] for name in (*names, "vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    torch.manual_seed(1)
    Qwen2ForCausalLM(Qwen2Config(**kept, max_position_embeddings=512)).save_pretrained(base)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a model trained to call the tool."""
    folder = tmp_path_factory.mktemp("tools")
    base = make_tiny_chat_model(folder / "base", seed=1)
    if request.param == "qwen2":
        make_qwen(base)
    (base / "chat_template.jinja").write_text(HERMES, encoding="utf-8")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(json.dumps(row(number)) + "\n" for number in range(8)), encoding="utf-8")
    bench = Bench("sft", base, rows, folder / "jobs")
    job = bench.train(validation=True, tuning="full", epochs=25, batch_size=4, learning_rate=3e-3)
    return job / "output"


def test_answers_become_valid_calls(trained: Path, tmp_path: Path) -> None:
    requests = [
        {"messages": each["messages"][:1], "tools": each["tools"], "reference": each["messages"][1]}
        for each in map(row, range(2))
    ]
    file = tmp_path / "requests.jsonl"
    file.write_text("".join(json.dumps(request) + "\n" for request in requests), encoding="utf-8")
    job = StageJob(
        stage="inference-complete",
        parameters={**Generation(max_new_tokens=80).parameters, "dtype": "float32"},
        inputs={"requests": str(file), "model": str(trained)},
        output=tmp_path / "output",
        seed=1,
    )
    inference_complete.main(open_job(tmp_path, job))
    lines = (tmp_path / "output" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        found = json.loads(line)
        wanted = [{"name": "light", "arguments": {"room": ("hall", "attic")[number]}}]
        assert found["tool_calls"] == wanted
        assert (found["broken_calls"], found["content"]) == (0, "")
        figures = tool_figures(Parsed("", found["tool_calls"]), wanted, [LIGHT])
        assert figures["tool_call_valid"] == figures["tool_arguments_accuracy"] == 100
        assert found["reference_logprob"] > -1


def test_probes_and_samples_have_the_calls(trained: Path) -> None:
    probes = probing.read_probes(trained)
    assert [probe["tools"] for probe in probes] == [[LIGHT]] * 4
    samples = (trained.parent / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(samples[-1])["reference"] == '{"arguments": {"room": "attic"}, "name": "light"}'


def test_the_server_shows_the_tools_and_gives_the_call(trained: Path, tmp_path: Path) -> None:
    [stored, *_] = probing.read_probes(trained)
    said = '<tool_call>\n{"name": "light", "arguments": {"room": "hall"}}\n</tool_call>'
    call = {"name": "light", "arguments": {"room": "hall"}}
    settings = Settings(home=tmp_path / "home")
    probe = Probe(**stored, answer=said, tool_calls=[call], max_new_tokens=80)
    served = endpoints.deploy("chat", "tiny", trained, probes=[probe], settings=settings)
    try:
        assert served.current_deployment is not None
        proof = served.current_deployment.verification
        assert proof is not None
        assert (proof.prompts_checked, proof.prompts_compared, proof.answers_checked) == (1, "tokens", 1)
        client = openai.OpenAI(base_url=str(served.address), api_key="none needed", max_retries=0)
        messages: Any = [{"role": "user", "content": "hall please"}]
        tools: Any = [LIGHT]
        answer = client.chat.completions.create(
            model="chat", messages=messages, tools=tools, temperature=0, max_tokens=80
        ).choices[0]
        generation = Generation(max_new_tokens=80)
        [asked] = ask_endpoint(served, [{"messages": messages, "tools": tools}], generation)
        assert isinstance(asked, Answer)
        assert asked.parsed(tools).calls == [call]
        if json.loads((trained / "config.json").read_text(encoding="utf-8"))["model_type"] == "qwen2":
            assert answer.finish_reason == "tool_calls"
            assert answer.message.tool_calls
            assert json.loads(answer.message.tool_calls[0].function.arguments) == {"room": "hall"}  # type: ignore[union-attr]
        else:  # of a family that the library has no reader for, the call is text
            assert (answer.message.content or "").strip() == said
    finally:
        endpoints.undeploy("chat", settings=settings)
