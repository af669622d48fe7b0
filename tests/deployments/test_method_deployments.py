"""Training methods are added and deleted from the Prefect page, and their deployments come and go with them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.deployments.server import Server, installation_with_servers, wait_for

pytestmark = pytest.mark.operations

MANIFEST = """
name: mine
description: A method of our own.
types: [chat]
lifecycle: [customized]
stages:
  training: {file: training.py, environment: host}
parameters:
  strength: {type: integer, minimum: 1, default: 3, title: Strength}
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with installation_with_servers(tmp_path_factory.mktemp("methods")) as made:
        yield made


def run_to_its_end(server: Server, title: str, parameters: dict[str, object]) -> str:
    answer = server.start(title, parameters)
    answer.raise_for_status()
    run = answer.json()["id"]
    wait_for(lambda: server.state(run) in ("Completed", "Failed", "Crashed"), 150)
    return server.state(run)


def test_a_method_comes_and_goes_with_its_form(server: Server) -> None:
    folder = server.root / "mine"
    folder.mkdir()
    (folder / "method.yaml").write_text(MANIFEST)
    (folder / "training.py").write_text("raise SystemExit(0)\n")

    assert run_to_its_end(server, "add-method/folder", {"folder": str(folder)}) == "Completed"
    form = server.deployment("customized/mine")["parameter_openapi_schema"]
    strength = form["properties"]["train"]["properties"]["method_params"]["properties"]["strength"]
    assert (strength["title"], strength["minimum"]) == ("Strength", 1)

    assert run_to_its_end(server, "check-method/name", {"name": "mine"}) == "Failed"  # it trains nothing
    (told,) = server.post("/artifacts/filter", {"artifacts": {"key": {"any_": ["check-mine"]}}})
    marks = {row["check"]: row[""] for row in json.loads(told["data"])}
    assert (marks["tiny model"], marks["training"]) == ("✓", "✗")

    assert run_to_its_end(server, "add-method/folder", {"folder": str(folder)}) == "Failed"  # the name is taken
    assert run_to_its_end(server, "delete-method/name", {"name": "sft"}) == "Failed"  # built in
    assert run_to_its_end(server, "delete-method/name", {"name": "mine"}) == "Completed"
    assert server.http.get("/deployments/name/customized/mine").status_code == 404
    assert server.http.get("/deployments/name/customized/sft").status_code == 200
    assert not (server.settings.methods / "mine").exists()


def test_a_method_is_begun_from_the_page(server: Server) -> None:
    target = server.root / "begun"
    given = {"name": "begun", "folder": str(target), "template": "custom01"}
    assert run_to_its_end(server, "new-method/template", given) == "Completed"
    assert "name: begun" in (target / "method.yaml").read_text()
    assert run_to_its_end(server, "new-method/template", given) == "Failed"  # the folder is there
    assert run_to_its_end(server, "new-method/template", given | {"folder": "begun"}) == "Failed"  # where would that be
