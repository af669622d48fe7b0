"""Program: `transformers serve`, ended with whoever started it until the endpoint's record keeps it.

`PYTHON serve_model.py ENDPOINT_JSON MODEL [options of transformers serve]`, with the starter's pipe as
standard input. Run by the interpreter that serves, which may hold nothing of Tuneline: standard library only,
and transformers.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any


def is_kept(record: Path, pid: int) -> bool:
    """Whether the endpoint's record names the process as its gateway or as its current deployment."""
    try:
        endpoint = json.loads(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    current = [each for each in endpoint["deployments"] if each["model"] == endpoint["current"]]
    if not current:
        return False
    processes = [each["process"] for each in (*current, endpoint["gateway"]) if each]
    return any(process and process["pid"] == pid for process in processes)


def end_with_starter(record: Path) -> None:
    """Watch standard input; when the starter closes it, normally or by dying, stay only if the record keeps
    us.

    The record is replaced atomically, so there is no moment at which a deploy is half switched: a starter
    killed before the switch leaves nothing running, and one killed after it leaves the endpoint up.
    """

    def watch() -> None:
        while os.read(0, 1024):
            continue
        try:
            kept = is_kept(record, os.getpid())
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{record} cannot be read, so this server ends: {error!r}", file=sys.stderr, flush=True)
            kept = False
        if not kept:
            os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=watch, name="end-with-starter", daemon=True).start()


def keep_to_own_code(model: str) -> None:
    """Let the server load the one folder whose code is allowed, and load nothing else.

    Its route `/load_model` loads any folder that a request names, which with `--trust-remote-code` would run any code.
    It looks for the model's class in transformers itself, where a class of the model's own is not: it is put there.
    Raises Refused if the folder's code is not what was allowed.
    """
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import transformers
    from transformers.cli.serving.model_manager import ModelManager

    from methods.toolkit import models, remote_code

    remote_code.trusted(model)
    architecture = remote_code.read_object(Path(model) / "config.json")["architectures"][0]
    if not hasattr(transformers, architecture):
        setattr(transformers, architecture, transformers.AutoModelForCausalLM)
    load = ModelManager.load_model_and_processor

    def load_own(self: ModelManager, model_id_and_revision: str, *given: Any, **named: Any) -> Any:
        if model_id_and_revision.rpartition("@")[0] != model:
            raise ValueError(f"this server runs code of the model {model} and loads no other")
        loaded = load(self, model_id_and_revision, *given, **named)
        models.settle_cache(loaded[0])
        return loaded

    ModelManager.load_model_and_processor = load_own


def keep_what_templates_show() -> None:
    """Have the library pass on the text of a message that also calls tools, and the name of a tool's result.

    It leaves both out (transformers 5.23), so that templates would render other prompts than in training.
    """
    from transformers.cli.serving.utils import BaseHandler

    read = BaseHandler.get_processor_inputs_from_messages

    def read_whole(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = read(messages, modality)
        for given, message in zip(messages, found, strict=True):
            is_text = isinstance(given.get("content"), str) and isinstance(message["content"], str)
            if given.get("tool_calls") and is_text:
                message["content"] = given["content"]
            if given["role"] == "tool" and "name" in given:
                message["name"] = given["name"]
        return found

    BaseHandler.get_processor_inputs_from_messages = staticmethod(read_whole)


def main() -> None:
    """Start the server named on the command line."""
    record, *arguments = sys.argv[1:]
    end_with_starter(Path(record))
    keep_what_templates_show()
    from transformers.cli.transformers import app

    if "--trust-remote-code" in arguments:
        keep_to_own_code(arguments[0])

    sys.argv = ["transformers", "serve", *arguments]
    app()


if __name__ == "__main__":
    main()
