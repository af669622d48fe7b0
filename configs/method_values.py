"""The values that a train gives its method: refused where the method cannot take them, filled up with its defaults."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from configs.aliases import nearest, spelling_key
from configs.parameter_schemas import choices_text, fits, limits, plain_value
from configs.train import TrainConfig
from configs.validation_errors import Place, Problem, one_error
from methods.registry import Method, find_method

OWN = "method_params"


def own_name(method: Method, spelling: str) -> str | None:
    """The method's own parameter of that name, whatever its case, `_` and `-`; None if it has none."""
    wanted = spelling_key(spelling)
    return next((name for name in method.parameters if spelling_key(name) == wanted), None)


def own_schema(method: Method, dotted_name: str) -> dict[str, Any] | None:
    """The schema of `method_params.NAME`; None for another parameter, or for what lies inside of one."""
    group, _, name = dotted_name.partition(".")
    return method.parameters.get(name) if group == OWN else None


def checked_values(config: TrainConfig) -> TrainConfig:
    """The configuration with every parameter of its method. Raises UserError for what the method cannot take."""
    method = find_method(config.method)
    problems = problems_of_method(method, config.model_dump(mode="json"), {})
    if problems:
        raise one_error(problems, None)
    return filled(method, config)


def filled(method: Method, config: TrainConfig) -> TrainConfig:
    """The configuration with a value for each of the method's own parameters, in the manifest's order."""
    given = {**method.parameter_defaults, **config.method_params}
    own = {name: plain_value(schema, given[name]) for name, schema in method.parameters.items()}
    return config.model_copy(update={OWN: own})


def problems_of_method(
    method: Method, values: Mapping[str, Any], places: Mapping[str, Place], *, only_given: bool = False
) -> list[Problem]:
    """What the method cannot take of the values of a train; `places` are by dotted name.

    With `only_given` nothing is missing.
    """
    hyper, own = values.get("hyperparameters") or {}, values.get(OWN) or {}
    return [
        *_not_spread(method, values, places),
        *_unused(method, hyper, places),
        *_not_chosen(method, hyper, places),
        *_unknown(method, own, places),
        *([] if only_given else _missing(method, own)),
        *_impossible(method, own, places),
        *_never_complete(method, values, own, places),
    ]


def _not_spread(method: Method, values: Mapping[str, Any], places: Mapping[str, Place]) -> list[Problem]:
    wanted, known = values.get("distribution", "none"), method.hardware.distributions
    if wanted == "none" or wanted in known:
        return []
    problem = f"the training of the method {method.name} cannot be spread so"
    expected = f"one of none, {', '.join(known)}" if known else "none: it runs in one process"
    return [Problem(problem, "distribution", places.get("distribution"), wanted, expected)]


def _never_complete(
    method: Method, values: Mapping[str, Any], own: Mapping[str, Any], places: Mapping[str, Place]
) -> list[Problem]:
    """A train that is to go further than what its own parameters leave can go."""
    through = values.get("through")
    if through not in ("complete", "deployed"):
        return []
    found = []
    for name, kept in method.stays_customized.items():
        value = own.get(name, method.parameter_defaults.get(name))
        if value in kept:
            problem = f"what is trained with {name} {value} cannot be made a complete model"
            served = (
                "; `tuneline deploy MODEL --target custom` serves it" if "custom" in method.deployment_targets else ""
            )
            mend = f"leave it out: the train ends with a customized model{served}"
            found.append(Problem(problem, "through", places.get("through"), through, "customized", mend))
    return found


def _unused(method: Method, hyper: Mapping[str, Any], places: Mapping[str, Place]) -> list[Problem]:
    found = []
    for name in method.hyperparameters.unused:
        default = method.hyperparameter_default(name)
        if name in hyper and hyper[name] != default:
            field = f"hyperparameters.{name}"
            problem = f"the method {method.name} has no use for this parameter, so nothing would read it"
            mend = f"leave it out (`tuneline methods show {method.name}` lists what it takes)"
            found.append(Problem(problem, field, places.get(field), hyper[name], mend=mend))
    return found


def _not_chosen(method: Method, hyper: Mapping[str, Any], places: Mapping[str, Place]) -> list[Problem]:
    found = []
    for name, choices in method.hyperparameters.choices.items():
        value = hyper.get(name, method.hyperparameter_default(name))
        if value not in choices and name not in method.hyperparameters.unused:
            field = f"hyperparameters.{name}"
            expected = f"one of {choices_text(choices)}"
            problem = f"the method {method.name} does not take this value"
            found.append(Problem(problem, field, places.get(field), value, expected))
    return found


def _unknown(method: Method, own: Mapping[str, Any], places: Mapping[str, Place]) -> list[Problem]:
    found = []
    for name in own:
        if name not in method.parameters:
            near = nearest(name, list(method.parameters))
            problem = f"the method {method.name} has no such parameter of its own, so nothing would read it"
            expected = f"one of {', '.join(method.parameters)}" if method.parameters else f"no {OWN}"
            lists = f"`tuneline methods show {method.name}` lists them"
            mend = f"did you mean {' or '.join(near)}?" if near else lists
            found.append(Problem(problem, f"{OWN}.{name}", _place(places, name), None, expected, mend))
    return found


def _missing(method: Method, own: Mapping[str, Any]) -> list[Problem]:
    return [
        Problem("a required parameter is missing", f"{OWN}.{name}", expected=limits(schema))
        for name, schema in method.parameters.items()
        if schema.get("required") and own.get(name) is None
    ]


def _impossible(method: Method, own: Mapping[str, Any], places: Mapping[str, Place]) -> list[Problem]:
    found = []
    for name, schema in method.parameters.items():
        value = own.get(name)
        if name not in own or (value is None and schema.get("required")):
            continue
        place, field = _place(places, name), f"{OWN}.{name}"
        if value is not None and fits(schema, value) and method.takes_file(name) and not _is_file(value):
            mend = "in a form: its absolute path on the host that the worker runs on"
            found.append(Problem("there is no such file", field, place, value, limits(schema), mend))
        elif not fits(schema, value):
            quoted = f'put it in quotes: "{value}"'
            number = schema["type"] == "string" and isinstance(value, int | float)
            problem = "this value is impossible"
            found.append(Problem(problem, field, place, value, limits(schema), quoted if number else None))
    return found


def _is_file(text: str) -> bool:
    try:
        return Path(text).expanduser().is_file()
    except (OSError, RuntimeError, ValueError):
        return False


def _place(places: Mapping[str, Place], name: str) -> Place | None:
    """Where the parameter was given, or something inside of it."""
    field = f"{OWN}.{name}"
    return next((place for key, place in places.items() if key == field or key.startswith(f"{field}.")), None)
