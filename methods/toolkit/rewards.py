"""What an answer is worth: built-in reward functions, those of a file, and the choice between them.

A reward function is called as `function(prompts, completions, **columns)` and returns one number an answer. `prompts`
are lists of messages, `completions` the texts of the answers; the columns, lists of the same length, are `reference`
(the answer in the dataset), `line` (the row's line in the dataset) and `tokens` (the answer's length in tokens, its
end token included).
"""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from methods.contract import Refused

Function = Callable[..., Sequence[float]]

REWARD_MODEL = "reward_model"
REASONING_TAGS = ("think", "answer")
_MODULE = "tuneline_reward_file"
_FENCED = re.compile(r"```(?:json)?\s*\n(.*?)\n?\s*```", re.DOTALL)
_FINAL = "####"
_NUMBER = re.compile(r"[-+]?\d{1,3}(,\d{3})+(\.\d+)?|[-+]?\d+(\.\d+)?")
# A word of letters and digits, or one character of a script that is written without spaces.
_SPACELESS = r"\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_SPACELESS}]|[^\W{_SPACELESS}]+(?:['’][^\W{_SPACELESS}]+)*")


@dataclass(frozen=True)
class Reward:
    """One reward function with the weight of its values in the sum; `name` names its curve, reward_NAME."""

    name: str
    weight: float
    function: Function


# --- built-in functions ---------------------------------------------------------------------------------------------


