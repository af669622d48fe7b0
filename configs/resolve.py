"""From a file, a preset, a copied train and the command line to one checked configuration.

Every value keeps its origin.

Precedence, the last one wins: default, the method's own default, preset, profile, copied train, file, command line,
sweep.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from configs.aliases import (
    SPELLINGS,
    canonical_name,
    canonical_switch,
    canonical_value,
    ignored_reason,
    nearest,
    spelling_key,
    spelling_table,
)
from configs.base_models import holds_model
from configs.errors import UserError
from configs.method_values import OWN, filled, own_name, own_schema, problems_of_method
from configs.profiles import Profile, RecordedProfile, find_profile
from configs.reference import fields_of, is_typical, limits_of, typical_of, typical_text
from configs.settings import load_settings
from configs.strict_yaml import YamlFile, parse_scalar, read_yaml
from configs.sweeps import SECTION, Swept
from configs.train import Hyperparameters, TrainConfig, effective_through
from configs.validation_errors import Place, Problem, dotted, one_error, problems_of
from methods.registry import Method, find_method, known_method

PRESETS = Path(__file__).resolve().parent / "presets"
DEFAULT = "default"
COMMAND_LINE = "command line"

_TRAIN_FIELDS = fields_of(TrainConfig)
_HYPER_FIELDS = fields_of(Hyperparameters)
COPIED_FROM = "copied_from"
"""The key of a train file that says which train it is a copy of; the origins of its values tell it."""
_COPIED = "copied from"
_CHOSEN = ("preset", "profile")  # what stands beside the fields of a train and fills them
_TABLE = spelling_table([*_TRAIN_FIELDS, *_HYPER_FIELDS, *_CHOSEN])
_EXPECTED = {name: limits_of(schema) for name, schema in _TRAIN_FIELDS.items()} | {
    f"hyperparameters.{name}": limits_of(schema) for name, schema in _HYPER_FIELDS.items()
}
_IMPOSSIBLE = "this value is impossible"
_GROUPS = ("hyperparameters", "method_params")
_ABOUT_ROWS = (
    "prompt_column",
    "completion_column",
    "dataset_shape",
    "validation_dataset",
    "validation_split",
    "evaluation_dataset",
    "evaluation_samples",
    "evaluation_by",
)
_PATH_FIELDS = ("dataset", "validation_dataset", "evaluation_dataset", "base_model", "stop_words")


class ResolvedTrain(BaseModel):
    """A checked configuration, where each value (by dotted name) came from, and what is worth telling."""

    model_config = ConfigDict(extra="forbid")

    config: TrainConfig
    origins: dict[str, str]
    warnings: list[str] = []


class Preset(BaseModel):
    """A file of `configs/presets`: documented values for a situation, and the document."""

    model_config = ConfigDict(extra="forbid")

    title: str
    source: str
    sources: dict[str, str] = {}
    spellings: list[str] = []
    documented_for: str | None = None
    values: dict[str, Any]

    @model_validator(mode="after")
    def _check(self) -> Preset:
        if unknown := [name for name in self.sources if name not in self.values]:
            raise PydanticCustomError("sources", "`sources` names no value: {names}", {"names": ", ".join(unknown)})
        return self

    def source_of(self, name: str) -> str:
        """The document that a value was taken from: its own in `sources`, else that of the preset."""
        return self.sources.get(name, self.source)


@dataclass(frozen=True)
class _Given:
    """One value as somebody gave it; `name` is dotted and canonical."""

    name: str
    value: Any
    place: Place


@dataclass
class _Notes:
    """What is found on the way, so that all of it is told at once."""

    warnings: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


_Layer = dict[str, _Given]
_Keys = tuple[str, ...]
_Items = list[tuple[_Keys, Any, Place]]


def list_presets() -> dict[str, Preset]:
    """All presets by name."""
    return {path.stem: _read_preset(path)[0] for path in _preset_files()}


def find_preset(name: str) -> tuple[Preset, YamlFile]:
    """The preset of a name, or of a spelling of its scene, and its file. Raises UserError with the nearest names."""
    _, preset, source = _find_preset(_Given("preset", name, Place("preset", COMMAND_LINE)))
    return preset, source


def resolve_train(
    file: Path | None = None,
    overrides: Sequence[str] = (),
    copied: Mapping[str, Any] | None = None,
    preset: str | None = None,
    *,
    copied_from: str | None = None,
    profile: str | RecordedProfile | None = None,
    swept: Swept | None = None,
) -> ResolvedTrain:
    """One checked configuration of a train.

    `overrides` are `name=value`, the value read as YAML. `copied` is the configuration of an earlier train;
    origins call it `copied_from`, else by its name. `preset` and `profile` win over those named in the file.
    `swept` is what a sweep gives this train of it; without it, a file that describes a sweep is refused.
    Raises UserError that lists every problem found.
    """
    found = _layers(file, overrides, copied, copied_from, preset, profile, swept)
    merged = _resolve_paths(found.merged, found.method, file)
    config = _checked(merged, found.method, file, found.notes.problems)
    origins = _origins(config, merged)
    warnings = [
        *found.notes.warnings,
        *_hidden(found.preset, found.copied, merged),
        *_hidden(found.profile, found.copied, merged),
        *_all_warnings(config, found.method, merged, found.chosen_preset),
    ]
    return ResolvedTrain(config=config, origins=origins, warnings=warnings)


def profile_of_file(file: Path, overrides: Sequence[str] = ()) -> tuple[Profile, list[str]]:
    """The parameters that a train file sets, by value, and the names of what else stands there.

    Raises UserError that lists every problem found, as for a train.
    """
    found = _layers(file, overrides, None, None, None, None)
    given = {name: each for name, each in found.merged.items() if each.place.origin != _method_origin(found.method)}
    kept = {name: each for name, each in given.items() if name.partition(".")[0] in _GROUPS}
    needed = {name: _Given(name, "profile", Place(name, "profile")) for name in ("name", "base_model", "dataset")}
    needed["method"] = _Given("method", found.method.name, Place("method", "profile"))
    layer = _resolve_paths({**_method_layer(found.method), **kept, **needed}, found.method, file)
    config = _checked(layer, found.method, file, found.notes.problems, only_given=True)
    profile = _profile_of(config, list(kept), f"file {file}")
    return profile, [name for name in given if name not in kept and name != "method"]


def profile_of_train(config: TrainConfig, origins: Mapping[str, str], train: str) -> Profile:
    """The parameters that somebody has set in a train, by value."""
    unset = (DEFAULT, f"method {config.method}")
    named = [name for name, origin in origins.items() if name.partition(".")[0] in _GROUPS and origin not in unset]
    return _profile_of(config, named, f"train {train}")


def recorded_profile(name: str, config: TrainConfig, origins: Mapping[str, str]) -> RecordedProfile | None:
    """What the profile gave to a recorded train; None if the train was given nothing by it."""
    named = [each for each, origin in origins.items() if origin == f"profile {name}"]
    values = _profile_of(config, named, "").values
    return RecordedProfile(name, values) if values else None


def _profile_of(config: TrainConfig, names: Sequence[str], saved_from: str) -> Profile:
    values: dict[str, Any] = config.model_dump(mode="json")
    groups: dict[str, dict[str, Any]] = {group: {} for group in _GROUPS}
    for name in names:
        group, _, rest = name.partition(".")
        own = rest.partition(".")[0]
        groups[group][own] = values[group][own]
    return Profile(
        method=config.method,
        saved_from=saved_from,
        hyperparameters=groups["hyperparameters"],
        method_params=groups[OWN],
    )


def effective(config: TrainConfig) -> dict[str, Any]:
    """The configuration as a nested dict with derived values spelled out: `lora_alpha` and `through`.

    Hyper-parameters that the method has no use for are left out.
    """
    values = config.model_dump(mode="json")
    values["through"] = effective_through(config)
    hyper = values["hyperparameters"]
    if hyper["lora_alpha"] is None:
        hyper["lora_alpha"] = 2 * hyper["lora_rank"]
    method = known_method(config.method)
    for name in method.hyperparameters.unused if method is not None else ():
        del hyper[name]
    return values


def describe(resolved: ResolvedTrain) -> list[tuple[str, str, str]]:
    """(dotted name, value, origin) of every value, for printing; a derived value names its source."""
    rows = []
    before = dotted(resolved.config.model_dump(mode="json"))
    derived = {"through": "derived from tuning", "hyperparameters.lora_alpha": "derived: 2 × lora_rank"}
    for name, value in dotted(effective(resolved.config)).items():
        origin = resolved.origins.get(name) or _parent_origin(name, resolved.origins)
        if value != before[name]:
            origin = derived[name]
        rows.append((name, _shown(value), origin))
    return rows


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def _parent_origin(name: str, origins: Mapping[str, str]) -> str:
    # A mapping inside method_params has one origin: that of the parameter it is the value of.
    while "." in name:
        name = name.rpartition(".")[0]
        if name in origins:
            return origins[name]
    return DEFAULT


# Layers


@dataclass(frozen=True)
class _Layers:
    """Who gave what, one after the other, and all of it with the last one winning."""

    method: Method
    chosen_preset: _Given | None
    preset: _Layer
    profile: _Layer
    copied: _Layer
    merged: _Layer
    notes: _Notes


def _layers(
    file: Path | None,
    overrides: Sequence[str],
    copied: Mapping[str, Any] | None,
    copied_from: str | None,
    preset: str | None,
    profile: str | RecordedProfile | None,
    swept: Swept | None = None,
) -> _Layers:
    notes = _Notes()
    file_items = _file_items(read_yaml(file)) if file is not None else []
    file_items = _without_sweep(file_items, refused=swept is None)
    copied_items = _copied_items(copied, copied_from) if copied is not None else []
    override_items = [*(_swept_items(swept) if swept is not None else []), *_override_items(overrides)]
    given = (override_items, file_items, copied_items)
    chosen_preset, chosen_profile = _chosen("preset", preset, *given), _chosen("profile", profile, *given)
    preset_items = _preset_items(chosen_preset) if chosen_preset is not None else []
    profile_items = _profile_items(chosen_profile) if chosen_profile is not None else []
    # The method decides which names there are, so it must be known before the names are looked up.
    method = _chosen_method(*given, profile_items, preset_items)

    preset_layer, profile_layer, file_layer = (
        _collect(items, method, notes) for items in (preset_items, profile_items, file_items)
    )
    copied_layer = _collect(_without_other_method(copied_items, method, notes), method, notes)
    override_layer = _typed_layer(_collect(override_items, method, notes), method)
    merged = _method_layer(method) | preset_layer | profile_layer | copied_layer | file_layer | override_layer
    for name in _CHOSEN:
        merged.pop(name, None)
    merged = _of_other_rows(merged, method)
    return _Layers(method, chosen_preset, preset_layer, profile_layer, copied_layer, merged, notes)


def _file_items(source: YamlFile) -> _Items:
    values = dict(source.values)
    train = values.pop(COPIED_FROM, None)
    if train is not None and not isinstance(train, str):
        place = Place(COPIED_FROM, f"file {source.path}", source.path, source.lines.get((COPIED_FROM,)))
        raise Problem(_IMPOSSIBLE, COPIED_FROM, place, train, "the id of a train").as_error(None)
    copied = f", {_COPIED} {train}" if train else ""

    def place_of(keys: _Keys) -> Place:
        line = source.lines.get(keys)
        return Place(".".join(keys), f"file {source.path}:{line}{copied}", source.path, line)

    return list(_walk(values, place_of))


def copied_trains(origins: Iterable[str]) -> list[str]:
    """The ids of the trains that values with these origins were copied from, each once."""
    ids = (origin.rpartition(f"{_COPIED} ")[2] for origin in origins if f"{_COPIED} " in origin)
    return list(dict.fromkeys(ids))


def _without_sweep(items: _Items, *, refused: bool) -> _Items:
    """The items of a file without the sweep that it describes. One train of it alone is not what was asked for."""
    sweep = next(((value, place) for keys, value, place in items if keys == (SECTION,)), None)
    if sweep is not None and refused:
        mend = "start it with `tuneline sweep FILE`, or leave the section out to train once"
        raise Problem("this file describes a sweep", SECTION, sweep[1], sweep[0], mend=mend).as_error(None)
    return [item for item in items if item[0] != (SECTION,)]


def _copied_items(copied: Mapping[str, Any], copied_from: str | None) -> _Items:
    train = copied_from or str(copied.get("name", "a train"))

    def place(keys: _Keys) -> Place:
        return Place(".".join(keys), f"{_COPIED} {train}")

    return list(_walk(copied, place))


def _swept_items(swept: Swept) -> _Items:
    items = swept.values.items()
    return [(_keys_of(name), value, Place(name, SECTION, swept.file, swept.line)) for name, value in items]


def _override_items(overrides: Sequence[str]) -> _Items:
    items: _Items = []
    for override in overrides:
        spelling, equals, text = override.partition("=")
        keys = _keys_of(spelling)
        if not equals or not all(keys):
            raise UserError(
                "a value given on the command line has no `=` or no name",
                field="--set",
                value=override,
                expected="name=value, such as learning_rate=5e-5",
            )
        items.append((keys, text.strip(), Place(spelling.strip(), COMMAND_LINE)))
    return items


def _keys_of(spelling: str) -> _Keys:
    keys = tuple(part.strip() for part in spelling.split("."))
    group = canonical_name(keys[0], _TABLE)
    return (group, *keys[1:]) if len(keys) > 1 and group is not None and group in _GROUPS else keys


def _typed_layer(layer: _Layer, method: Method) -> _Layer:
    """What the command line gave, its texts as the values that they stand for."""
    return {name: replace(given, value=_typed(name, given.value, method)) for name, given in layer.items()}


def _typed(name: str, text: Any, method: Method) -> Any:
    """The value of a command-line text. A text field keeps it: `007` stays 007, `fix #3` keeps its `#3`."""
    if not isinstance(text, str):
        return text
    own = own_schema(method, name)
    if not _is_text_field(name, method):
        return parse_scalar(text) if own is not None else canonical_value(name.rpartition(".")[2], parse_scalar(text))
    if text in ("null", "~", "") and (own if own is not None else _TRAIN_FIELDS[name]).get("default") is None:
        return None
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    return parse_scalar(text) if quoted else text


def _is_text_field(name: str, method: Method) -> bool:
    schema = own_schema(method, name) or _TRAIN_FIELDS.get(name, {})
    kinds = [schema, *schema.get("anyOf", [])]
    return any(kind.get("type") == "string" for kind in kinds)


def _preset_items(given: _Given) -> _Items:
    name, preset, source = _find_preset(given)

    def place(keys: _Keys) -> Place:
        return Place(".".join(keys), f"preset {name}", source.path, source.lines.get(("values", *keys)))

    return list(_walk(preset.values, place))


def _profile_items(given: _Given) -> _Items:
    """The values of a profile; its method with them if they have a meaning for that one only."""
    if isinstance(given.value, RecordedProfile):
        origin = f"profile {given.value.name}"
        return list(_walk(given.value.values, lambda keys: Place(".".join(keys), origin)))
    name = str(given.value)
    try:
        profile, source = find_profile(name, load_settings())
    except UserError as error:
        if error.file is not None:
            raise
        raise Problem(error.problem, "profile", given.place, name, error.expected, error.mend).as_error(None) from error

    def place(keys: _Keys) -> Place:
        return Place(".".join(keys), f"profile {name}", source.path, source.lines.get(keys))

    of_method = {"method": profile.method} if profile.method_params else {}
    return list(_walk({**of_method, **profile.values}, place))


def _method_layer(method: Method) -> _Layer:
    """The method's own defaults of a train's fields and of the common hyper-parameters."""
    origin = _method_origin(method)
    hyper = {f"hyperparameters.{name}": value for name, value in method.hyperparameter_defaults.items()}
    values = {**method.train_defaults, **hyper}
    return {name: _Given(name, value, Place(name.rpartition(".")[2], origin)) for name, value in values.items()}


def _of_other_rows(merged: _Layer, method: Method) -> _Layer:
    """Without what the method says about its own rows, where somebody has given others to train on."""
    origin = _method_origin(method)
    if "dataset" not in merged or merged["dataset"].place.origin == origin:
        return merged
    return {name: given for name, given in merged.items() if name not in _ABOUT_ROWS or given.place.origin != origin}


def _method_origin(method: Method) -> str:
    return f"method {method.name}"


def _walk(values: Mapping[str, Any], place: Callable[[_Keys], Place]) -> Iterator[tuple[_Keys, Any, Place]]:
    """The items of a mapping, with `hyperparameters:` and `method_params:` opened one level."""
    for key, value in values.items():
        group = canonical_name(key, _TABLE)
        if group is None or group not in _GROUPS:
            yield (key,), value, place((key,))
        elif isinstance(value, Mapping):
            for inner, inner_value in value.items():
                yield (group, str(inner)), inner_value, place((key, str(inner)))
        elif value is not None:
            raise Problem(_IMPOSSIBLE, key, place((key,)), value, "`name: value` pairs").as_error(None)


def _named(items: _Items, name: str) -> _Given | None:
    """What the items give the train's field of that name, whatever its spelling; None: nothing."""
    found = (_Given(name, value, place) for keys, value, place in items if keys[1:] == () and _is(keys[0], name))
    return next((given for given in found if given.value is not None), None)


