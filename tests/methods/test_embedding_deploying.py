"""The embeddings route of OpenAI's interface: forms, sizes, refusals; and a trained model behind the gateway."""

from __future__ import annotations

import base64
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.endpoints import API_KEY_VARIABLE, RequestProbe
from configs.settings import Settings
from methods.embedding import deploying
from methods.embedding.check import make_tiny_encoder
from methods.registry import find_method
from methods.toolkit import json_server
from tasks import endpoints
from tests.method_environments import method_python
from tests.methods.test_embedding import Bench

KEY = "a key that is long enough"


class Counting:
    """Stands for a model: the vector of a text is its length and its number of words, and the prompt's with it."""

    prompts = {"query": "q: ", "document": ""}  # noqa: RUF012
    max_seq_length = 3

    def get_embedding_dimension(self) -> int:
        return 3

    def encode(self, texts: list[str], **_: Any) -> torch.Tensor:
        return torch.tensor([[3.0 * len(text.split()), 4.0 * len(text.split()), float(len(text))] for text in texts])

    def encode_query(self, texts: list[str], **named: Any) -> torch.Tensor:
        return self.encode([self.prompts["query"] + text for text in texts], **named)

    encode_document = encode

    def tokenizer(self, texts: list[str], *, truncation: bool, max_length: int) -> dict[str, list[list[int]]]:
        assert truncation
        return {"input_ids": [list(range(len(text.split())))[:max_length] for text in texts]}


@pytest.fixture
def served() -> deploying.EmbeddingModel:
    return deploying.EmbeddingModel("m", Counting())


def test_several_texts_become_vectors_in_their_order(served: deploying.EmbeddingModel) -> None:
    answer = served.embed({"input": ["one two", "one", "one two three four"]})
    assert [each["index"] for each in answer["data"]] == [0, 1, 2]
    assert [each["embedding"] for each in answer["data"]] == [[6, 8, 7], [3, 4, 3], [12, 16, 18]]
    assert answer["usage"] == {"prompt_tokens": 6, "total_tokens": 6}  # of the last text the model reads three
    assert (answer["model"], answer["object"], answer["data"][0]["object"]) == ("m", "list", "embedding")
    assert served.embed({"input": "one"})["data"][0]["embedding"] == [3, 4, 3]


def test_base64_holds_the_same_numbers_as_floats_of_32_bits(served: deploying.EmbeddingModel) -> None:
    packed = served.embed({"input": "one", "encoding_format": "base64"})["data"][0]["embedding"]
    assert struct.unpack("<3f", base64.b64decode(packed)) == (3.0, 4.0, 3.0)


def test_a_cut_vector_has_the_size_asked_for_and_the_length_one(served: deploying.EmbeddingModel) -> None:
    cut = served.embed({"input": ["one two"], "dimensions": 2})["data"][0]["embedding"]
    assert cut == pytest.approx([0.6, 0.8])
    assert served.embed({"input": ["one two"], "dimensions": 3})["data"][0]["embedding"] == [6, 8, 7]


def test_the_prompt_of_a_kind_of_text_is_put_before_it(served: deploying.EmbeddingModel) -> None:
    query = served.embed({"input": "one", "input_type": "query"})
    assert query["data"][0]["embedding"] == [6, 8, 6]
    assert query["usage"]["prompt_tokens"] == 2
    assert served.embed({"input": "one", "input_type": "document"})["data"][0]["embedding"] == [3, 4, 3]


@pytest.mark.parametrize(
    ("fields", "field", "said"),
    [
        ({}, "input", "a text or a list of texts"),
        ({"input": []}, "input", "a text or a list of texts"),
        ({"input": ["a", 1]}, "input", "a text or a list of texts"),
        ({"input": [1, 2, 3]}, "input", "not token ids"),
        ({"input": [[1, 2], [3]]}, "input", "not token ids"),
        ({"input": ["a", ""]}, "input", "is empty"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format", "float or base64"),
        ({"input": "a", "dimensions": 4}, "dimensions", "from 1 to 3"),
        ({"input": "a", "dimensions": True}, "dimensions", "from 1 to 3"),
        ({"input": "a", "dimensions": 0}, "dimensions", "from 1 to 3"),
        ({"input": "a", "input_type": "passage"}, "input_type", "one of query, document"),
    ],
)
def test_what_cannot_be_embedded_is_refused_with_the_field(
    served: deploying.EmbeddingModel, fields: dict[str, Any], field: str, said: str
) -> None:
    with pytest.raises(json_server.RequestRefused, match=said) as refused:
        served.embed(fields)
    assert refused.value.field == field


@pytest.mark.methods
@pytest.mark.parametrize("adapter", [True, False])
def test_a_trained_model_answers_openais_client_behind_the_gateway(
    tmp_path: Path, adapter: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    bench = Bench(method_python("embedding", "embedding"), tmp_path, make_tiny_encoder(tmp_path / "encoder", seed=3))
    trained = bench.training(tuning="lora", max_steps=3, learning_rate=1e-2)
    complete = bench.saving(trained, adapter=True)
    requests = tmp_path / "requests.jsonl"
    texts = ["alarm 1", "replace the pump"]
    requests.write_text('{"texts": ["alarm 1", "replace the pump"]}\n', encoding="utf-8")
    weights = {"base_model": str(bench.base), "adapter": str(trained / "output")}
    asked = bench.inference(weights, requests=str(requests))
    bench.run([("training", trained), ("saving", complete), ("inference_customized", asked)])
    line = (asked / "output" / "predictions.jsonl").read_text(encoding="utf-8")
    probe = RequestProbe.model_validate_json(f'{{"request": {requests.read_text()}, "prediction": {line}}}')
    method, settings = find_method("embedding"), Settings(home=tmp_path / "home")
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    endpoint = endpoints.deploy(
        "alarms",
        "alarms-model",
        (trained if adapter else complete) / "output",
        probes=[probe],
        target="custom",
        program=method.stage_file("deploying"),
        python=bench.python,
        base_path=bench.base if adapter else None,
        dtype="float32",
        settings=settings,
    )
    try:
        current = endpoint.current_deployment
        assert current is not None
        assert current.verification is not None
        assert current.verification.figures["smallest_cosine"] > 0.9999
        client = openai.OpenAI(base_url=endpoint.address, api_key=KEY, max_retries=0)
        expected = torch.tensor(probe.prediction["embeddings"])
        packed = client.embeddings.create(model="alarms", input=texts)  # the client asks for base64 by itself
        plain = client.embeddings.create(model="alarms", input=texts, encoding_format="float")
        for answer in (packed, plain):
            found = torch.tensor([each.embedding for each in answer.data])
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            assert answer.usage.prompt_tokens > 4
        cut = client.embeddings.create(model="alarms", input=texts[0], dimensions=8).data[0].embedding
        assert len(cut) == 8
        assert float(torch.tensor(cut).norm()) == pytest.approx(1, abs=1e-4)
        assert [model.id for model in client.models.list()] == [current.model]
        with pytest.raises(openai.BadRequestError, match="dimensions is a whole number from 1 to 32"):
            client.embeddings.create(model="alarms", input="a", dimensions=33)
        with pytest.raises(openai.NotFoundError):
            client.embeddings.create(model="other", input="a")
        stranger = openai.OpenAI(base_url=endpoint.address, api_key="another key altogether", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            stranger.embeddings.create(model="alarms", input="a")
    finally:
        endpoints.undeploy("alarms", settings=settings)
