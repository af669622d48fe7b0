"""The server that deploying files answer with: what clients see, whatever they send, and how it ends."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from methods import contract
from methods.toolkit import json_server
from tasks.stages import StageJob
from tests.methods.stage_jobs import open_job, wait_for


class Server:
    """`serve` in a thread, with routes that show what it does with them."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        inputs = {"name": "m", "host": "127.0.0.1", "port": self.port}
        job = StageJob(stage="deploying", parameters={}, inputs=inputs, output=folder / "output", seed=0)
        self.job: contract.Job = open_job(folder, job)
        self.closed: list[str] = []
        self.release = threading.Event()
        routes: dict[str, json_server.Route] = {
            "/echo": lambda body: {"got": body},
            "/refuse": self.refuse,
            "/break": self.fail,
            "/stream": self.stream,
            "/slow": self.slow,
        }
        self.thread = threading.Thread(target=json_server.serve, args=(self.job, routes), daemon=True)
        self.thread.start()
        assert wait_for(self.listens, 10)

    def listens(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def refuse(self, body: json_server.Body) -> json_server.Body:
        raise json_server.RequestRefused("no", "input")

    def fail(self, body: json_server.Body) -> json_server.Body:
        raise ValueError("broken")

    def stream(self, body: json_server.Body) -> Any:
        try:
            if body.get("refused"):
                raise json_server.RequestRefused("no stream", "refused")
            for number in range(body["count"]):
                if number == body.get("broken_at"):
                    raise ValueError("broken half-way")
                yield {"number": number, "text": "灯" * body.get("width", 1)}
        finally:
            self.closed.append("closed")

    def slow(self, body: json_server.Body) -> json_server.Body:
        self.release.wait(20)
        return {"done": True}

    def ask(self, method: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, str, str]:
        """Status, content type and text of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()

    def post(self, path: str, content: object) -> tuple[int, Any]:
        status, _, text = self.ask("POST", path, json.dumps(content).encode())
        return status, json.loads(text)

    def stop(self) -> None:
        self.job.cancelled = True  # what SIGTERM does
        self.release.set()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    running = Server(tmp_path)
    yield running
    running.stop()
    assert not running.listens()


def test_a_route_gets_the_object_and_its_answer_is_sent(server: Server) -> None:
    assert server.post("/echo", {"text": "Licht an 灯"}) == (200, {"got": {"text": "Licht an 灯"}})


def test_health_and_the_model_are_told(server: Server) -> None:
    assert server.ask("GET", "/health")[0] == 200
    models = json.loads(server.ask("GET", "/v1/models")[2])
    assert [each["id"] for each in models["data"]] == ["m"]


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "said"),
    [
        ("GET", "/nothing", None, 404, "there is no /nothing here"),
        ("POST", "/nothing", b"{}", 404, "there is no /nothing here"),
        ("GET", "/echo", None, 405, "takes POST"),
        ("POST", "/echo", b"{", 400, "not valid JSON"),
        ("POST", "/echo", b"\xff\xfe\x00", 400, "not valid JSON"),
        ("POST", "/echo", b"[1]", 400, "not a JSON object"),
        ("POST", "/refuse", b"{}", 400, "no"),
        ("POST", "/break", b"{}", 500, "ValueError: broken"),
        ("POST", "/stream", b'{"refused": true}', 400, "no stream"),
    ],
)
def test_what_cannot_be_answered_is_an_error_of_openais_form(
    server: Server, method: str, path: str, body: bytes | None, status: int, said: str
) -> None:
    found, _, text = server.ask(method, path, body)
    error = json.loads(text)["error"]
    assert (found, said in error["message"]) == (status, True), error
    assert error["type"] == ("server_error" if status == 500 else "invalid_request_error")
    assert server.post("/echo", {})[0] == 200  # and it goes on answering


def test_the_field_at_fault_is_named(server: Server) -> None:
    assert server.post("/refuse", {})[1]["error"]["param"] == "input"


def test_a_body_without_length_or_too_long_is_refused_unread(server: Server) -> None:
    assert server.ask("POST", "/echo", None, **{"Transfer-Encoding": "chunked"})[0] == 411
    too_long = str(json_server.LARGEST_BODY + 1)
    assert server.ask("POST", "/echo", None, **{"Content-Length": too_long})[0] == 413


def test_a_stream_is_sent_event_by_event_and_marked_as_ended(server: Server) -> None:
    status, kind, text = server.ask("POST", "/stream", b'{"count": 3}')
    assert (status, kind) == (200, "text/event-stream")
    events = text.split("\n\n")
    assert [json.loads(event.removeprefix("data: "))["number"] for event in events[:3]] == [0, 1, 2]
    assert events[3:] == ["data: [DONE]", ""]


def test_what_breaks_in_a_stream_is_told_in_it(server: Server) -> None:
    events = server.ask("POST", "/stream", b'{"count": 3, "broken_at": 1}')[2].split("\n\n")
    assert json.loads(events[1].removeprefix("data: "))["error"]["message"] == "ValueError: broken half-way"
    assert "data: [DONE]" not in events


def test_a_stream_whose_client_goes_is_closed(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        body = b'{"count": 100000, "width": 2000}'
        head = f"POST /stream HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        client.recv(100)
    assert wait_for(lambda: bool(server.closed), 20)


def test_requests_under_way_are_finished_when_it_is_stopped(server: Server) -> None:
    answers: list[tuple[int, Any]] = []
    asking = threading.Thread(target=lambda: answers.append(server.post("/slow", {})))
    asking.start()
    time.sleep(0.3)
    server.job.cancelled = True
    assert wait_for(lambda: not server.listens(), 10)
    assert not answers
    server.release.set()
    asking.join(10)
    assert answers == [(200, {"done": True})]