def _is(spelling: str, name: str) -> bool:
    return canonical_name(spelling, _TABLE) == name


def _chosen_method(*layers: _Items) -> Method:
    """The method that counts: that of the first of the layers that names one."""
    given = next(filter(None, (_named(items, "method") for items in layers)), None)
    name = canonical_value("method", given.value) if given is not None else None
    if given is None or not isinstance(name, str):  # what is no text is refused with everything else
        return find_method(TrainConfig.model_fields["method"].default)
    try:
        return find_method(name)
    except UserError as error:
        if error.file is not None:  # its manifest is defective
            raise
        raise Problem(error.problem, "method", given.place, name, error.expected, error.mend).as_error(None) from error


def _without_other_method(copied: _Items, method: Method, notes: _Notes) -> _Items:
    """What was copied, without what only the method of the copied train can read, if it is another one."""
    given = _named(copied, "method")
    if given is None or given.value == method.name:
        return copied
    before, kept = known_method(str(given.value)), []
    for keys, value, place in copied:
        own = keys[0] == OWN
        if own or (keys[0] == "hyperparameters" and keys[-1] in method.hyperparameters.unused):
            default = before.parameter_defaults.get(keys[-1]) if own and before is not None else None
            common = Hyperparameters.model_fields[keys[-1]].default if not own else default
            if value != common:
                left_out = f"{place} = {value!r} is left out: the method {method.name} has no such parameter"
                notes.warnings.append(left_out)
            continue
        kept.append((keys, value, place))
    return kept


