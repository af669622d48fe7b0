"""The whole main job on a real small model, in one command: `tuneline demo`.

It runs the file `configs/examples/demo.yaml` (natural language to JSON commands, SmolLM2-135M-Instruct) through every
stage, with no server running, and asks the deployed model one question.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from configs.resolve import resolve_train
from configs.settings import PROJECT_ROOT, load_settings
from flows import cli_trains
from flows.printing import console

if TYPE_CHECKING:
    from configs.endpoints import Endpoint
    from configs.records import TrainRecord

DEMO_FILE = PROJECT_ROOT / "configs" / "examples" / "demo.yaml"


def run_demo() -> None:
    """Train, score before and after, merge, deploy, ask; print what came out and how to look at it."""
    started = time.monotonic()
    say = console().rule
    say("A base model and a dataset become a deployed model")
    resolved = resolve_train(DEMO_FILE)
    cli_trains.show_configuration(resolved)
    record = cli_trains.start(resolved)
    say("Asking the endpoint")
    _ask(record)
    say("Look at it")
    _next_steps(record, time.monotonic() - started)


def _ask(record: TrainRecord) -> None:
    from tasks.datasets import find_dataset
    from tasks.deploying import endpoint_name
    from tasks.endpoints import load_endpoint
    from tasks.evaluation import read_conversations

    endpoint = load_endpoint(record.config.endpoint or endpoint_name(record.config.name))
    question = read_conversations(find_dataset(str(record.evaluation_dataset)).path, 1)[0][0]["content"]
    print(f"POST {endpoint.address}/chat/completions")
    print(f"  you:   {question}")
    print(f"  model: {_answer(endpoint, question)}")


def _answer(endpoint: Endpoint, question: str) -> str:
    import httpx

    body = {
        "model": endpoint.name,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 128,
    }
    response = httpx.post(f"{endpoint.address}/chat/completions", json=body, timeout=300, trust_env=False)
    response.raise_for_status()
    answer: str = response.json()["choices"][0]["message"]["content"]
    return answer


def _next_steps(record: TrainRecord, seconds: float) -> None:
    settings = load_settings()
    endpoint = record.config.endpoint or record.config.name
    print(f"The whole job took {seconds // 60:.0f} min {seconds % 60:.0f} s. Everything is recorded:")
    print(f"  .venv/bin/tuneline up                     # Prefect: http://{settings.host}:{settings.prefect_port}")
    print(f"                                            # MLflow:  http://{settings.host}:{settings.mlflow_port}")
    print(f"  .venv/bin/tuneline trains show {record.id}")
    print(f"  .venv/bin/tuneline trains copy {record.id} --set learning_rate=5e-4 --run")
    print(f"  .venv/bin/tuneline undeploy {endpoint}     # stop the endpoint")
    print("  .venv/bin/tuneline down                   # stop the pages")
