"""The target ollama, against a server with Ollama's documented HTTP interface and a tiny model's real answers.

We have had no Ollama to run: `tests.ollama` has the interface. The converter is a stand-in that writes real GGUF files.
Each deployment renders prompts in a process of its own, seconds each: most of these run in `make test-targets`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from configs.endpoints import Deployment, Probe
from configs.errors import UserError
from tasks import endpoints, target_ollama
from tests.ollama import Ollama
from tests.stand_ins import LlamaCppStandIn, llama_cpp
from tests.tiny_models import greedy_answer, prompt_tokens

QUESTION = [{"role": "user", "content": "switch the light on"}]
WITH_SYSTEM = [{"role": "system", "content": "be short"}, *QUESTION]
TOKENS = 8


@dataclass
class Served:
    """An Ollama server, the tiny model, the probes."""

    ollama: Ollama
    model: Path
    probes: list[Probe]
    programs: LlamaCppStandIn

    def deploy(self, **options: object) -> Deployment:
        given = {"endpoint": "lights", "model_name": "m", "target": "ollama", **options}
        record = endpoints.deploy(model_path=self.model, probes=self.probes, **given)  # type: ignore[arg-type]
        deployment = record.current_deployment
        assert deployment is not None
        return deployment


def answering(model: Path) -> Callable[[str, int], tuple[list[int], str]]:
    """The model's greedy answers to prompts that are given as text."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, weights = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)

    def answer(text: str, longest: int) -> tuple[list[int], str]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        inputs = torch.tensor([ids])
        with torch.no_grad():
            made = weights.generate(
                input_ids=inputs, attention_mask=torch.ones_like(inputs), do_sample=False, max_new_tokens=longest
            )
        return ids, str(tokenizer.decode(made[0, len(ids) :], skip_special_tokens=True))

    return answer


@pytest.fixture(scope="module")
def answer(tiny_model: Path) -> Callable[[str, int], tuple[list[int], str]]:
    return answering(tiny_model)


@pytest.fixture(scope="module")
def probes(tiny_model: Path) -> list[Probe]:
    return [
        Probe(
            messages=messages,
            prompt_token_ids=prompt_tokens(tiny_model, messages),
            answer=greedy_answer(tiny_model, messages, TOKENS),
            max_new_tokens=TOKENS,
        )
        for messages in (QUESTION, WITH_SYSTEM)
    ]


@pytest.fixture
def served(
    tiny_model: Path,
    answer: Callable[[str, int], tuple[list[int], str]],
    probes: list[Probe],
    tmp_path: Path,
    home: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Served]:
    ollama = Ollama(answer)
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{ollama.port}")
    monkeypatch.setenv("TUNELINE_LLAMA_CPP", str(tmp_path / "llama.cpp"))
    yield Served(ollama, tiny_model, probes, llama_cpp(tmp_path / "llama.cpp"))
    for status in endpoints.list_endpoints():
        endpoints.undeploy(status.name)
    ollama.end()


def test_a_model_is_uploaded_by_digest_created_and_answers(served: Served) -> None:
    deployment = served.deploy()
    made = served.ollama.models[deployment.model]
    assert made["files"] == {f"{deployment.model}.gguf": next(iter(served.ollama.blobs))}
    assert made["parameters"] == {"num_ctx": 512, "stop": ["<|im_end|>"]}
    assert "quantize" not in made
    assert "system" not in made
    assert served.ollama.prompts[1] == (
        "<|im_start|>system\nbe short<|im_end|>\n"
        "<|im_start|>user\nswitch the light on<|im_end|>\n<|im_start|>assistant\n"
    )
    assert deployment.verification is not None
    assert deployment.verification.prompts_compared == "counts"
    assert (deployment.verification.prompts_checked, deployment.verification.answers_checked) == (2, 2)

    record = endpoints.load_endpoint("lights")
    client = openai.OpenAI(base_url=record.address, api_key="none", max_retries=0)
    asked = {"model": "lights", "messages": QUESTION, "temperature": 0, "max_tokens": TOKENS}
    answer = client.chat.completions.create(**asked)  # type: ignore[call-overload]
    assert answer.choices[0].message.content == served.probes[0].answer
    stream = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    pieces = [chunk.choices[0].delta.content for chunk in stream]
    assert "".join(pieces) == served.probes[0].answer
    assert endpoints.endpoint_status("lights").state == "up"


