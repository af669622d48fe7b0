"""Served models that do not chat are proved by embeddings and pictures; and asked from the command line."""

from __future__ import annotations

import base64
import io
import json
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from configs.endpoints import Deployment, RequestProbe
from configs.errors import UserError
from configs.records import ModelRecord
from methods.registry import find_method
from tasks import serving_requests
from tasks.deploying import check_target, collect_probes
from tasks.method_checks import check_method
from tasks.serving_requests import predicted, verify_requests
from tests.own_methods import install_method

VECTORS = [[0.6, 0.8], [1.0, 0.0]]
TEXTS = RequestProbe(request={"texts": ["a", "b"]}, prediction={"embeddings": VECTORS})


class Server:
    """A model server that answers what it was told to, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Any] = {}
        self.asked: dict[str, Any] = {}


@pytest.fixture
def server(tmp_path: Path) -> Iterator[tuple[Server, Deployment]]:
    told = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            told.asked[self.path] = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            body = json.dumps(told.answers[self.path]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    served = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=served.serve_forever, daemon=True).start()
    deployment = Deployment(
        model="m_d_1",
        model_name="m",
        model_path=tmp_path,
        target="custom",
        python=tmp_path,
        server=f"http://127.0.0.1:{served.server_port}",
        log=tmp_path / "server.log",
        created_at=datetime.now(UTC),
    )
    yield told, deployment
    served.shutdown()
    served.server_close()


def embeddings(*vectors: list[float]) -> dict[str, Any]:
    return {"data": [{"embedding": vector} for vector in vectors]}


def test_embeddings_that_point_the_same_way_are_the_same(server: tuple[Server, Deployment]) -> None:
    told, deployment = server
    told.answers["/v1/embeddings"] = embeddings([1.2, 1.6001], [3.0, 0.0])
    proof = verify_requests(deployment, [TEXTS], 10)
    assert told.asked["/v1/embeddings"] == {"model": "m_d_1", "input": ["a", "b"]}
    assert proof.answers_checked == 1
    assert 0.999 < proof.figures["smallest_cosine"] < 1


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (embeddings([0.6, 0.8], [0.9, 0.1]), "other embeddings than the model's own"),
        (embeddings([0.6, 0.8], [0.0, 0.0]), "other embeddings than the model's own"),
        (embeddings([0.6, 0.8]), r"gives other embeddings[\s\S]*\[2, 2\]"),
        (embeddings([0.6, 0.8, 0.0], [1.0, 0.0, 0.0]), "gives other embeddings"),
        ({"embeddings": VECTORS}, "did not answer /v1/embeddings as it should"),
    ],
)
def test_other_embeddings_are_refused(server: tuple[Server, Deployment], answer: dict[str, Any], message: str) -> None:
    told, deployment = server
    told.answers["/v1/embeddings"] = answer
    with pytest.raises(UserError, match=message):
        verify_requests(deployment, [TEXTS], 10)


def packed(colour: str, level: int, size: int = 4) -> str:
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG", compress_level=level)
    return base64.b64encode(file.getvalue()).decode()


def test_a_picture_is_to_be_the_same_however_it_is_packed(server: tuple[Server, Deployment]) -> None:
    told, deployment = server
    request = {"caption": "a boat", "seed": 7, "steps": 2}
    probe = RequestProbe(request=request, prediction={"b64_json": packed("red", 9)})
    for same in (packed("red", 9), packed("red", 0)):
        told.answers["/v1/images/generations"] = {"data": [{"b64_json": same}]}
        assert verify_requests(deployment, [probe], 10).answers_checked == 1
    wanted = {"model": "m_d_1", "prompt": "a boat", "seed": 7, "steps": 2, "n": 1, "response_format": "b64_json"}
    assert told.asked["/v1/images/generations"] == wanted
    for other, message in (
        (packed("blue", 9), "another picture"),
        (packed("red", 9, 5), "another picture"),
        (base64.b64encode(b"no picture").decode(), "is no picture"),
        ("%", "did not answer /v1/images/generations as it should"),
    ):
        told.answers["/v1/images/generations"] = {"data": [{"b64_json": other}]}
        with pytest.raises(UserError, match=message):
            verify_requests(deployment, [probe], 10)


def test_a_request_that_no_server_answers_is_refused(server: tuple[Server, Deployment]) -> None:
    probe = RequestProbe(request={"prompt": [], "answers": []}, prediction={})
    with pytest.raises(UserError, match="no server is known"):
        verify_requests(server[1], [probe], 10)


def test_a_predicted_picture_is_held_in_the_probe(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"picture")
    assert predicted({"image": str(tmp_path / "1.png")}) == {"b64_json": base64.b64encode(b"picture").decode()}
    assert predicted({"embeddings": VECTORS}) == {"embeddings": VECTORS}
    assert serving_requests.cosine([0.0], [1.0]) == 0


# --- through a method ---------------------------------------------------------------------------------------

TRAINING = """
import json
import time
from pathlib import Path
from methods import contract