def _collect(items: _Items, method: Method, notes: _Notes) -> _Layer:
    """Items under their canonical names; refuses unknown names and two spellings that disagree."""
    layer: _Layer = {}
    for keys, value, place in items:
        reason = ignored_reason(keys[-1])
        if reason is not None and keys[0] != "method_params":
            notes.warnings.append(f"{place}: has no effect; {reason}")
            continue
        name = _canonical(keys, method)
        if name is None:
            notes.problems.append(_unknown(keys, place, value, method))
            continue
        given = _Given(name, _plain(name, value, method), place)
        earlier = layer.get(name)
        if earlier is not None and not _same(earlier, given, method):
            notes.problems.append(_disagreement(earlier, given))
            continue
        layer.setdefault(name, given)
    return layer


def _same(one: _Given, other: _Given, method: Method) -> bool:
    values = []
    for item in (one, other):
        value = item.value
        if isinstance(value, str) and not _is_text_field(item.name, method):
            value = parse_scalar(value)
        values.append(value)
    return bool(values[0] == values[1])


def _plain(name: str, value: Any, method: Method) -> Any:
    group, _, last = name.rpartition(".")
    if name.startswith(f"{OWN}."):
        is_switch = (own_schema(method, name) or {}).get("type") == "boolean"
        return canonical_switch(value) if is_switch else value
    schema = _HYPER_FIELDS.get(last) if group else _TRAIN_FIELDS.get(last)
    if schema is not None and schema.get("type") == "boolean":
        return canonical_switch(value)
    return canonical_value(last, value)