def exact(pattern: str | None = None) -> Function:
    """1 where the final answer equals the reference's, else 0.

    The final answer is what the first group of `pattern` holds at its last match, else what follows `####`, else the
    whole text. Case, width, spaces, a full stop at the end and the way a number is written make no difference.
    """
    found = _compiled("exact", pattern) if pattern is not None else None

    def function(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        # A reference without the pattern is an answer all the same; an answer without it is none.
        expected = [_plain(_matched(text, found) or _last(text)) for text in columns["reference"]]
        given = [_last(text) if found is None else _matched(text, found) for text in completions]
        return [float(text is not None and _plain(text) == right) for text, right in zip(given, expected, strict=True)]

    return function


def form(tags: Sequence[str] = REASONING_TAGS) -> Function:
    """1 for an answer made of these tags alone, each once and in order: `<think>…</think><answer>…</answer>`.

    Any other answer earns half of the share of opening and closing tags that it holds exactly once, so that there is
    something to climb.
    """
    marks = [mark for tag in tags for mark in (f"<{tag}>", f"</{tag}>")]
    whole = re.compile(r"\s*".join(rf"{re.escape(f'<{tag}>')}.+?{re.escape(f'</{tag}>')}" for tag in tags), re.DOTALL)

    def value(text: str) -> float:
        once = [text.count(mark) == 1 for mark in marks]
        if all(once) and whole.fullmatch(text.strip()):
            return 1.0
        return sum(once) / len(marks) / 2

    return _of_text(value)


def length(minimum: int | None = None, maximum: int | None = None) -> Function:
    """1 for an answer of `minimum` to `maximum` words; less, in proportion, the further it is from that.

    A Chinese or Japanese character counts as a word. An answer twice as long as the maximum earns 0.
    """
    if minimum is None and maximum is None:
        raise Refused("the reward length takes a minimum, a maximum, or both (in words)")
    if minimum is not None and maximum is not None and minimum > maximum:
        raise Refused(f"the reward length has a minimum of {minimum} words and a maximum of {maximum}")

    def value(text: str) -> float:
        words = count_words(text)
        if minimum is not None and words < minimum:
            return words / minimum
        if maximum is not None and words > maximum:
            return max(0.0, 1 - (words - maximum) / maximum)
        return 1.0

    return _of_text(value)


def json_validity(keys: Sequence[str] = ()) -> Function:
    """1 for an answer that is JSON (in a code fence or not), else 0.

    With `keys` it has to be an object, or a list of objects, and half of the reward is the share of the keys it has.
    """

    def value(text: str) -> float:
        content, valid = _read_json(text)
        if not valid or not keys:
            return float(valid)
        objects = content if isinstance(content, list) else [content]
        if not objects or not all(isinstance(each, dict) for each in objects):
            return 0.0
        found = sum(key in each for each in objects for key in keys)
        return 0.5 + found / (len(objects) * len(keys)) / 2

    return _of_text(value)


def regex(pattern: str) -> Function:
    """1 for an answer in which the regular expression is found (`^` and `$`: its start and end), else 0."""
    found = _compiled("regex", pattern)
    return _of_text(lambda text: float(found.search(text.strip()) is not None))


def count_words(text: str) -> int:
    """Words of a text; a character of a script that is written without spaces is one."""
    return len(_WORD.findall(text))


def _of_text(value: Callable[[str], float]) -> Function:
    def function(prompts: Sequence[Any], completions: Sequence[str], **columns: Any) -> list[float]:
        return [value(text) for text in completions]

    return function


def _compiled(name: str, pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise Refused(f"the pattern of the reward {name} is no regular expression: {error} (in {pattern!r})") from error


def _matched(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """The first group (or all) of the last match of the pattern in a text, None without one."""
    matches = list(pattern.finditer(text)) if pattern is not None else []
    if not matches:
        return None
    return matches[-1][1 if matches[-1].re.groups else 0] or ""


def _last(text: str) -> str:
    """What follows the last `####`, by which some datasets mark the result, or the whole text."""
    return text.rpartition(_FINAL)[2]


def _plain(text: str) -> str:
    """A text without what makes no difference between two answers."""
    plain = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".。 ")
    # 1,234.50 and 1234.5 are one number.
    return f"{float(plain.replace(',', '')):.12g}" if _NUMBER.fullmatch(plain) else plain


def _read_json(text: str) -> tuple[Any, bool]:
    fenced = _FENCED.fullmatch(text.strip())
    try:
        return json.loads(fenced[1] if fenced else text, parse_constant=_no_constant), True
    except (ValueError, RecursionError):
        return None, False


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


_BUILT_IN: dict[str, Callable[..., Function]] = {
    "exact": exact,
    "format": form,
    "length": length,
    "json": json_validity,
    "regex": regex,
}


# --- the choice -----------------------------------------------------------------------------------------------------


def choose_rewards(
    wanted: Sequence[Mapping[str, Any]] | None, of_file: Mapping[str, Function], of_model: Function | None
) -> list[Reward]:
    """The reward functions that a train asks for, as `rewards` of its method names them.

    `of_file` are the functions of its file, `of_model` scores with its reward model. Without a wish it is these, and
    `exact` where neither is given. Raises Refused for a name that is neither built in nor given, for an option that
    the function does not have, and for what is given and not used.
    """
    if not wanted:
        given = [*of_file, *([REWARD_MODEL] if of_model is not None else [])] or ["exact"]
        wanted = [{"name": name} for name in given]
    found: list[Reward] = []
    for each in wanted:
        options = {key: value for key, value in each.items() if key not in ("name", "weight") and value is not None}
        function = _function(each["name"], options, of_file, of_model)
        found.append(Reward(_curve(each["name"], found), float(each.get("weight", 1.0)), function))
    _refuse_unused({each["name"] for each in wanted}, of_file, of_model)
    return found


def _function(
    name: str, options: dict[str, Any], of_file: Mapping[str, Function], of_model: Function | None
) -> Function:
    if name in of_file or name == REWARD_MODEL:
        if options:
            raise Refused(f"the reward {name} has no option {', '.join(options)}: it takes a weight only")
        if name in of_file:
            return of_file[name]
        if of_model is None:
            raise Refused("the reward reward_model takes a model: set the parameter reward_model")
        return of_model
    if name not in _BUILT_IN:
        known = ", ".join([*_BUILT_IN, REWARD_MODEL, *of_file])
        raise Refused(f"there is no reward {name!r}, only {known}; others are functions of the file in reward_file")
    make = _BUILT_IN[name]
    taken = inspect.signature(make).parameters
    unknown = [option for option in options if option not in taken]
    if unknown:
        raise Refused(f"the reward {name} has no option {', '.join(unknown)}: it takes {', '.join(taken)} and weight")
    missing = [option for option, of in taken.items() if of.default is of.empty and option not in options]
    if missing:
        raise Refused(f"the reward {name} needs {', '.join(missing)}")
    return make(**options)


def _curve(name: str, found: Sequence[Reward]) -> str:
    """The name itself, or NAME_2, NAME_3 for one that is used more than once."""
    taken = {reward.name for reward in found}
    count = 1
    while (candidate := name if count == 1 else f"{name}_{count}") in taken:
        count += 1
    return candidate


def _refuse_unused(names: set[str], of_file: Mapping[str, Function], of_model: Function | None) -> None:
    if of_model is not None and REWARD_MODEL not in names:
        raise Refused("reward_model is set, but rewards does not name it: add {name: reward_model}, or leave it out")
    if of_file and not names & set(of_file):
        raise Refused(
            f"reward_file is set, but rewards names none of its functions ({', '.join(of_file)}): "
            "add one, or leave it out"
        )


def score(
    rewards: Sequence[Reward], prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Any]
) -> dict[str, list[float]]:
    """The values of each reward function, by its name, one an answer.

    Raises Refused, with the name of the function and the line of its file, if one fails or returns anything else
    than one finite number an answer.
    """
    return {reward.name: _values(reward, prompts, completions, columns) for reward in rewards}


def weighted_sum(rewards: Sequence[Reward], scores: Mapping[str, Sequence[float]]) -> list[float]:
    """The reward of each answer: what `score` returned, times the weights."""
    columns = [[reward.weight * value for value in scores[reward.name]] for reward in rewards]
    return [sum(values) for values in zip(*columns, strict=True)]


def _values(
    reward: Reward, prompts: Sequence[Any], completions: Sequence[str], columns: Mapping[str, Any]
) -> list[float]:
    try:
        values = list(reward.function(prompts, completions, **columns))
    except Refused:
        raise
    except Exception as error:
        raise Refused(f"the reward {reward.name} failed{_line(error)}: {type(error).__name__}: {error}") from error
    if len(values) != len(completions):
        raise Refused(f"the reward {reward.name} returned {len(values)} values for {len(completions)} answers")
    return [_finite(reward.name, value) for value in values]


def _finite(name: str, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise Refused(f"the reward {name} returned {value!r}, which is no finite number")
    return number


# --- functions of a file --------------------------------------------------------------------------------------------


def read_functions(path: Path) -> dict[str, Function]:
    """The reward functions of a Python file, by name: those it defines itself and whose names begin without `_`.

    Raises Refused, with the line, if the file cannot be run, if it defines none, or if one has a built-in's name.
    """
    module = _run_file(path)
    found: dict[str, Function] = {
        name: value
        for name, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not name.startswith("_")
    }
    if not found:
        raise Refused(f"{path.name} defines no function `def NAME(prompts, completions, **columns) -> list[float]`")
    taken = [name for name in found if name in _BUILT_IN or name == REWARD_MODEL]
    if taken:
        raise Refused(f"{path.name}: {', '.join(taken)} is the name of a built-in reward; choose another")
    return found


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(_MODULE, path)
    if spec is None or spec.loader is None:
        raise Refused(f"{path.name} is no Python file (its name does not end in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[_MODULE] = module  # dataclasses look their module up there
    try:
        spec.loader.exec_module(module)
    except SyntaxError as error:
        raise Refused(f"{path.name} is no Python: {error.msg} (line {error.lineno})") from error
    except Exception as error:
        raise Refused(f"{path.name} cannot be run{_line(error)}: {type(error).__name__}: {error}") from error
    return module


def _line(error: BaseException) -> str:
    """Where an error arose in somebody's file: the innermost of its lines."""
    file = getattr(sys.modules.get(_MODULE), "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f" in line {lines[-1]} of {Path(str(file)).name}" if lines else ""