@pytest.mark.targets
@pytest.mark.parametrize("quantization", ["q8_0", "q4_K_M", "q4_K_S"])
def test_ollama_quantises_and_the_name_says_it(served: Served, tmp_path: Path, quantization: str) -> None:
    shutil.copytree(served.model, tmp_path / "bf16")
    config = json.loads((tmp_path / "bf16" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "bf16" / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}), encoding="utf-8")
    served.model = tmp_path / "bf16"

    deployment = served.deploy(quantization=quantization)

    assert deployment.model.endswith(f"_{quantization}")
    assert served.ollama.models[deployment.model]["quantize"] == quantization
    assert deployment.verification is not None
    assert deployment.verification.answers_same == 2
    # Older versions of Ollama quantise no bfloat16; unquantised it goes as it is.
    argv = served.programs.converter.started["argv"]
    assert argv[argv.index("--outtype") + 1] == "f32"
    served.deploy()
    argv = served.programs.converter.started["argv"]
    assert argv[argv.index("--outtype") + 1] == "bf16"


@pytest.mark.targets
def test_the_system_message_that_a_template_puts_in_is_the_models(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.model, tmp_path / "named")
    template = (served.model / "chat_template.jinja").read_text(encoding="utf-8")
    system = "<|im_start|>system\nyou switch the light<|im_end|>\n"
    opening = f"{{% if messages[0]['role'] != 'system' %}}{{{{ {system!r} }}}}{{% endif %}}"
    (tmp_path / "named" / "chat_template.jinja").write_text(opening + template, encoding="utf-8")
    served.model = tmp_path / "named"
    served.probes = [
        Probe(
            messages=messages,
            prompt_token_ids=prompt_tokens(served.model, messages),
            answer=greedy_answer(served.model, messages, TOKENS),
            max_new_tokens=TOKENS,
        )
        for messages in (QUESTION, WITH_SYSTEM)
    ]

    deployment = served.deploy()

    assert served.ollama.models[deployment.model]["system"] == "you switch the light"
    assert served.ollama.prompts[0].startswith("<|im_start|>system\nyou switch the light<|im_end|>\n")
    assert served.ollama.prompts[1].startswith("<|im_start|>system\nbe short<|im_end|>\n")


@pytest.mark.targets
def test_going_back_and_undeploying_leave_only_what_is_served(served: Served) -> None:
    first = served.deploy()
    second = served.deploy()
    assert set(served.ollama.models) == {second.model}
    assert endpoints.roll_back("lights").current == first.model
    assert set(served.ollama.models) == {first.model}
    endpoints.undeploy("lights")
    assert served.ollama.models == {}
    assert served.ollama.blobs == {}


@pytest.mark.targets
def test_a_file_that_is_there_is_not_uploaded_again(served: Served) -> None:
    deployment = served.deploy()
    (digest,) = served.ollama.blobs
    del served.ollama.models[deployment.model]  # somebody deleted it there; the file is still there
    served.ollama.asked.clear()
    assert endpoints.endpoint_status("lights").state == "model down"
    endpoints.restart("lights")
    assert ("HEAD", f"/api/blobs/{digest}") in served.ollama.asked
    assert ("POST", f"/api/blobs/{digest}") not in served.ollama.asked
    assert endpoints.endpoint_status("lights").state == "up"


def test_an_error_within_the_stream_of_create_is_told_and_leaves_the_one_before(served: Served) -> None:
    first = served.deploy()
    served.ollama.fails_to_create = "no space left on device"
    with pytest.raises(UserError, match="no space left on device"):
        served.deploy()
    assert set(served.ollama.models) == {first.model}
    assert endpoints.endpoint_status("lights").state == "up"