def _canonical(keys: _Keys, method: Method) -> str | None:
    """The dotted canonical name of a key path, or None if there is no such parameter.

    A parameter that only the method has is found without its group as well: `beta` is `method_params.beta`.
    """
    if keys[0] == OWN:
        return ".".join((OWN, own_name(method, keys[1]) or keys[1], *keys[2:])) if len(keys) > 1 else None
    inside = keys[1:] if keys[0] == "hyperparameters" else keys
    own = own_name(method, inside[0]) if inside else None
    if own is not None:
        return ".".join((OWN, own, *inside[1:]))
    if len(keys) > 2 or (len(keys) == 2 and keys[0] != "hyperparameters"):
        return None
    name = canonical_name(keys[-1], _TABLE)
    if name in _HYPER_FIELDS:
        return f"hyperparameters.{name}"
    return name if len(keys) == 1 and name not in (None, "hyperparameters", "method_params") else None


def _unknown(keys: _Keys, place: Place, value: object, method: Method) -> Problem:
    names = [*_TRAIN_FIELDS, *_HYPER_FIELDS, *_CHOSEN]
    spellings = [*names, *(spelling for name in names for spelling in SPELLINGS.get(name, ())), *method.parameters]
    table = {**_TABLE, **{spelling_key(name): name for name in method.parameters}}
    found = list(dict.fromkeys(table[spelling_key(item)] for item in nearest(keys[-1], spellings)))
    lists = f"`tuneline methods show {method.name}` lists those of the method {method.name}"
    mend = f"did you mean {' or '.join(found)}?" if found else lists
    if len(keys) == 2 and canonical_name(keys[-1], _TABLE) in _TRAIN_FIELDS:
        mend = f"move {keys[-1]} out of {keys[0]}, to the top level"
    if len(keys) == 1 and canonical_name(keys[0], _TABLE) in _GROUPS:
        mend = f"set its values one by one: {keys[0]}.NAME=value"
    return Problem("there is no such parameter", place.spelling, place, value, mend=mend)


