"""Endpoints on the real thing: `transformers serve` behind the gateway, tiny models, the OpenAI client.

A server takes seconds to start, so one endpoint ("chat") is shared; every test leaves it up, with the same
model current.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai
import psutil
import pytest

from configs.endpoints import API_KEY_VARIABLE, Endpoint, Probe
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings
from tasks import endpoints
from tests.tiny_models import greedy_answer, make_tiny_adapter, make_tiny_chat_model, prompt_tokens

QUESTION = [{"role": "user", "content": "switch the light on"}]
TOKENS = 12
KEY = "a-key-of-the-tests-0123456789"


@dataclass
class Served:
    """The shared endpoint: model A behind it, an adapter on A beside it, and what each answers."""

    settings: Settings
    model: Path
    adapter: Path
    probe: Probe
    adapter_probe: Probe

    @property
    def record(self) -> Endpoint:
        return endpoints.load_endpoint("chat", settings=self.settings)

    def client(self, key: str = "none needed") -> openai.OpenAI:
        return openai.OpenAI(base_url=self.record.address, api_key=key, max_retries=0)


def servers_of(settings: Settings, name: str) -> list[psutil.Process]:
    """Every process whose command line names the endpoint's folder."""
    folder = str(settings.endpoints / name)
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        running = process.info["status"] != psutil.STATUS_ZOMBIE
        if running and any(folder in part for part in process.info["cmdline"] or []):
            found.append(process)
    return found


def deploy_in_another_process(settings: Settings, name: str, model: Path, probe: Probe) -> subprocess.Popen[bytes]:
    """`deploy` as a process of its own, which can end or be killed."""
    program = (
        "import sys; from configs.endpoints import Probe; from configs.settings import Settings; "
        "from tasks.endpoints import deploy; home, name, model, probe = sys.argv[1:]; "
        "deploy(name, 'tiny', model, probes=[Probe.model_validate_json(probe)], settings=Settings(home=home))"
    )
    arguments = [str(settings.home), name, str(model), probe.model_dump_json()]
    return subprocess.Popen([sys.executable, "-c", program, *arguments], cwd=PROJECT_ROOT)


