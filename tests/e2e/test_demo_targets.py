"""The demo's model on two targets: `transformers` as it is, `llama.cpp` with 8 bits. Run by `make test-targets`.

`TUNELINE_DEMO_HOME` names a home in which the demo has run already; by default it runs here, which takes minutes.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.e2e.test_demo import TUNELINE, tuneline

TEST_SPLIT = "configs/samples/commands_en/test.jsonl"
QUESTION = "turn off the lamp in the office at 7:15"


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of an installation whose demo has run."""
    given = os.environ.get("TUNELINE_DEMO_HOME")
    environment = {**os.environ, "TUNELINE_HOME": given or str(tmp_path / "home")}
    if given is None:
        tuneline(environment, "demo")
    yield environment
    for endpoint in ("commands-demo", "commands-q8"):
        subprocess.run([TUNELINE, "undeploy", endpoint], env=environment, capture_output=True, check=False)


def ask(address: str, endpoint: str, *, stream: bool) -> str:
    client = openai.OpenAI(base_url=address, api_key="none needed", max_retries=0)
    asked = {"model": endpoint, "messages": [{"role": "user", "content": QUESTION}], "temperature": 0, "max_tokens": 64}
    if not stream:
        answer = client.chat.completions.create(**asked)  # type: ignore[call-overload]
        return (answer.choices[0].message.content or "").strip()
    chunks = client.chat.completions.create(**asked, stream=True)  # type: ignore[call-overload]
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).strip()


@pytest.mark.targets
@pytest.mark.timeout(7200)
def test_the_demos_model_answers_on_both_targets_and_its_accuracies_stand_side_by_side(demo: dict[str, str]) -> None:
    tuneline(demo, "targets", "install", "llama.cpp")
    tuneline(demo, "deploy", "commands-demo", "--endpoint", "commands-demo", "--target", "transformers")
    told = tuneline(
        demo,
        *("deploy", "commands-demo", "--endpoint", "commands-q8", "--target", "llama.cpp", "--quantization", "q8_0"),
    )
    assert "_q8_0" in told
    print(told)

    listed = {each["name"]: each for each in json.loads(tuneline(demo, "deployments", "--json"))}
    for name in ("commands-demo", "commands-q8"):
        assert listed[name]["state"] == "up"
        answer = ask(listed[name]["address"], name, stream=False)
        assert json.loads(answer) == [{"device": "light", "room": "office", "action": "off", "time": "07:15"}], name
        assert ask(listed[name]["address"], name, stream=True) == answer

    compared = ("deployments", "evaluate", "commands-demo", "commands-q8", "--dataset", TEST_SPLIT)
    print(tuneline(demo, *compared, "--max-new-tokens", "64"))
    scores = {each["endpoint"]: each for each in json.loads(tuneline(demo, *compared, "--samples", "20", "--json"))}
    assert scores["commands-demo"]["accuracy"] >= 80
    assert scores["commands-q8"]["accuracy"] >= scores["commands-demo"]["accuracy"] - 10
