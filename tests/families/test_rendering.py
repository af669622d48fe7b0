"""Every family's rows as training reads them: nothing is lost, and a prompt is what the saved model is served with."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from methods.toolkit import chat, tokenizing
from tests.families import family_rows
from tests.families.family_models import BY_NAME, FAMILIES, Family, save_tokenizer

LIMITS = tokenizing.Limits(sequence=4096, prompt=None, answer=None, over_length="error")
NAMES = [family.name for family in FAMILIES]
THINKING = [family.name for family in FAMILIES if family.thinking]
WITH_TOOLS = [family.name for family in FAMILIES if family.tools]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tokenizer of each family, without weights."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {family.name: save_tokenizer(family, root / str(number)) for number, family in enumerate(FAMILIES)}


class Rendering:
    """The rows of a form as a family's training reads them, and its tokenizer as it is saved with the model."""

    def __init__(self, family: Family, folder: Path, rows: list[family_rows.Row], saved: Path) -> None:
        from transformers import AutoTokenizer

        self.family, self.rows = family, rows
        self.tokenizer, self.added = chat.load_tokenizer(str(folder))
        self.tokenizer.save_pretrained(saved)
        self.saved = AutoTokenizer.from_pretrained(saved)
        path = family_rows.write_rows(saved / "rows.jsonl", rows)
        self.tokens, self.report = tokenizing.tokenise_rows(self.tokenizer, path, LIMITS, -1)

    def answers(self) -> list[tuple[list[int], list[int]]]:
        """Of every trained answer: the tokens before it, and its own."""
        found = []
        for row in self.tokens:
            start = 0
            for trained, group in groupby(row["labels"], lambda label: label != chat.IGNORED):
                labels = list(group)
                if trained:
                    found.append((row["input_ids"][:start], labels))
                start += len(labels)
        return found

    def served_prompts(self) -> list[list[int]]:
        """What the saved tokenizer makes of the messages before every answer, by itself."""
        return [
            self.saved.apply_chat_template(
                row["messages"][:place], tools=row.get("tools"), add_generation_prompt=True, return_dict=False
            )
            for row in self.rows
            for place, message in enumerate(row["messages"])
            if message["role"] == "assistant"
        ]

    def token(self, ids: list[int]) -> str:
        return str(self.tokenizer.convert_ids_to_tokens(ids[-1]))

    def text(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids))


@pytest.fixture
def render(folders: dict[str, Path], tmp_path: Path) -> Any:
    def made(name: str, rows: list[family_rows.Row]) -> Rendering:
        return Rendering(BY_NAME[name], folders[name], rows, tmp_path)

    return made


@pytest.mark.parametrize("form", ["one_turn", "many_turns", "with_system"])
@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_trained_after_the_prompt_that_is_served(render: Any, name: str, form: str) -> None:
    rendering = render(name, getattr(family_rows, form)(BY_NAME[name]))
    assert rendering.report.lost == 0
    found = rendering.answers()
    assert len(found) == family_rows.answers_of(rendering.rows)
    assert [before for before, _ in found] == rendering.served_prompts()
    expected = [
        message["content"] for row in rendering.rows for message in row["messages"] if message["role"] == "assistant"
    ]
    for (before, answer), content in zip(found, expected, strict=True):
        assert rendering.token(answer) in BY_NAME[name].ends
        assert content in rendering.text(answer)
        assert rendering.text(before + answer).count(family_rows.RULES) == (form == "with_system")


@pytest.mark.parametrize("name", NAMES)
def test_the_end_tokens_of_a_family_are_known(render: Any, name: str) -> None:
    family = BY_NAME[name]
    tokenizer = render(name, family_rows.one_turn(family)).tokenizer
    ends = set(tokenizer.convert_ids_to_tokens(list(chat.end_tokens(tokenizer))))
    assert {*family.ends, *family.tool_ends, family.eos} <= ends


@pytest.mark.parametrize("name", NAMES)
def test_a_bos_is_there_once(render: Any, name: str) -> None:
    family = BY_NAME[name]
    if family.bos is None or family.bos == family.eos:
        pytest.skip("the family has no BOS of its own")
    rendering = render(name, family_rows.one_turn(family))
    prompt_has = family.bos in (family.template or "bos_token") or "bos_token" in (family.template or "bos_token")
    for row in rendering.tokens:
        assert row["input_ids"].count(rendering.tokenizer.bos_token_id) == int(prompt_has)


@pytest.mark.parametrize("name", NAMES)
def test_trained_tokens_are_those_of_the_training_template_of_trl(render: Any, name: str) -> None:
    from trl.chat_template_utils import get_training_chat_template

    family = BY_NAME[name]
    rendering = render(name, family_rows.one_turn(family))
    rendering.saved.chat_template = family.template
    try:
        template = get_training_chat_template(rendering.saved) if family.template else None
    except ValueError:
        template = None
    if template is None:
        pytest.skip("trl has no training template for the family")
    for row, (before, answer) in zip(rendering.rows, rendering.answers(), strict=True):
        whole = rendering.saved.apply_chat_template(
            row["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        masked = [place for place, trained in enumerate(whole["assistant_masks"]) if trained]
        ours = before + answer
        # What follows the end token is not trained here; an empty thought may belong to the prompt.
        assert whole["input_ids"][: len(ours)] == ours
        assert masked[0] <= len(before)
        assert set(range(len(before), len(ours))) <= set(masked)


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_trained_where_the_family_puts_them(render: Any, name: str) -> None:
    rendering = render(name, family_rows.with_thoughts(BY_NAME[name]))
    assert rendering.report.lost == 0
    found = rendering.answers()
    messages = [message for row in rendering.rows for message in row["messages"] if message["role"] == "assistant"]
    assert len(found) == len(messages)
    for (before, answer), message in zip(found, messages, strict=True):
        assert rendering.token(answer) in BY_NAME[name].ends
        text = rendering.text(answer)
        assert message["content"] in text
        assert text.count(message.get("reasoning_content", "\0")) == ("reasoning_content" in message)
        # A thought of an earlier answer is not shown, and none is opened twice.
        assert rendering.text(before + answer).count("The user is in the") == ("reasoning_content" in message)
        assert rendering.text(before + answer).count("<think>") <= 1 + (name == "GLM-4.5") * (len(before) and 1)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_calls_are_trained_with_their_tools(render: Any, name: str) -> None:
    family = BY_NAME[name]
    rendering = render(name, family_rows.with_tools(family))
    assert rendering.report.lost == 0
    found = rendering.answers()
    messages = [message for row in rendering.rows for message in row["messages"] if message["role"] == "assistant"]
    assert len(found) == len(messages)
    assert [before for before, _ in found] == rendering.served_prompts()
    for (before, answer), message in zip(found, messages, strict=True):
        ends = family.tool_ends if message.get("tool_calls") else family.ends
        assert rendering.token(answer) in ends
        assert ("switch_light" in rendering.text(answer)) is bool(message.get("tool_calls"))
        if name != "DeepSeek-V3":  # its template does not show the tools
            assert "switch_light" in rendering.text(before)
