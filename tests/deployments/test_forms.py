"""The forms: what they ask for, what a server that holds them accepts and refuses, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate

from configs.errors import UserError
from configs.settings import Settings
from configs.train import Hyperparameters, TrainConfig
from deployments import flow_deployments, forms
from deployments.forms import Through
from methods.registry import find_method

TRAIN = {"name": "lights", "base_model": "smollm2-135m-instruct", "dataset": "rows", "method": "sft"}
PATHS: tuple[Through, ...] = ("customized", "complete", "deployed")


def form(through: Through = "customized") -> dict[str, Any]:
    return forms.train_form(find_method("sft"), through, ["smollm2-135m-instruct", "mine"])


def refusal(**changes: object) -> str:
    """What the server says to a train with these changes."""
    with pytest.raises(ValidationError) as caught:
        validate({"train": TRAIN | changes}, form(), raise_on_error=True)
    return str(caught.value)


def objects(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if "properties" in schema:
        yield schema
        for field in schema["properties"].values():
            yield from objects(field)


@pytest.mark.parametrize("through", PATHS)
def test_every_field_has_a_place_a_title_and_a_description(through: Through) -> None:
    is_valid_schema(form(through))
    for schema in objects(form(through)):
        fields = list(schema["properties"].values())
        assert [field["position"] for field in fields] == list(range(len(fields)))
        assert all(field["title"] for field in fields)
        assert all(
            field.get("description") for field in fields if field["title"] != "Train" and "properties" not in field
        )


def test_nothing_is_left_that_the_page_cannot_draw() -> None:
    text = str(form("deployed"))
    assert "$ref" not in text
    assert "anyOf" not in text
    assert "'default': None" not in text


@pytest.mark.parametrize("through", PATHS)
def test_every_parameter_of_a_train_is_in_its_form_once(through: Through) -> None:
    train = form(through)["properties"]["train"]["properties"]
    # sft has no parameters of its own; how far it goes is the deployment's, and the endpoint stands beside the train.
    assert set(train) == set(TrainConfig.model_fields) - {"through", "endpoint", "method_params"}
    assert set(train["hyperparameters"]["properties"]) == set(Hyperparameters.model_fields)


def test_what_most_people_set_comes_first() -> None:
    train = form()["properties"]["train"]["properties"]
    assert list(train)[:4] == ["name", "description", "base_model", "dataset"]
    assert list(train["hyperparameters"]["properties"])[:4] == ["tuning", "epochs", "max_steps", "learning_rate"]


def test_registered_base_models_are_told() -> None:
    field = form()["properties"]["train"]["properties"]["base_model"]
    assert field["examples"] == ["smollm2-135m-instruct", "mine"]
    assert "smollm2-135m-instruct, mine" in field["description"]


def test_only_a_deployed_form_asks_for_an_endpoint() -> None:
    assert list(form("complete")["properties"]) == ["train"]
    assert list(form("deployed")["properties"]) == ["train", "endpoint", "target", "quantization", "port"]


def test_a_method_of_its_own_brings_its_own_fields() -> None:
    beta = {"type": "number", "minimum": 0, "default": 0.04, "title": "Beta", "description": "Weight of the penalty."}
    method = find_method("sft").model_copy(update={"name": "grpo", "parameters": {"beta": beta}})
    schema = forms.train_form(method, "customized", [])
    assert schema["properties"]["train"]["properties"]["method_params"]["properties"]["beta"]["minimum"] == 0
    train = TRAIN | {"method": "grpo", "method_params": {"beta": -1}}
    with pytest.raises(ValidationError, match=r"'train\.method_params\.beta'"):
        validate({"train": train}, schema, raise_on_error=True)


@pytest.mark.parametrize(
    ("changes", "path"),
    [
        ({"hyperparameters": {"learning_rate": 5}}, "train.hyperparameters.learning_rate"),
        ({"hyperparameters": {"learning_rate": 0}}, "train.hyperparameters.learning_rate"),
        ({"hyperparameters": {"max_steps": 0}}, "train.hyperparameters.max_steps"),
        ({"hyperparameters": {"max_samples": 0}}, "train.hyperparameters.max_samples"),
        ({"hyperparameters": {"dtype": "int3"}}, "train.hyperparameters.dtype"),
        ({"hyperparameters": {"tuning": "full"}}, "train.hyperparameters.tuning"),
        ({"hyperparameters": {"lora_rnak": 8}}, "lora_rnak"),
        ({"validation_split": 1}, "train.validation_split"),
        ({"name": "../lights"}, "train.name"),
        ({"name": "a..b"}, "train.name"),
        ({"dataset": ""}, "train.dataset"),
        ({"method": "grpo"}, "train.method"),
        ({"through": "complete"}, "through"),
    ],
)
def test_an_impossible_value_is_refused_with_its_place(changes: dict[str, Any], path: str) -> None:
    assert path in refusal(**changes)


def test_a_train_needs_its_method_and_nothing_unknown_beside_it() -> None:
    for parameters in ({"train": {**TRAIN, "method": None}}, {"train": TRAIN, "nope": 1}, {}):
        with pytest.raises(ValidationError):
            validate(parameters, form(), raise_on_error=True)


def test_full_tuning_can_be_chosen_where_it_leads_to_a_model() -> None:
    validate({"train": TRAIN | {"hyperparameters": {"tuning": "full"}}}, form("complete"), raise_on_error=True)


def test_an_unset_field_may_be_null_as_in_a_run_that_was_copied() -> None:
    train = TRAIN | {"prompt_column": None, "hyperparameters": {"lora_alpha": None, "max_steps": None}}
    validate({"train": train}, form(), raise_on_error=True)


def test_what_a_form_accepts_the_models_accept() -> None:
    train = form()["properties"]["train"]["properties"]
    hyper = {
        name: field["default"] for name, field in train["hyperparameters"]["properties"].items() if "default" in field
    }
    assert TrainConfig.model_validate(TRAIN | {"hyperparameters": hyper}) == TrainConfig.model_validate(TRAIN)


def test_what_differs_from_the_defaults_came_from_the_form() -> None:
    train = TrainConfig.model_validate(TRAIN | {"hyperparameters": {"learning_rate": 0.01, "batch_size": 8}})
    resolved = forms.resolve_form(train, "deployed", "my-lights")
    assert resolved.config.through == "deployed"
    assert resolved.config.endpoint == "my-lights"
    assert {name for name, origin in resolved.origins.items() if origin == "form"} == {
        *("name", "base_model", "dataset", "through", "endpoint", "hyperparameters.learning_rate"),
    }
    assert set(resolved.origins.values()) == {"form", "default"}
    assert [warning for warning in resolved.warnings if "learning_rate" in warning and "from the form" in warning]


def test_a_form_cannot_contradict_its_path() -> None:
    full = TrainConfig.model_validate(TRAIN | {"hyperparameters": {"tuning": "full"}})
    with pytest.raises(UserError, match="there is no customized model"):
        forms.resolve_form(full, "customized")
    with pytest.raises(UserError, match="does not go as far"):
        forms.resolve_form(full.model_copy(update={"through": "deployed"}), "complete")


def test_every_form_asks_only_for_what_its_flow_takes(home: object) -> None:
    for item in flow_deployments.describe_deployments(Settings()):
        flow = load_flow_from_entrypoint(flow_deployments.ENTRYPOINTS[item.flow])
        assert flow.name == item.flow
        taken = parameter_schema(flow.fn).properties
        assert set(item.form["properties"]) <= set(taken)