def main(job):
    Path(job.inputs["train_rows"]).read_text()
    for step in range(1, job.parameters["max_steps"] + 1):
        time.sleep(0.01)
        job.metrics(step, loss=1 / step)
        if job.cancelled or step % job.parameters["checkpoint_steps"] == 0:
            (job.checkpoints / f"checkpoint-{step}").mkdir(parents=True)
            contract.mark_complete(job.checkpoints / f"checkpoint-{step}")
        if job.cancelled:
            raise contract.Cancelled
    (job.output / "weights.txt").write_text("2")
    (job.output / "probes.json").write_text(json.dumps({"probes": [{"request": {"texts": ["on", "off"]}}]}))
    return {"model": str(job.output), "adapter": True}

if __name__ == "__main__":
    contract.run(main)
"""
EMBEDDING = """
import json
from pathlib import Path

def embed(text, weights):
    return [len(text) * float((Path(weights) / "weights.txt").read_text()), 1.0, 0.5]
"""
INFERENCE = """
import json
from pathlib import Path
from embedding import embed
from methods import contract

def main(job):
    weights = job.inputs["adapter"]
    if "evaluation_rows" in job.inputs:
        return {"figures": {"ndcg_at_10": 0.5}}
    asked = [json.loads(line) for line in Path(job.inputs["requests"]).read_text().splitlines()]
    lines = [json.dumps({"embeddings": [embed(text, weights) for text in each["texts"]]}) + "\\n" for each in asked]
    (job.output / "predictions.jsonl").write_text("".join(lines))
    return {}

if __name__ == "__main__":
    contract.run(main)
"""
DEPLOYING = """
import json
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from embedding import embed
from methods import contract

job = contract.Job(Path(sys.argv[1]))
assert Path(job.inputs["base_model"]).is_dir()

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer({"data": [{"embedding": embed(text, job.inputs["adapter"])} for text in asked["input"]]})

    def answer(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

ThreadingHTTPServer((job.inputs["host"], job.inputs["port"]), Handler).serve_forever()
"""
CHECK = """
import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
(folder / "base_model").mkdir()
for name in ("train_rows", "validation_rows"):
    (folder / f"{name}.jsonl").write_text(json.dumps({"line": 1, "anchor": "on", "positive": "lit"}) + "\\n")
(folder / "requests.jsonl").write_text(json.dumps({"texts": ["on", "off", "lit"]}) + "\\n")
(folder / "parameters.json").write_text("{}")
"""


def embedding_method(deploying: str = DEPLOYING) -> Path:
    stages = {name: {"file": f"{name}.py", "environment": "host"} for name in ("training", "deploying")}
    stages["inference-customized"] = {"file": "inference.py", "environment": "host"}
    folder = install_method(
        types=["embedding"],
        lifecycle=["customized", "deployed"],
        stages=stages,
        deployment_targets=["custom"],
    )
    for name, text in {
        "training": TRAINING,
        "deploying": deploying,
        "inference": INFERENCE,
        "embedding": EMBEDDING,
        "check": CHECK,
    }.items():
        (folder / f"{name}.py").write_text(text)
    return folder


def test_an_embedding_method_is_served_and_proved(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_GRACE_SECONDS", "5")
    embedding_method()
    results = {result.check: result for result in check_method(find_method("mine"))}
    wrong = {name: result.detail for name, result in results.items() if result.ok is False}
    assert list(wrong) == ["resuming"]  # it begins anew, which is not what is tested here
    assert results["inference-customized"].detail == "1 requests answered; ndcg_at_10 0.5"
    assert results["deploying"].detail == "1 answers the same, smallest_cosine 1"
    embedding_method(DEPLOYING.replace('embed(text, job.inputs["adapter"])', "[1.0, 0.0, 0.0]"))
    results = {result.check: result for result in check_method(find_method("mine"))}
    assert "other embeddings than the model's own inference stage" in results["deploying"].detail


def test_a_method_says_what_serves_its_models(home: Path) -> None:
    embedding_method()
    method = find_method("mine")
    assert check_target(method, None) == check_target(method, "custom") == "custom"
    with pytest.raises(UserError, match=r"cannot be served so[\s\S]*one of custom"):
        check_target(method, "transformers")
    install_method()
    with pytest.raises(UserError, match="models of the method mine cannot be served\n"):
        check_target(find_method("mine"), None)


def test_probes_of_a_model_that_was_not_trained_here_are_general_ones(home: Path, tmp_path: Path) -> None:
    embedding_method()
    (tmp_path / "weights.txt").write_text("3")
    given: dict[str, Any] = {"name": "b", "line": "b", "base": "b", "method": "mine", "adapter": True}
    record = ModelRecord(stage="customized", path=tmp_path, base_path=tmp_path, **given)
    (probe,) = collect_probes(record, "custom", lambda events: None)
    assert isinstance(probe, RequestProbe)
    assert [len(vector) for vector in probe.prediction["embeddings"]] == [3, 3]
