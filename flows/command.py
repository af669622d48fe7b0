"""Runs a flow from a train file with no server at all: `python -m flows.customized TRAIN.yaml`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.resolve import resolve_train
from configs.settings import load_settings
from deployments.guard import start_embedded_server
from deployments.services import connect


def run_flow_file(flow: Any) -> None:
    """Run `flow` with the train file, or the `--model`, of the command line; exit code 0 only if it worked."""
    connect(load_settings())
    from tasks.trains import load_train

    parser = argparse.ArgumentParser(description=flow.fn.__doc__)
    parser.add_argument("file", nargs="?", type=Path, help="YAML file of a train")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="change a parameter")
    parser.add_argument("--profile", help="parameters that were saved under this name")
    parser.add_argument("--model", help="start from this model instead of from a train")
    parser.add_argument("--resume", metavar="TRAIN", help="take up this train again")
    given = parser.parse_args()
    start_embedded_server()
    try:
        if given.resume is not None:
            result = flow(resume=load_train(given.resume).id)
        elif given.model is not None:
            result = flow(model=given.model)
        else:
            resolved = resolve_train(given.file, given.set, profile=given.profile)
            result = flow(train=resolved.config, origins=resolved.origins)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(result.model_dump_json(indent=2))
