"""Reward functions: what an answer in English or Chinese is worth, which ones a train gets, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from methods.contract import Refused
from methods.toolkit import rewards
from methods.toolkit.rewards import Function, Reward

PROMPT = [{"role": "user", "content": "?"}]


def values(function: Function, completions: list[str], references: list[str] | None = None) -> list[float]:
    references = references or [""] * len(completions)
    columns: dict[str, Any] = {
        "reference": references,
        "line": list(range(1, len(completions) + 1)),
        "tokens": [len(text) for text in completions],
    }
    return list(function([PROMPT] * len(completions), completions, **columns))


def one(function: Function, completion: str, reference: str = "") -> float:
    return values(function, [completion], [reference])[0]


# --- built-in functions ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reference", "expected"),
    [
        ("Paris", "Paris", 1),
        (" paris. ", "Paris", 1),
        ("Lyon", "Paris", 0),
        ("Paris, France", "Paris", 0),
        ("", "Paris", 0),
        ("木星。", "木星", 1),
        ("土星", "木星", 0),
        ("４２", "42", 1),
        ("1,234.50", "1234.5", 1),
        ("42.0", "42", 1),
        ("42", "4", 0),
        ("1,23", "123", 0),
        ("two  words", "two words", 1),
        ("6 times 7 is 42 #### 42", "so 42\n#### 42", 1),
        ("42", "6 × 7 = 42\n#### 42", 1),
        ("#### 41", "#### 42", 0),
    ],
)
def test_exact_compares_the_final_answer(answer: str, reference: str, expected: float) -> None:
    assert one(rewards.exact(), answer, reference) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>6×7</think><answer>42</answer>", 1),
        ("<answer>41</answer> no: <answer> 42 </answer>", 1),
        ("<answer>42</answer> no: <answer>41</answer>", 0),
        ("42", 0),
        ("<answer></answer>", 0),
    ],
)
def test_exact_finds_the_answer_by_its_pattern(answer: str, expected: float) -> None:
    function = rewards.exact("<answer>(.*?)</answer>")
    assert one(function, answer, "6 × 7 = 42\n#### 42") == expected
    assert one(function, answer, "<answer>42</answer>") == expected
    assert one(function, answer, "42") == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("<think>\n想一想\n</think>\n<answer>\n四十二\n</answer>\n", 1),
        ("<answer>b</answer>", 0.25),
        ("<think>a</think><answer>b", 0.375),
        ("<think>a</think><answer>b</answer> and more", 0.5),
        ("<answer>b</answer><think>a</think>", 0.5),
        ("<think>a</think><think>c</think><answer>b</answer>", 0.25),
        ("<think></think><answer></answer>", 0.5),
        ("", 0),
    ],
)
def test_format_is_worth_most_where_the_tags_are_whole_and_alone(answer: str, expected: float) -> None:
    assert one(rewards.form(), answer) == expected


def test_format_takes_other_tags() -> None:
    assert values(rewards.form(["result"]), ["<result>1</result>", "<answer>1</answer>"]) == [1, 0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", 0),
        ("two words", 2),
        ("it's 42 o'clock, isn't it?", 5),
        ("今天天气很好。", 6),
        ("用 Python 3 写的", 5),
        ("コーヒー", 4),
        ("Grüße aus Köln", 3),
        ("--- !?", 0),
    ],
)
def test_words_are_counted_in_any_script(text: str, words: int) -> None:
    assert rewards.count_words(text) == words


def test_length_falls_with_the_distance_from_its_bounds() -> None:
    function = rewards.length(minimum=4, maximum=8)
    texts = [" ".join(["word"] * count) for count in (0, 1, 4, 8, 10, 16, 40)]
    assert values(function, texts) == [0, 0.25, 1, 1, 0.75, 0, 0]
    assert values(rewards.length(maximum=4), ["今天很好", "今天天气很好"]) == [1, 0.5]
    assert one(rewards.length(minimum=2), "three or more words") == 1
    with pytest.raises(Refused, match="takes a minimum, a maximum, or both"):
        rewards.length()
    with pytest.raises(Refused, match="minimum of 9 words and a maximum of 3"):
        rewards.length(9, 3)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ('{"room": "厨房"}', 1),
        ("[1, 2]", 1),
        ('```json\n{"room": 1}\n```', 1),
        ('Here: {"room": 1}', 0),
        ('{"room": 1', 0),
        ("{'room': 1}", 0),
        ('{"room": NaN}', 0),
        ("[" * 100_000, 0),
        ("", 0),
    ],
)
def test_json_is_valid_or_not(answer: str, expected: float) -> None:
    assert one(rewards.json_validity(), answer) == expected


def test_json_with_keys_is_worth_more_the_more_it_has() -> None:
    function = rewards.json_validity(["room", "level"])
    answers = ['{"room": 1, "level": 2}', '{"room": 1}', "{}", '[{"room": 1}, {"room": 1, "level": 2}]', "[]", "3", "x"]
    assert values(function, answers) == [1, 0.75, 0.5, 0.875, 0, 0, 0]


def test_regex_is_found_anywhere_unless_it_is_anchored() -> None:
    assert values(rewards.regex(r"\d+"), ["a 1", "b", "第3天"]) == [1, 0, 1]
    assert values(rewards.regex(r"^\d+$"), [" 12\n", "a 1"]) == [1, 0]
    with pytest.raises(Refused, match="pattern of the reward regex is no regular expression"):
        rewards.regex("(")


# --- the choice -----------------------------------------------------------------------------------------------------


def constant(value: float) -> Function:
    return lambda prompts, completions, **columns: [value] * len(completions)


def names(found: list[Reward]) -> list[tuple[str, float]]:
    return [(reward.name, reward.weight) for reward in found]


def test_the_rewards_of_a_train_are_those_it_names_with_their_weights_and_options() -> None:
    found = rewards.choose_rewards(
        [
            {"name": "regex", "pattern": "a"},
            {"name": "regex", "pattern": "b", "weight": 3},
            {"name": "reward_model", "weight": -0.5},
            {"name": "polite"},
        ],
        {"polite": constant(2)},
        constant(10),
    )
    assert names(found) == [("regex", 1), ("regex_2", 3), ("reward_model", -0.5), ("polite", 1)]
    scores = rewards.score(found, [PROMPT] * 2, ["ab", "b"], {"reference": ["", ""]})
    assert scores == {"regex": [1, 0], "regex_2": [1, 1], "reward_model": [10, 10], "polite": [2, 2]}
    assert rewards.weighted_sum(found, scores) == [1, 0]


def test_without_a_wish_what_is_given_is_used_and_else_the_exact_answer() -> None:
    assert names(rewards.choose_rewards(None, {}, None)) == [("exact", 1)]
    assert names(rewards.choose_rewards(None, {"polite": constant(1)}, constant(1))) == [
        ("polite", 1),
        ("reward_model", 1),
    ]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"name": "exakt"}, r"no reward 'exakt', only exact, format, length, json, regex, reward_model, polite"),
        ({"name": "exact", "minimum": 3}, r"exact has no option minimum: it takes pattern and weight"),
        ({"name": "regex"}, r"regex needs pattern"),
        ({"name": "polite", "keys": ["a"]}, r"polite has no option keys: it takes a weight only"),
        ({"name": "reward_model"}, r"takes a model: set the parameter reward_model"),
        ({"name": "exact"}, r"reward_file is set, but rewards names none of its functions \(polite\)"),
    ],
)
def test_a_reward_that_cannot_be_is_refused_with_the_way_out(wanted: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=message):
        rewards.choose_rewards([wanted], {"polite": constant(1)}, None)


def test_a_reward_model_that_nothing_asks_is_refused() -> None:
    with pytest.raises(Refused, match="reward_model is set, but rewards does not name it"):
        rewards.choose_rewards([{"name": "exact"}], {}, constant(1))


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0], r"returned 1 values for 2 answers"),
        ([1.0, float("nan")], r"returned nan, which is no finite number"),
        ([1.0, None], r"returned None"),
        ([1.0, "1"], r"returned '1'"),
    ],
)
def test_what_a_function_returns_has_to_be_one_number_an_answer(returned: list[Any], message: str) -> None:
    reward = Reward("odd", 1.0, lambda prompts, completions, **columns: returned)
    with pytest.raises(Refused, match=f"the reward odd {message}"):
        rewards.score([reward], [PROMPT] * 2, ["a", "b"], {})


# --- functions of a file --------------------------------------------------------------------------------------------


def test_the_functions_of_a_file_are_those_it_defines(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(
        "from dataclasses import dataclass\nfrom statistics import mean\n\n"
        "@dataclass\nclass Scale:\n    top: float = 2.0\n\n"
        "def _helper(text):\n    return len(text)\n\n"
        "def short(prompts, completions, **columns):\n"
        "    return [Scale().top / _helper(text) for text in completions]\n"
        "def right(prompts, completions, reference, **columns):\n"
        "    return [text == wanted for text, wanted in zip(completions, reference)]\n"
    )
    found = rewards.read_functions(path)
    assert list(found) == ["short", "right"]
    chosen = rewards.choose_rewards(None, found, None)
    columns = {"reference": ["ab", "x"], "line": [1, 2], "tokens": [1, 1]}
    assert rewards.score(chosen, [PROMPT] * 2, ["ab", "abcd"], columns) == {"short": [1.0, 0.5], "right": [1.0, 0.0]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", r"mine.py is no Python: .* \(line 1\)"),
        ("\nimport not_there_at_all\n", r"mine.py cannot be run in line 2 of mine.py: ModuleNotFoundError"),
        ("VALUE = 1\n", r"mine.py defines no function `def NAME\(prompts, completions, \*\*columns\)"),
        ("def exact(prompts, completions, **columns):\n    return []\n", r"exact is the name of a built-in reward"),
    ],
)
def test_a_file_without_usable_functions_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(Refused, match=message):
        rewards.read_functions(path)


def test_a_function_that_fails_is_refused_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def bad(prompts, completions, **columns):\n    x = 1\n    return [1 / 0 for _ in completions]\n")
    chosen = rewards.choose_rewards(None, rewards.read_functions(path), None)
    with pytest.raises(Refused, match=r"the reward bad failed in line 3 of mine.py: ZeroDivisionError"):
        rewards.score(chosen, [PROMPT], ["a"], {})