def _disagreement(one: _Given, other: _Given) -> Problem:
    problem = f"{one.place} = {one.value!r} and {other.place} = {other.value!r} are one parameter with two values"
    return Problem(problem, one.name, other.place, mend="keep one of the two")


# Presets


def _chosen(field_name: str, given: str | RecordedProfile | None, *layers: _Items) -> _Given | None:
    """The preset or profile that counts, the argument before the layers."""
    if given is not None:
        return _Given(field_name, given, Place(field_name, COMMAND_LINE))
    return next(filter(None, (_named(items, field_name) for items in layers)), None)


def _find_preset(given: _Given) -> tuple[str, Preset, YamlFile]:
    wanted = spelling_key(str(given.value))
    spellings = []
    for path in _preset_files():
        preset, source = _read_preset(path)
        if wanted in {spelling_key(item) for item in (path.stem, *preset.spellings)}:
            return path.stem, preset, source
        spellings.append(path.stem)
    close = nearest(str(given.value), spellings)
    raise Problem(
        "there is no such preset",
        "preset",
        given.place,
        given.value,
        "one of " + ", ".join(spellings),
        f"did you mean {' or '.join(close)}?" if close else None,
    ).as_error(None)


def _read_preset(path: Path) -> tuple[Preset, YamlFile]:
    source = read_yaml(path)
    try:
        return Preset.model_validate(source.values), source
    except ValidationError as error:
        places = {name: Place(name, f"file {path}", path, source.lines.get((name,))) for name in source.values}
        raise one_error(problems_of(error.errors(), places, {}), path) from error


