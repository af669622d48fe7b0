"""The whole main job on a real small model, in one command: `tuneline demo`.

It runs the file `configs/examples/demo.yaml` (natural language to JSON commands, SmolLM2-135M-Instruct) through every
stage, with no server running, and asks the deployed model one question.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from configs.resolve import resolve_train
from configs.settings import PROJECT_ROOT, load_settings
from flows import cli_trains
from flows.printing import console

if TYPE_CHECKING:
    from configs.endpoints import Endpoint
    from configs.records import TrainRecord

_COMPUTED_GFLOP = 33_000.0
_REST_SECONDS = 210.0
_BUSY_SHARE = 0.8
DEMO_FILE = PROJECT_ROOT / "configs" / "examples" / "demo.yaml"


def run_demo() -> None:
    """Train, score before and after, merge, deploy, ask; print what came out and how to look at it."""
    started = time.monotonic()
    say = console().rule
    say("A base model and a dataset become a deployed model")
    resolved = resolve_train(DEMO_FILE)
    cli_trains.show_configuration(resolved)
    say("How long it takes here")
    _forecast()
    record = cli_trains.start(resolved)
    say("Asking the endpoint")
    with cli_trains.terminal_line("asking"):
        _ask(record)
    say("Look at it")
    _next_steps(record, time.monotonic() - started)


def _forecast() -> None:
    """Say how long the demo will take on this machine, from products that are timed now, and what makes it faster."""
    from tasks.hardware import ask_hardware

    with cli_trains.terminal_line("measuring"):
        found = ask_hardware(Path(sys.executable), speed=True)
    if found is None or found.gflops is None or found.cpu_share is None:
        return
    minutes = round(forecast_seconds(found.gflops, found.cpu_share) / 60)
    print(f"{found.described} computes {found.gflops:.0f} GFLOP/s in float32; dtype auto is {found.auto} on it.")
    print(f"The demo takes about {max(1, minutes)} min here. The time left is shown at every step.")
    faster = ["a GPU"] if found.device == "cpu" else []
    if found.auto != "bfloat16":
        faster.append("a processor with bfloat16 instructions (AVX512-BF16, AMX)")
    if found.cpu_share < _BUSY_SHARE:
        faster.insert(0, f"a quiet machine (now its threads have a core {found.cpu_share:.0%} of the time)")
    if faster:
        print(f"Faster: {'; '.join(faster)}; a second demo, which finds the base model converted.")


def forecast_seconds(gflops: float, cpu_share: float) -> float:
    """Seconds of the whole demo where float32 products run at `gflops` and a thread has a core `cpu_share` of the time.

    From the CPU time of its stages on two AVX2 cores: what training and scoring compute, and the rest, which is loading
    libraries, converting the base model, saving and verifying, and hardly uses a second core.
    """
    return _COMPUTED_GFLOP / gflops + _REST_SECONDS / cpu_share


def _endpoint_of(record: TrainRecord) -> str:
    from tasks.deploying import endpoint_name

    return record.config.endpoint or endpoint_name(record.config.name)


def _ask(record: TrainRecord) -> None:
    from tasks.datasets import find_dataset
    from tasks.endpoints import load_endpoint
    from tasks.evaluation import read_conversations

    endpoint = load_endpoint(_endpoint_of(record))
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
    pages = f"http://{settings.host}:{settings.prefect_port} and http://{settings.host}:{settings.mlflow_port}"
    steps = {
        "up": f"opens the pages of Prefect and MLflow: {pages}",
        f"trains show {record.id}": "everything about this train",
        f"trains copy {record.id} --set learning_rate=5e-4 --run": "the same with one thing changed",
        f"undeploy {_endpoint_of(record)}": "stops the endpoint",
        "down": "closes the pages",
    }
    print(f"The whole job took {seconds // 60:.0f} min {seconds % 60:.0f} s. Everything is recorded:")
    for arguments, meaning in steps.items():
        print(f"  {_program()} {arguments}\n      {meaning}")


def _program() -> str:
    """How this program is called from the working folder."""
    own = Path(sys.executable).with_name("tuneline")
    found = shutil.which("tuneline")
    if found is not None and Path(found).samefile(own):
        return "tuneline"
    return str(own.relative_to(Path.cwd())) if own.is_relative_to(Path.cwd()) else str(own)