def wait_for(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def ask(client: openai.OpenAI, model: str = "chat") -> str:
    answer = client.chat.completions.create(model=model, messages=QUESTION, temperature=0, max_tokens=TOKENS)
    return answer.choices[0].message.content or ""


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("endpoints")
    model = make_tiny_chat_model(root / "model", seed=1)
    adapter = make_tiny_adapter(root / "adapter", model, seed=2)
    probe = Probe(
        messages=QUESTION,
        prompt_token_ids=prompt_tokens(model, QUESTION),
        answer=greedy_answer(model, QUESTION, TOKENS),
        max_new_tokens=TOKENS,
    )
    other = probe.model_copy(update={"answer": greedy_answer(model, QUESTION, TOKENS, adapter)})
    assert other.answer != probe.answer
    settings = Settings(home=root / "home")
    assert deploy_in_another_process(settings, "chat", model, probe).wait(120) == 0
    yield Served(settings, model, adapter, probe, other)
    endpoints.undeploy("chat", settings=settings)
    assert servers_of(settings, "chat") == []


def test_an_endpoint_outlives_the_process_that_deployed_it(served: Served) -> None:
    status = endpoints.endpoint_status("chat", settings=served.settings)
    assert status.state == "up"
    assert len(servers_of(served.settings, "chat")) == 2
    assert httpx.get(f"{served.record.address}/models", trust_env=False).is_success
    deployment = served.record.current_deployment
    assert deployment is not None
    assert deployment.verification is not None
    assert (deployment.verification.prompts_checked, deployment.verification.answers_checked) == (1, 1)


def test_openai_client_gets_the_models_own_answer_streamed_and_not(served: Served) -> None:
    client, deployed = served.client(), served.record.current
    assert deployed is not None
    assert ask(client) == served.probe.answer
    assert ask(client, deployed) == served.probe.answer
    stream = client.chat.completions.create(
        model="chat", messages=QUESTION, temperature=0, max_tokens=TOKENS, stream=True
    )
    pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
    assert "".join(piece for piece in pieces if piece) == served.probe.answer
    assert sum(bool(piece) for piece in pieces) > 1


def test_models_are_listed_by_deployed_name_and_show_no_path(served: Served) -> None:
    listing = httpx.get(f"{served.record.address}/models", trust_env=False)
    assert [each["id"] for each in listing.json()["data"]] == [served.record.current]
    assert str(served.model.parent) not in listing.text
    assert served.client().models.retrieve("chat").id == served.record.current


def test_another_model_name_is_an_openai_404_that_names_the_right_ones(served: Served) -> None:
    with pytest.raises(openai.NotFoundError, match=str(served.record.current)) as error:
        ask(served.client(), "gpt-4o")
    assert error.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        served.client().models.retrieve("gpt-4o")


@pytest.mark.parametrize("content", [b"not JSON", b"[]", b'{"messages": []}'], ids=["not JSON", "list", "no model"])
def test_a_request_without_model_is_an_openai_400(served: Served, content: bytes) -> None:
    answer = httpx.post(f"{served.record.address}/chat/completions", content=content, trust_env=False)
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize("path", ["/reset", "/load_model", "/v1/%2e%2e/reset"])
def test_the_servers_own_administration_is_not_reachable(served: Served, path: str) -> None:
    address = str(served.record.address).removesuffix("/v1")
    assert httpx.post(address + path, json={"model": "chat"}, trust_env=False).status_code in (404, 405)


def test_switch_and_roll_back_keep_the_address_and_fail_no_request(served: Served) -> None:
    before = served.record
    client, answers, failures, done = served.client(), [], [], threading.Event()

    def keep_asking() -> None:
        while not done.is_set():
            try:
                answers.append(ask(client))
            except openai.OpenAIError as error:
                failures.append(error)

    asking = threading.Thread(target=keep_asking)
    asking.start()
    try:
        switched = endpoints.deploy(
            "chat", "tuned", served.adapter, probes=[served.adapter_probe], settings=served.settings
        )
        assert wait_for(lambda: bool(answers) and answers[-1] == served.adapter_probe.answer, 10)
        assert len(servers_of(served.settings, "chat")) == 2
        rolled_back = endpoints.roll_back("chat", settings=served.settings)
        assert wait_for(lambda: answers[-1] == served.probe.answer, 10)
    finally:
        done.set()
        asking.join()
    assert failures == []
    assert set(answers) == {served.probe.answer, served.adapter_probe.answer}
    assert before.address == switched.address == rolled_back.address
    assert switched.current is not None
    assert switched.current.startswith("tuned_d_")
    assert rolled_back.current == before.current
    assert len(servers_of(served.settings, "chat")) == 2
    with pytest.raises(UserError, match="no earlier deployment"):
        endpoints.roll_back("chat", settings=served.settings)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"answer": "something else"}, "greedy answer is another one"),
        ({"prompt_token_ids": [0, 1, 2]}, "renders other prompt tokens than were trained on"),
    ],
    ids=["answer", "prompt tokens"],
)
def test_failed_verification_leaves_the_first_deployment_up(
    served: Served, wrong: dict[str, object], told: str
) -> None:
    before = served.record
    probes = [served.probe, served.probe.model_copy(update=wrong)]
    with pytest.raises(UserError, match=told) as error:
        endpoints.deploy("chat", "wrong", served.model, probes=probes, settings=served.settings)
    assert "probe 2 of 2" in str(error.value)
    assert served.record.current == before.current
    assert ask(served.client()) == served.probe.answer
    assert len(servers_of(served.settings, "chat")) == 2
    failed = served.record.deployments[-1]
    assert failed.state == "failed"
    assert told in str(failed.failure)
    assert "Uvicorn running" in endpoints.endpoint_log("chat", model=failed.model, settings=served.settings)