def _hidden(chosen: _Layer, copied: _Layer, merged: _Layer) -> list[str]:
    """What a preset or profile says and a copied train says otherwise."""
    hidden = [name for name in chosen if name in copied and merged[name].place is copied[name].place]
    differing = [name for name in hidden if chosen[name].value != copied[name].value]
    if not differing:
        return []
    names = ", ".join(name.rpartition(".")[2] for name in differing)
    return [f"the {chosen[differing[0]].place.origin} does not change copied values ({names}); set them by name"]


def _preset_files() -> list[Path]:
    return sorted(PRESETS.glob("*.yaml"), key=lambda path: path.stem)


# Checking


def _resolve_paths(merged: _Layer, method: Method, file: Path | None) -> _Layer:
    """An existing file (a model folder) becomes an absolute path; anything else stays a registered name."""
    resolved = dict(merged)
    for name in (*_PATH_FIELDS, *(f"{OWN}.{own}" for own in method.parameters if method.takes_file(own))):
        given = merged.get(name)
        if given is None or not isinstance(given.value, str) or not given.value:
            continue
        from_file = file is not None and given.place.file is not None
        folders = [file.parent] if from_file and file is not None else []
        found = _existing(given.value, [*folders, Path()], is_model=name == "base_model")
        if found is not None:
            resolved[name] = replace(given, value=str(found))
    return resolved


