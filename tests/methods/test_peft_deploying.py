"""The method's own chat server: whole answers and streams, what it refuses, and a prompt that it serves."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from configs.endpoints import GREEDY_SETTINGS, Probe
from configs.settings import Settings
from methods.peft import deploying
from methods.registry import find_method
from methods.toolkit import chat, generating, json_server, models
from tasks import endpoints
from tests.methods.test_peft_training import RATES
from tests.methods.training_bench import Bench
from tests.tool_models import HERMES, TOOL

QUESTION = [{"role": "user", "content": "switch the light in the hall on"}]


@pytest.fixture(scope="module")
def served(tiny_model: Path, tiny_rows: Path, tmp_path_factory: pytest.TempPathFactory) -> deploying.ChatModel:
    """The server's inside with a prompt that changes the answers; not trained, but no less there."""
    bench = Bench("peft", tiny_model, tiny_rows, tmp_path_factory.mktemp("served"))
    model = bench.build(technique="prompt_tuning", num_virtual_tokens=4).model.eval()
    model.config.use_cache = True
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))
    return deploying.ChatModel("m", model, tokenizer)


def ask(served: deploying.ChatModel, **fields: Any) -> json_server.Body:
    answer = served.complete({"messages": QUESTION, "temperature": 0, "max_tokens": 12, **fields})
    assert isinstance(answer, dict)
    return answer


def streamed(served: deploying.ChatModel, **fields: Any) -> list[json_server.Body]:
    answer = served.complete({"messages": QUESTION, "temperature": 0, "max_tokens": 12, "stream": True, **fields})
    assert isinstance(answer, Iterator)
    return list(answer)


def text_of(events: list[json_server.Body]) -> str:
    return "".join(event["choices"][0]["delta"].get("content", "") for event in events if event["choices"])


def test_a_greedy_answer_is_the_models_own_with_its_prompt(served: deploying.ChatModel, tiny_model: Path) -> None:
    prompt = chat.render_prompt(served.tokenizer, QUESTION)
    expected = generating.generate(served.model, served.tokenizer, [prompt], generating.Sampling(12))[0]
    answer = ask(served)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    assert answer["choices"][0]["finish_reason"] == ("length" if expected.hit_limit else "stop")
    assert answer["usage"]["prompt_tokens"] == len(prompt)
    assert answer["usage"]["total_tokens"] == len(prompt) + expected.tokens
    assert answer["model"] == "m"
    base = models.load_with_adapter(str(tiny_model), None, "float32")
    assert generating.generate(base, served.tokenizer, [prompt], generating.Sampling(12))[0].text != expected.text


def test_a_request_gets_the_published_settings_that_it_does_not_name(served: deploying.ChatModel) -> None:
    plain = ask(served)["choices"][0]["message"]["content"]
    config = served.model.get_base_model().generation_config
    first = served.tokenizer(plain)["input_ids"][0]
    published = {"do_sample": True, "temperature": 0.6, "top_p": 0.8, "top_k": 1, "suppress_tokens": [first]}
    with generating.replaced_config(served.model, GenerationConfig(**{**config.to_diff_dict(), **published})):
        own = deploying.ChatModel("m", served.model, served.tokenizer, GREEDY_SETTINGS)
        bent = ask(own)["choices"][0]["message"]["content"]
        assert bent != plain
        assert text_of(streamed(own)).strip() == bent
        assert ask(own, temperature=None)["choices"][0]["message"]["content"] == bent  # top_k 1 leaves one token
    assert served.model.get_base_model().generation_config is config


