"""The target `transformers`: `transformers serve` on this host, for complete models and adapters."""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from configs.endpoints import Deployment, Probe
from configs.errors import UserError
from configs.settings import load_settings
from methods.toolkit.remote_code import copy_code
from tasks.files import last_lines
from tasks.model_folders import TOKENIZER_FILES, base_of_adapter, check_model_folder, is_adapter, read_json
from tasks.model_server import (
    TOOLKIT,
    EndpointWork,
    is_alive,
    server_environment,
    start_model_server,
    stop_server,
)
from tasks.remote_code import admit, code_variables, model_code

PROMPTS_NEED_SERVER = False


def ready() -> str | None:
    """Why this host cannot serve so; None: it can. It is a dependency of Tuneline itself."""
    return None


def check(deployment: Deployment) -> None:
    """Refuse what cannot be served, before anything is started. Raises UserError."""
    check_model_folder(deployment.model_path)
    if is_adapter(deployment.model_path):
        _check_adapter(deployment.model_path)
        admit(base_of_adapter(deployment.model_path), load_settings())
    admit(deployment.model_path, load_settings())


def prepare(work: EndpointWork, deployment: Deployment) -> Path:
    """Make `serve/MODEL` out of links, so that the model's id is its name and no path leaks.

    An adapter alone cannot be served: `transformers serve` asks the folder for config.json. It gets the base
    model's files with the adapter's laid over them, which transformers loads as a model with an embedded
    adapter. Raises UserError if the model cannot be served.
    """
    check_model_folder(deployment.model_path)
    root = work.folder / "deployments" / deployment.model
    (root / "hf" / "hub").mkdir(parents=True, exist_ok=True)
    serve = root / "serve"
    serve.mkdir(exist_ok=True)
    view = serve / deployment.model
    if is_adapter(deployment.model_path):
        _link_adapter_over_base(deployment.model_path, view)
    elif not view.is_symlink():
        view.symlink_to(deployment.model_path, target_is_directory=True)
    return view


def start(work: EndpointWork, deployment: Deployment, served: Path, timeout: float) -> None:
    """Start the server and wait until it is healthy. Raises UserError."""
    start_model_server(work, deployment, lambda: command(work, deployment), environment(served), served.parent, timeout)


def prompt_tokens(deployment: Deployment, served: Path, probes: Sequence[Probe], timeout: float) -> list[list[int]]:
    """Token ids that the served folder's chat template makes of each probe, by the interpreter that serves.

    `timeout` is in seconds. Raises UserError if they cannot be rendered.
    """
    deployment.log.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, deployment.log.open("ab") as log:
        asked, answered = Path(scratch, "messages.json"), Path(scratch, "rendered.json")
        asked.write_text(json.dumps([[probe.messages, probe.tools] for probe in probes]), encoding="utf-8")
        program = TOOLKIT / "render_prompts.py"
        try:
            subprocess.run(
                [str(deployment.python), str(program), str(served), str(asked), str(answered)],
                env=environment(served),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=timeout,
                check=True,
            )
        except subprocess.SubprocessError as error:
            said = last_lines(deployment.log, 30)
            raise UserError(
                f"the prompts could not be rendered with the model's chat template. End of the log:\n{said}",
                file=deployment.log,
            ) from error
        return [[int(each) for each in ids] for ids in json.loads(answered.read_text(encoding="utf-8"))]


def is_up(deployment: Deployment) -> bool:
    """Whether the server runs."""
    return is_alive(deployment.process)


def stop(deployment: Deployment, grace: float) -> None:
    """End the server; requests under way get `grace` seconds."""
    stop_server(deployment.process, grace=grace)
    deployment.process = None


def command(work: EndpointWork, deployment: Deployment) -> list[str]:
    """The command line of the server."""
    words = [str(deployment.python), str(TOOLKIT / "serve_model.py"), str(work.record), deployment.model]
    words += ["--host", "127.0.0.1", "--port", str(deployment.port)]
    words += ["--device", deployment.device, "--dtype", deployment.dtype]
    if model_code(work.folder / "deployments" / deployment.model / "serve" / deployment.model) is not None:
        words += ["--trust-remote-code"]  # of this one folder: the server's program refuses to load any other
    return words + (["--quantization", deployment.quantization] if deployment.quantization else [])


def environment(served: Path) -> dict[str, str]:
    """Environment of the serving interpreter: offline, a hub cache of its own, no key, nothing of our own paths.

    It may run the code that the served folder brings, if the user allows that at this moment; else raises UserError.
    """
    cache = served.parent.parent / "hf"
    return server_environment(
        {
            "HF_HOME": str(cache),
            "HF_HUB_CACHE": str(cache / "hub"),
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            **code_variables(served, cache / "modules"),
            "PYTHONSAFEPATH": "1",  # or the modules beside the program would shadow installed ones
        }
    )


def _check_adapter(path: Path) -> None:
    """Refuse the adapters that transformers does not load as peft does: it leaves DoRA's magnitudes out in silence."""
    file = path / "adapter_config.json"
    config = read_json(file)
    wrong = {"peft_type": config.get("peft_type") == "ADALORA", "use_dora": bool(config.get("use_dora"))}
    for field, found in wrong.items():
        if found:
            raise UserError(
                "transformers cannot serve an adapter of this kind",
                file=file,
                field=field,
                value=config[field],
                expected="LORA without DoRA, or IA3",
                mend="`tuneline save` makes a complete model of it, which can be served",
            )


def _link_adapter_over_base(adapter: Path, view: Path) -> None:
    base = base_of_adapter(adapter)
    shutil.rmtree(view, ignore_errors=True)
    view.mkdir()
    files = {file.name: file for file in base.iterdir() if file.is_file()}
    if (adapter / "tokenizer_config.json").is_file():
        # All of one tokenizer or all of the other: a chat template left over from the base would win in
        # silence.
        files = {name: file for name, file in files.items() if name not in TOKENIZER_FILES}
    files |= {file.name: file for file in adapter.iterdir() if file.is_file()}
    for name, file in files.items():
        if file.suffix != ".py":
            (view / name).symlink_to(file)
    if model_code(base) is not None:
        copy_code(base, view)  # links would lead out of the view