def test_a_server_that_cannot_start_is_told_with_the_end_of_its_log(served: Served, tmp_path: Path) -> None:
    for file in served.model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match=r"ended with exit code 1(.|\n)*Error"):
        endpoints.deploy("broken", "tiny", tmp_path, probes=[served.probe], settings=served.settings)
    assert endpoints.endpoint_status("broken", settings=served.settings).state == "undeployed"
    assert endpoints.load_endpoint("broken", settings=served.settings).address is None
    assert servers_of(served.settings, "broken") == []


def test_a_server_that_takes_too_long_is_stopped(served: Served) -> None:
    with pytest.raises(UserError, match=r"not healthy within 0.5 s; it was stopped"):
        endpoints.deploy(
            "slow", "tiny", served.model, probes=[served.probe], settings=served.settings, start_timeout=0.5
        )
    assert servers_of(served.settings, "slow") == []


def test_a_model_with_a_chinese_name_is_served_by_that_name(served: Served, tmp_path: Path) -> None:
    name = "base_训练_20261122_ab12"
    model = shutil.copytree(served.model, tmp_path / name)
    deployed = endpoints.deploy("zh", name, model, probes=[served.probe], settings=served.settings)
    try:
        assert str(deployed.current).startswith(f"{name}_d_")
        client = openai.OpenAI(base_url=deployed.address, api_key="none needed", max_retries=0)
        assert client.models.retrieve(str(deployed.current)).id == deployed.current
        assert [each.id for each in client.models.list()] == [deployed.current]
        for asked in ("zh", str(deployed.current)):
            assert ask(client, asked) == served.probe.answer
        stream = client.chat.completions.create(
            model=str(deployed.current), messages=QUESTION, temperature=0, max_tokens=TOKENS, stream=True
        )
        pieces = [chunk.choices[0].delta.content for chunk in stream if chunk.choices]
        assert "".join(piece for piece in pieces if piece) == served.probe.answer
        with pytest.raises(openai.NotFoundError, match="训练"):
            ask(client, "另一个模型")
    finally:
        endpoints.undeploy("zh", settings=served.settings)
    assert servers_of(served.settings, "zh") == []


@pytest.mark.parametrize("last_started", ["serve_model.py", "tasks.gateway"])
def test_killed_deploy_leaves_nothing_running(served: Served, last_started: str) -> None:
    name = "killed-" + last_started.partition(".")[0].replace("_", "-")
    deploying = deploy_in_another_process(served.settings, name, served.model, served.probe)

    def started() -> bool:
        commands = [" ".join(each.cmdline()) for each in servers_of(served.settings, name)]
        return any(last_started in command for command in commands)

    assert wait_for(started, 60)
    deploying.kill()
    deploying.wait()
    assert wait_for(lambda: servers_of(served.settings, name) == [], 15)
    swept = endpoints.undeploy(name, settings=served.settings)
    assert [each.state for each in swept.deployments] == ["failed"]
    assert swept.address is None