def test_a_stream_gives_the_same_answer_in_pieces(served: deploying.ChatModel) -> None:
    whole = ask(served)
    events = streamed(served, stream_options={"include_usage": True})
    assert text_of(events).strip() == whole["choices"][0]["message"]["content"]
    assert sum(bool(event["choices"] and event["choices"][0]["delta"].get("content")) for event in events) > 1
    assert events[0]["choices"][0]["delta"]["role"] == "assistant"
    assert events[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert events[-1]["usage"] == whole["usage"]
    assert len({event["id"] for event in events}) == 1


def test_a_stream_that_is_closed_early_lets_the_next_request_in(served: deploying.ChatModel) -> None:
    events = served.complete({"messages": QUESTION, "temperature": 0, "max_tokens": 400, "stream": True})
    assert not isinstance(events, dict)
    next(events)
    next(events)
    events.close()
    assert ask(served)["choices"][0]["message"]["content"]


def test_a_seed_repeats_a_drawn_answer(served: deploying.ChatModel) -> None:
    drawn = [ask(served, temperature=1.5, seed=seed)["choices"][0]["message"]["content"] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_newer_name_of_the_limit_counts_and_parts_of_text_are_joined(served: deploying.ChatModel) -> None:
    assert ask(served, max_completion_tokens=3)["usage"]["completion_tokens"] <= 3
    parts = [{"type": "text", "text": "switch the light in "}, {"type": "text", "text": "the hall on"}]
    found = served.tokenize({"messages": [{"role": "user", "content": parts}]})
    assert found["tokens"] == chat.render_prompt(served.tokenizer, QUESTION)
    assert found["count"] == len(found["tokens"])


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hello"}, "messages", "at least one message"),
        ({"messages": [{"role": "user"}]}, "messages", "is text"),
        ({"messages": [{"content": "x"}]}, "messages", "role and content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "is text"),
        ({"messages": [{"role": "user", "content": "on " * 600}]}, "messages", "512 positions"),
        ({"n": 2}, "n", "not offered"),
        ({"tools": [{"type": "function"}]}, "tools", "each with a name"),
        ({"tools": [TOOL]}, "messages", "shows no tools"),
        ({"tools": [TOOL], "stream": True}, "stream", "not offered here with tools"),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "messages", "arguments as JSON text"),
        ({"stop": ["."]}, "stop", "not offered"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not offered"),
        ({"max_tokens": 0}, "max_tokens", "int from 1"),
        ({"max_tokens": True}, "max_tokens", "int from 1"),
        ({"temperature": -1}, "temperature", "float from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "float from 0 to 2"),
        ({"seed": 1.5}, "seed", "int from 0"),
    ],
)
def test_what_it_cannot_do_is_refused_with_the_field(
    served: deploying.ChatModel, fields: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(json_server.RequestRefused, match=said) as refused:
        ask(served, **fields)
    assert refused.value.field == field


def test_a_call_is_given_as_openai_has_it(served: deploying.ChatModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[int]] = []
    said = 'Well. <tool_call>\n{"name": "weather", "arguments": {"city": "Lima"}}\n</tool_call>'

    def generate(_model: Any, _tokenizer: Any, prompts: list[list[int]], _: Any) -> list[generating.Answer]:
        asked.extend(prompts)
        return [generating.Answer(said, 9, hit_limit=False, marked=said)]

    monkeypatch.setattr(generating, "generate", generate)
    served.tokenizer.chat_template = HERMES
    call = {"id": "a", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    talk = [
        *QUESTION,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]
    choice = ask(served, messages=talk, tools=[TOOL])["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well."
    [made] = choice["message"]["tool_calls"]
    assert made["function"] == {"name": "weather", "arguments": '{"city": "Lima"}'}
    prompt = served.tokenizer.decode(asked[0])
    assert "<tools>" in prompt
    assert '{"name": "weather", "arguments": {"city": "Oslo"}}' in prompt
    assert ask(served, messages=talk)["choices"][0]["message"]["content"] == said  # nobody offered tools


def test_an_answer_ends_where_the_positions_of_the_model_do(served: deploying.ChatModel) -> None:
    long = [{"role": "user", "content": "on" * 230}]
    prompt = len(served.tokenize({"messages": long})["tokens"])
    assert 450 < prompt < 505
    usage = ask(served, messages=long, max_tokens=400)["usage"]
    assert usage["total_tokens"] <= 512 - 4  # four virtual tokens have positions too


@pytest.mark.methods
def test_a_prompt_tuned_model_is_served_behind_the_gateway_and_answers_openais_client(
    tiny_model: Path, tiny_rows: Path, tmp_path: Path
) -> None:
    import openai

    bench = Bench("peft", tiny_model, tiny_rows, tmp_path)
    given = {"technique": "p_tuning", "learning_rate": RATES["p_tuning"], "epochs": 4, "batch_size": 8}
    adapter = bench.train(**given) / "output"
    tokenizer, _ = chat.load_tokenizer(str(adapter))
    model = models.load_with_adapter(str(tiny_model), str(adapter), "float32")
    probes = []
    for stored in json.loads((adapter / "probes.json").read_text(encoding="utf-8"))["probes"]:
        answer = generating.generate(model, tokenizer, [stored["prompt_token_ids"]], generating.Sampling(8))[0]
        probes.append(Probe(**stored, answer=answer.text, max_new_tokens=8))
    method, settings = find_method("peft"), Settings(home=tmp_path / "home")
    endpoint = endpoints.deploy(
        "lights",
        "prompted",
        adapter,
        probes=probes,
        target="custom",
        program=method.stage_file("deploying"),
        python=method.stage_python("deploying"),
        base_path=tiny_model,
        dtype="float32",
        settings=settings,
    )
    try:
        current = endpoint.current_deployment
        assert current is not None
        assert current.verification is not None
        assert (current.verification.prompts_compared, current.verification.answers_checked) == ("tokens", 4)
        client = openai.OpenAI(base_url=endpoint.address, api_key="none needed", max_retries=0)
        asked: Any = {"model": "lights", "messages": probes[0].messages, "temperature": 0, "max_tokens": 8}
        whole = client.chat.completions.create(**asked)
        assert whole.choices[0].message.content == probes[0].answer
        pieces = [
            chunk.choices[0].delta.content or "" for chunk in client.chat.completions.create(**asked, stream=True)
        ]
        assert "".join(pieces).strip() == probes[0].answer
        with pytest.raises(openai.BadRequestError, match="n is not offered here"):
            client.chat.completions.create(**asked, n=2)
    finally:
        endpoints.undeploy("lights", settings=settings)