def _existing(text: str, folders: Sequence[Path], is_model: bool) -> Path | None:
    try:
        written = Path(text).expanduser()
        for folder in folders:
            path = Path(os.path.abspath(folder / written))  # noqa: PTH100 - resolve() would follow links
            if holds_model(path) if is_model else path.is_file():
                return path
    except (OSError, RuntimeError, ValueError):
        # Too long a name, a NUL, no home for `~user`: not a path on this machine, so a name.
        return None
    return None


def _checked(
    merged: _Layer, method: Method, file: Path | None, problems: list[Problem], *, only_given: bool = False
) -> TrainConfig:
    """The configuration; raises what was found before together with what the models and the method find.

    With `only_given` a parameter that the method requires may be missing.
    """
    values: dict[str, Any] = {}
    for given in merged.values():
        _put(values, given)
    places = {name: given.place for name, given in merged.items()}
    of_method = problems_of_method(method, values, places, only_given=only_given)
    try:
        config = TrainConfig.model_validate(values)
    except ValidationError as error:
        of_models = problems_of(error.errors(), places, _EXPECTED)
        told = {problem.field for problem in of_models}
        others = [problem for problem in of_method if problem.field not in told]
        raise one_error([*problems, *of_models, *others], file) from error
    if problems or of_method:
        raise one_error([*problems, *of_method], file)
    return config if only_given else filled(method, config)


def _put(values: dict[str, Any], given: _Given) -> None:
    """Set a nested value by its dotted name. Mappings are copied: they belong to whoever gave them."""
    *groups, last = given.name.split(".")
    for group in groups:
        inner = values.get(group, {})
        if not isinstance(inner, Mapping):
            problem = f"`{group}` is one value, there is nothing inside of it to set"
            raise Problem(problem, given.name, given.place, given.value).as_error(None)
        values[group] = dict(inner)
        values = values[group]
    values[last] = given.value


def _origins(config: TrainConfig, merged: _Layer) -> dict[str, str]:
    names = [name for name in _TRAIN_FIELDS if name not in ("hyperparameters", "method_params")]
    names += [f"hyperparameters.{name}" for name in _HYPER_FIELDS]
    names += [f"method_params.{name}" for name in config.method_params]
    origins = {}
    for name in names:
        inside = [given for key, given in merged.items() if key == name or key.startswith(f"{name}.")]
        origins[name] = inside[-1].place.origin if inside else DEFAULT
    return origins


