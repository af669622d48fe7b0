"""The forms: what they ask for, what a server that holds them accepts and refuses, and what is recorded of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from prefect.flows import load_flow_from_entrypoint
from prefect.utilities.callables import parameter_schema
from prefect.utilities.schema_tools.validation import ValidationError, is_valid_schema, validate

from configs.errors import UserError
from configs.profiles import Profile, write_profile
from configs.settings import Settings, load_settings
from configs.train import Hyperparameters, TrainConfig
from deployments import flow_deployments, forms
from deployments.forms import Through
from methods.registry import find_method
from tests.own_methods import install_method

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
    assert list(form("complete")["properties"]) == ["train", "profile"]
    assert list(form("deployed")["properties"]) == ["train", "profile", "endpoint", "target", "quantization", "port"]


def test_only_what_serves_the_methods_models_can_be_chosen(home: object) -> None:
    target = own_form("deployed", lifecycle=["deployed"], deployment_targets=["vllm", "ollama"])["properties"]["target"]
    assert (target["enum"], target["default"]) == (["vllm", "ollama"], "vllm")


def test_a_profile_counts_where_the_form_is_left_at_its_default(home: object) -> None:
    own_form()
    saved = {"lora_rank": 4, "max_steps": 7}
    write_profile("fast", Profile(method="mine", saved_from="x", hyperparameters=saved), load_settings())
    fields = forms.train_form(find_method("mine"), "customized", [], ["fast"])["properties"]["profile"]
    assert (fields["examples"], fields["description"].endswith("Saved: fast.")) == (["fast"], True)
    given = {"hyperparameters": {"lora_rank": 8, "max_steps": 9}, "method_params": {"judge": "me"}}
    resolved = forms.resolve_form(TrainConfig.model_validate(MINE | given), "customized", None, "fast")
    hyper = resolved.config.hyperparameters
    assert (hyper.lora_rank, resolved.origins["hyperparameters.lora_rank"]) == (4, "profile fast")
    assert (hyper.max_steps, resolved.origins["hyperparameters.max_steps"]) == (9, "form")
    assert "the profile fast does not change what is set in the form (max_steps); set them by name" in resolved.warnings


MINE = TRAIN | {"method": "mine"}


def own_form(through: Through = "customized", **changes: Any) -> dict[str, Any]:
    """The form of a method with parameters of its own and other defaults than the common ones."""
    parameters = {
        "beta": {"type": "number", "minimum": 0, "default": 0.04, "title": "Beta", "description": "Of the penalty."},
        "clip_range": {"type": "number", "default": None},
        "judge": {"type": "string", "format": "model", "required": True, "description": "Who judges."},
        "rewards": {"type": "string", "format": "path", "default": "training.py"},
    }
    common = {
        "unused": ["num_generations", "load_in_4bit"],
        "defaults": {"learning_rate": 1e-6, "max_steps": 50},
        "choices": {"optimizer": ["adamw", "sgd"]},
    }
    install_method(**{"parameters": parameters, "hyperparameters": common, **changes})
    return forms.train_form(find_method("mine"), through, [])


def test_a_method_brings_its_own_fields(home: object) -> None:
    schema = own_form()
    is_valid_schema(schema)
    fields = schema["properties"]["train"]["properties"]["method_params"]["properties"]
    assert [field["position"] for field in fields.values()] == [0, 1, 2, 3]
    assert fields["beta"] == {
        "type": "number",
        "minimum": 0,
        "default": 0.04,
        "title": "Beta",
        "description": "Of the penalty.",
        "position": 0,
    }
    assert (fields["clip_range"]["title"], "default" in fields["clip_range"]) == ("Clip range", False)
    assert "LINE@ALIAS" in fields["judge"]["description"]
    assert "Empty: training.py" in fields["rewards"]["description"]
    validate({"train": MINE | {"method_params": {"judge": "me", "clip_range": None}}}, schema, raise_on_error=True)
    for own, path in [
        ({"beta": -1, "judge": "me"}, r"train\.method_params\.beta"),
        ({}, "judge"),
        (None, "method_params"),
    ]:
        train = MINE if own is None else MINE | {"method_params": own}
        with pytest.raises(ValidationError, match=path):
            validate({"train": train}, schema, raise_on_error=True)


def test_a_method_changes_what_is_asked_of_the_common_fields(home: object) -> None:
    hyper = own_form()["properties"]["train"]["properties"]["hyperparameters"]["properties"]
    assert not {"num_generations", "load_in_4bit"} & set(hyper)
    assert list(hyper)[:4] == ["tuning", "epochs", "max_steps", "learning_rate"]
    assert (hyper["learning_rate"]["default"], hyper["max_steps"]["default"]) == (1e-6, 50)
    assert hyper["optimizer"]["enum"] == ["adamw", "sgd"]
    assert hyper["tuning"]["enum"] == ["lora"]


def test_the_form_of_a_ready_method_can_be_sent_as_it_is(home: object) -> None:
    ready = {"name": "ready", "base_model": "b", "dataset": "samples/commands_en/train.jsonl", "max_new_tokens": 64}
    ready["validation_dataset"] = "samples/commands_en/validation.jsonl"
    install_method(train=ready)
    schema = forms.train_form(find_method("mine"), "customized", [])
    fields = schema["properties"]["train"]["properties"]
    sent = {name: field["default"] for name, field in fields.items() if "default" in field}
    assert ready.items() <= sent.items()
    validate({"train": sent}, schema, raise_on_error=True)
    resolved = forms.resolve_form(TrainConfig.model_validate(sent), "customized")
    assert {resolved.origins[name] for name in ready} == {"method mine"}
    assert resolved.config.dataset.endswith("/configs/samples/commands_en/train.jsonl")
    # The common default is a choice here, and other rows take the method's validation rows away.
    changed = TrainConfig.model_validate(sent | {"max_new_tokens": 128, "dataset": "c"})
    config = forms.resolve_form(changed, "customized").config
    assert (config.max_new_tokens, config.dataset, config.validation_dataset) == (128, "c", None)


def test_what_a_form_leaves_at_the_methods_default_came_from_the_method(home: object) -> None:
    own_form()
    # A form sends every field: the common default of the learning rate is a choice here.
    hyper = {"learning_rate": 1e-4, "max_steps": 50, "lora_rank": 8}
    own = {"beta": 0.04, "judge": "me", "clip_range": None}
    train = TrainConfig.model_validate(MINE | {"hyperparameters": hyper, "method_params": own})
    resolved = forms.resolve_form(train, "customized")
    assert (resolved.config.hyperparameters.learning_rate, resolved.config.hyperparameters.max_steps) == (1e-4, 50)
    assert {name: resolved.origins[f"hyperparameters.{name}"] for name in hyper} == {
        "learning_rate": "form",
        "max_steps": "method mine",
        "lora_rank": "default",
    }
    assert resolved.origins["method_params.judge"] == "form"
    assert resolved.origins["method_params.beta"] == "default"
    refused = TrainConfig.model_validate(MINE | {"hyperparameters": {"num_generations": 3}, "method_params": own})
    with pytest.raises(UserError, match="has no use for this parameter"):
        forms.resolve_form(refused, "customized")


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