def test_api_key_is_required_once_set_and_stored_nowhere(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    endpoints.set_api_key("chat", settings=served.settings)
    try:
        assert ask(served.client(KEY)) == served.probe.answer
        for wrong in ("none needed", KEY + "x"):
            with pytest.raises(openai.AuthenticationError):
                ask(served.client(wrong))
            with pytest.raises(openai.AuthenticationError):
                served.client(wrong).models.list()
        assert endpoints.endpoint_status("chat", settings=served.settings).api_key_required
        files = [path for path in served.settings.endpoints.rglob("*") if path.is_file()]
        assert not [path for path in files if KEY.encode() in path.read_bytes()]
    finally:
        monkeypatch.delenv(API_KEY_VARIABLE)
        endpoints.set_api_key("chat", settings=served.settings)
    assert ask(served.client()) == served.probe.answer


def test_undeploy_leaves_no_process_and_roll_back_returns_to_the_same_address(served: Served) -> None:
    before = served.record
    undeployed = endpoints.undeploy("chat", settings=served.settings)
    assert servers_of(served.settings, "chat") == []
    assert undeployed.current is None
    assert endpoints.endpoint_status("chat", settings=served.settings).state == "undeployed"
    assert endpoints.undeploy("chat", settings=served.settings) == undeployed
    again = endpoints.roll_back("chat", settings=served.settings)
    assert (again.current, again.address) == (before.current, before.address)
    assert ask(served.client()) == served.probe.answer


def test_restart_brings_back_a_gateway_that_died(served: Served) -> None:
    gateway = served.record.gateway
    assert gateway is not None
    assert gateway.process is not None
    psutil.Process(gateway.process.pid).kill()
    assert wait_for(lambda: endpoints.endpoint_status("chat", settings=served.settings).state == "gateway down", 5)
    endpoints.restart("chat", settings=served.settings)
    assert [each.state for each in endpoints.list_endpoints(settings=served.settings) if each.name == "chat"] == ["up"]
    assert ask(served.client()) == served.probe.answer


def test_an_address_for_other_hosts_is_refused_without_a_key(served: Served) -> None:
    with pytest.raises(UserError, match="needs an API key"):
        endpoints.deploy(
            "open",
            "tiny",
            served.model,
            probes=[served.probe],
            settings=served.settings,
            host="0.0.0.0",  # noqa: S104
        )
    assert not (served.settings.endpoints / "open" / "endpoint.json").exists()


def test_a_key_that_protects_nothing_is_refused(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "short")
    with pytest.raises(UserError, match="too short") as error:
        endpoints.set_api_key("chat", settings=served.settings)
    assert "'short'" not in str(error.value)


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"endpoint": "../up"}, "not a usable name"),
        ({"model_name": "a/b"}, "not a usable name"),
        ({"model_name": "训" * 67}, "at most 200 bytes"),
        ({"probes": []}, "at least one probe"),
        ({"target": "torchserve"}, "no such deployment target"),
        ({"quantization": "gptq"}, "cannot quantise so"),
        ({"model_path": "/nowhere/at/all"}, "no model folder here"),
        ({"python": "/nowhere/python"}, "no Python interpreter"),
        ({"port": 9}, "kept for good"),
    ],
)
def test_a_mistake_is_told_before_anything_is_started(served: Served, asked: dict[str, object], told: str) -> None:
    before = served.record
    given = {"endpoint": "chat", "model_name": "tiny", "model_path": served.model, "probes": [served.probe]}
    with pytest.raises(UserError, match=told):
        endpoints.deploy(**(given | asked), settings=served.settings)  # type: ignore[arg-type]
    assert served.record == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"base_model_name_or_path": "/nowhere/base"}, "base model of this adapter is not on this host"),
        ({"base_model_name_or_path": None}, "base model of this adapter is not on this host"),
        ({"peft_type": "PROMPT_TUNING"}, r"cannot be served[\s\S]*target custom"),
        ({"peft_type": "ADALORA"}, r"transformers cannot serve an adapter of this kind[\s\S]*tuneline save"),
        ({"use_dora": True}, "transformers cannot serve an adapter of this kind"),
    ],
)
def test_an_adapter_that_cannot_be_served_is_refused(
    served: Served, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    config = json.loads((served.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | change), encoding="utf-8")
    with pytest.raises(UserError, match=told):
        endpoints.deploy("chat", "tuned", tmp_path, probes=[served.probe], settings=served.settings)


def test_an_unknown_endpoint_is_told_with_those_there_are(served: Served) -> None:
    for verb in (endpoints.undeploy, endpoints.roll_back, endpoints.endpoint_status, endpoints.endpoint_log):
        with pytest.raises(UserError, match="there is no endpoint 'nowhere'") as error:
            verb("nowhere", settings=served.settings)  # type: ignore[operator]
        assert "chat" in str(error.value)
    assert not (served.settings.endpoints / "nowhere").exists()