# Warnings


def _all_warnings(config: TrainConfig, method: Method, merged: _Layer, preset: _Given | None) -> list[str]:
    asked = "tuning" not in method.hyperparameters.unused
    return [
        *_untypical(config, method, merged),
        *_overridden(config, merged),
        *_without_effect(config, method, merged),
        *(_preset_mismatch(config, preset) if asked else []),
    ]


def _untypical(config: TrainConfig, method: Method, merged: _Layer) -> list[str]:
    """A default was chosen with care: only a value that somebody gave is compared."""
    found = []
    for name, schema in _HYPER_FIELDS.items():
        typical = typical_of(schema)
        given = merged.get(f"hyperparameters.{name}")
        value = getattr(config.hyperparameters, name)
        if typical is None or given is None or value is None:
            continue
        if value != method.hyperparameter_default(name) and not is_typical(value, typical):
            found.append(
                f"{name} = {value:g} is outside of the typical range {typical_text(typical)} "
                f"({typical['source']}); from {given.place.origin}"
            )
    return found


def _overridden(config: TrainConfig, merged: _Layer) -> list[str]:
    found = []
    for winner, loser in (("max_steps", "epochs"), ("warmup_steps", "warmup_ratio")):
        value = getattr(config.hyperparameters, winner)
        strong, weak = (merged.get(f"hyperparameters.{name}") for name in (winner, loser))
        if value is not None and strong is not None and weak is not None:
            found.append(
                f"{winner} = {value} ({strong.place.origin}) overrides {loser} = "
                f"{getattr(config.hyperparameters, loser):g} ({weak.place.origin})"
            )
    return found


def _without_effect(config: TrainConfig, method: Method, merged: _Layer) -> list[str]:
    hyper = config.hyperparameters

    def given(name: str) -> bool:
        if f"hyperparameters.{name}" not in merged:
            return False
        return bool(getattr(hyper, name) != method.hyperparameter_default(name))

    found = []
    for name in ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"):
        if hyper.tuning == "full" and given(name):
            found.append(f"{name} has no effect: tuning is full, there is no adapter")
    if hyper.lr_scheduler.startswith("constant") and given("lr_decay_ratio"):
        found.append(f"lr_decay_ratio has no effect: the {hyper.lr_scheduler} schedule does not fall")
    if hyper.lr_scheduler == "constant" and (given("warmup_steps") or given("warmup_ratio")):
        found.append("warm-up has no effect: the constant schedule has none (use constant_with_warmup)")
    if given("evaluation_steps") and config.validation_dataset is None and config.validation_split is None:
        found.append("evaluation_steps has no effect: neither validation_dataset nor validation_split is given")
    if given("early_stopping_threshold") and hyper.early_stopping_patience is None:
        found.append("early_stopping_threshold has no effect: early_stopping_patience is not set")
    for name in ("evaluation_by", "stop_words"):
        if name in merged and merged[name].value is not None and config.evaluation_dataset is None:
            found.append(f"{name} has no effect: there is no evaluation_dataset to be scored")
    if hyper.max_steps is not None and hyper.warmup_steps is not None and hyper.warmup_steps >= hyper.max_steps:
        found.append(f"warmup_steps ({hyper.warmup_steps}) never ends within max_steps ({hyper.max_steps})")
    return found


def _preset_mismatch(config: TrainConfig, given: _Given | None) -> list[str]:
    if given is None:
        return []
    name, preset, _ = _find_preset(given)
    tuning = config.hyperparameters.tuning
    if preset.documented_for in (None, tuning):
        return []
    other = f"; preset {name}-{tuning} is for it" if (PRESETS / f"{name}-{tuning}.yaml").exists() else ""
    return [f"preset {name} is documented for tuning {preset.documented_for}, this train's tuning is {tuning}{other}"]