@pytest.mark.targets
def test_another_answer_is_refused_and_its_model_deleted_there(served: Served) -> None:
    served.ollama.answer = lambda text, longest: (answer_tokens(served, text), "something else")
    with pytest.raises(UserError, match="greedy answer is another one"):
        served.deploy()
    assert served.ollama.models == {}


@pytest.mark.targets
def test_another_number_of_prompt_tokens_is_refused(served: Served) -> None:
    answer = served.ollama.answer
    served.ollama.answer = lambda text, longest: ([*answer(text, longest)[0], 1], answer(text, longest)[1])
    with pytest.raises(UserError, match="prompt tokens"):
        served.deploy()


def answer_tokens(served: Served, text: str) -> list[int]:
    return next(probe.prompt_token_ids for probe in served.probes if probe.messages[-1]["content"] in text)


@pytest.mark.targets
def test_a_server_that_is_away_is_told_and_the_model_there_is_deleted_later(served: Served) -> None:
    deployment = served.deploy()
    port = served.ollama.port
    served.ollama.end()
    assert endpoints.endpoint_status("lights").state == "model down"
    with pytest.raises(UserError, match="does not answer") as refused:
        endpoints.undeploy("lights")
    assert deployment.model in str(refused.value)
    with pytest.raises(UserError, match="no Ollama server answers"):
        served.deploy()
    again = Ollama(served.ollama.answer, port)
    again.models = served.ollama.models
    again.blobs = served.ollama.blobs
    endpoints.undeploy("lights")
    assert again.models == {}
    again.end()
    served.ollama = Ollama(served.ollama.answer)


@pytest.mark.targets
def test_a_name_in_another_script_becomes_one_that_ollama_takes(served: Served) -> None:
    deployment = served.deploy(model_name="灯光")
    (name,) = served.ollama.models
    assert name.startswith("tuneline-")
    assert name.endswith(deployment.model.rpartition("_d_")[2])
    record = endpoints.load_endpoint("lights")
    client = openai.OpenAI(base_url=record.address, api_key="none", max_retries=0)
    for called in ("lights", deployment.model):
        answer = client.chat.completions.create(
            model=called,
            messages=QUESTION,  # type: ignore[arg-type]
            temperature=0,
            max_tokens=TOKENS,
        )
        assert answer.choices[0].message.content == served.probes[0].answer


@pytest.mark.targets
def test_a_template_that_go_cannot_write_is_refused_before_anything_is_uploaded(served: Served, tmp_path: Path) -> None:
    shutil.copytree(served.model, tmp_path / "odd")
    template = "{{ messages | length }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    (tmp_path / "odd" / "chat_template.jinja").write_text(template, encoding="utf-8")
    served.model = tmp_path / "odd"
    with pytest.raises(UserError, match="cannot be written as one of Ollama's"):
        served.deploy()
    assert served.ollama.blobs == {}


@pytest.mark.parametrize(
    ("told", "address"),
    [
        ("", "http://127.0.0.1:11434"),
        ("gpu-host", "http://gpu-host:11434"),
        ("0.0.0.0:8000", "http://127.0.0.1:8000"),
        ("https://ollama.lan", "https://ollama.lan:443"),
        ("[::1]:9000", "http://[::1]:9000"),
    ],
)
def test_the_address_is_read_as_ollamas_own_programs_read_it(
    monkeypatch: pytest.MonkeyPatch, told: str, address: str
) -> None:
    monkeypatch.setenv("OLLAMA_HOST", told)
    assert target_ollama.server_address() == address


@pytest.mark.parametrize("told", ["host:port", "ftp://host", "http://user:secret@host", "http://host/path"])
def test_what_is_no_address_is_refused(monkeypatch: pytest.MonkeyPatch, told: str) -> None:
    monkeypatch.setenv("OLLAMA_HOST", told)
    with pytest.raises(UserError, match="no address"):
        target_ollama.server_address()
