"""The target `custom`: a server of the method's own, its deploying file run in the environment the method names.

The contract: `PYTHON deploying.py JOB_DIR` with `job.json` in that folder (`methods.contract.Job` reads it). Its
`inputs` hold `name` (what requests call the model), `host` and `port` to listen on, and `model`, or `adapter` and
`base_model`; its `parameters` `dtype`, `device` and `model_settings`, the settings of the model's
generation_config.json that the answers to its probes are made with. It answers `GET /health` with 200 once it can
answer requests as OpenAI's API does, and ends on SIGTERM: `POST /v1/chat/completions`, or for models that do not chat
`POST /v1/embeddings` or `POST /v1/images/generations` (`prompt`, `seed`, `response_format: b64_json`, and whatever
else the request of its probe holds). With `POST /tokenize` (`messages` in, `tokens` out) the prompts of a chat are
compared token by token as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from configs.endpoints import APPLIED_SETTINGS, Deployment, Probe
from configs.errors import UserError
from tasks.http_backends import offers, posted_tokens
from tasks.model_folders import base_of_adapter, is_adapter
from tasks.model_server import EndpointWork, guarded, is_alive, server_environment, start_model_server, stop_server
from tasks.remote_code import allowed_digests
from tasks.stages import StageJob, code_of_job, prepare_folder, stage_environment
from tasks.tool_messages import sent

PROMPTS_NEED_SERVER = True
_ENVIRONMENT_OF_STAGES = ("PYTHONPATH",)


def ready() -> str | None:
    """Why this host cannot serve so; None: it can, with a method that has a deploying file."""
    return None


def check(deployment: Deployment) -> None:
    """Refuse what cannot be served, before anything is started. Raises UserError."""
    if not deployment.model_path.is_dir() or not any(deployment.model_path.iterdir()):
        raise UserError("there is no model folder here", file=deployment.model_path)
    if deployment.program is None or not deployment.program.is_file():
        raise UserError(
            "the method of this model has no deploying file",
            field="target",
            value="custom",
            file=deployment.program,
            mend="name one in its method.yaml (stages.deploying), or choose another target",
        )


def prepare(work: EndpointWork, deployment: Deployment) -> Path:
    """The job folder."""
    folder = work.folder / "deployments" / deployment.model / "job"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def start(work: EndpointWork, deployment: Deployment, served: Path, timeout: float) -> None:
    """Start the server and wait until it is healthy. Raises UserError."""

    def command_of_attempt() -> list[str]:
        prepare_folder(served, job(deployment, served))
        return guarded(work, command(deployment, served))

    own = environment() | code_of_job(served, job(deployment, served))
    start_model_server(work, deployment, command_of_attempt, own, served, timeout)


def prompt_tokens(
    deployment: Deployment, served: Path, probes: Sequence[Probe], timeout: float
) -> list[list[int]] | None:
    """Token ids that the server makes of each probe; None if it has no route for it."""
    asked = [{"model": deployment.model, **sent(probe.messages, probe.tools)} for probe in probes]
    if not offers(deployment, "/tokenize", asked[0], timeout):
        return None
    return [posted_tokens(deployment, "/tokenize", each, timeout) for each in asked]


def is_up(deployment: Deployment) -> bool:
    """Whether the server runs."""
    return is_alive(deployment.process)


def stop(deployment: Deployment, grace: float) -> None:
    """End the server; requests under way get `grace` seconds."""
    stop_server(deployment.process, grace=grace)
    deployment.process = None


def command(deployment: Deployment, served: Path) -> list[str]:
    """The command line of the server."""
    return [str(deployment.python), str(deployment.program), str(served)]


def environment() -> dict[str, str]:
    """Environment of the server: that of a stage, on the GPUs that endpoints may use."""
    stage = stage_environment()
    mine = server_environment({name: stage[name] for name in _ENVIRONMENT_OF_STAGES})
    return {name: value for name, value in mine.items() if name in stage or name.startswith("CUDA_")}


def job(deployment: Deployment, served: Path) -> StageJob:
    """What the deploying file is asked to do."""
    path, base = deployment.model_path, deployment.base_path
    if base is None and is_adapter(path):
        base = base_of_adapter(path)
    weights = {"adapter": str(path), "base_model": str(base)} if base is not None else {"model": str(path)}
    return StageJob(
        stage="deploying",
        parameters={
            "dtype": deployment.dtype,
            "device": deployment.device,
            "model_settings": list(APPLIED_SETTINGS["custom"]),
        },
        inputs={
            "name": deployment.model,
            "host": "127.0.0.1",
            "port": deployment.port,
            **weights,
            "remote_code": allowed_digests([Path(folder) for folder in weights.values()]),
        },
        output=served / "output",
        seed=0,
    )
