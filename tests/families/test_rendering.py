"""Every family's rows as training reads them: nothing is lost, and a prompt is what the saved model is served with."""

from __future__ import annotations

from datetime import date, timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import pytest

from methods.toolkit import chat, chat_template, tokenizing
from tasks.stages import StageJob
from tests.families import family_rows
from tests.families.family_models import BY_NAME, FAMILIES, Family, save_tokenizer
from tests.methods.stage_jobs import open_job

LIMITS = tokenizing.Limits(sequence=4096, prompt=None, answer=None, over_length="error")
NAMES = [family.name for family in FAMILIES]
THINKING = [family.name for family in FAMILIES if family.thinking]
WITH_TOOLS = [family.name for family in FAMILIES if family.tools]
DATED = [family.name for family in FAMILIES if family.dated]

Thinking = Literal["auto", "on", "off"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tokenizer of each family, without weights."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {family.name: save_tokenizer(family, root / str(number)) for number, family in enumerate(FAMILIES)}


class Rendering:
    """The rows of a form as a family's training reads them, and its tokenizer as it is saved with the model."""

    def __init__(self, folder: Path, rows: list[family_rows.Row], work: Path, thinking: Thinking = "auto") -> None:
        from transformers import AutoTokenizer

        path = family_rows.write_rows(work / "rows.jsonl", rows)
        job = StageJob(
            stage="training",
            parameters={"thinking": thinking},
            inputs={"base_model": str(folder), "train_rows": str(path)},
            output=work / "output",
            seed=0,
        )
        self.rows = rows
        self.tokenizer = chat.training_tokenizer(open_job(work, job))
        self.tokens, self.report = tokenizing.tokenise_rows(self.tokenizer, path, LIMITS, -1)
        chat.save_tokenizer(self.tokenizer, job.output)
        self.saved = AutoTokenizer.from_pretrained(job.output)

    @property
    def messages(self) -> list[family_rows.Row]:
        """Every answer of the rows."""
        return [message for row in self.rows for message in row["messages"] if message["role"] == "assistant"]

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

    def served_prompts(self, *, by_thought: bool = False) -> list[list[int]]:
        """What the saved tokenizer makes of the messages before every answer.

        By itself, or, `by_thought`, asked to think where the answer holds a thought, and else not to.
        """
        return [
            self.saved.apply_chat_template(
                row["messages"][:place],
                tools=row.get("tools"),
                add_generation_prompt=True,
                return_dict=False,
                **({"enable_thinking": "reasoning_content" in message} if by_thought else {}),
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
    def made(name: str, rows: list[family_rows.Row], thinking: Thinking = "auto") -> Rendering:
        return Rendering(folders[name], rows, tmp_path, thinking)

    return made


@pytest.mark.parametrize("form", ["one_turn", "many_turns", "with_system"])
@pytest.mark.parametrize("name", NAMES)
def test_every_answer_is_trained_after_the_prompt_that_is_served(render: Any, name: str, form: str) -> None:
    rendering = render(name, getattr(family_rows, form)(BY_NAME[name]))
    assert rendering.report.lost == 0
    found = rendering.answers()
    assert [before for before, _ in found] == rendering.served_prompts()
    for (before, answer), message in zip(found, rendering.messages, strict=True):
        assert rendering.token(answer) in BY_NAME[name].ends
        assert rendering.text(answer[:-1]).strip() == said(name, message["content"])
        assert rendering.text(before + answer).count(family_rows.RULES) == (form == "with_system")


def said(name: str, content: str) -> str:
    """What the family's model writes to say so, without its end token."""
    return f"<|channel|>final<|message|>{content}" if name == "gpt-oss" else content


@pytest.mark.parametrize("name", [name for name in NAMES if BY_NAME[name].rewrites])
def test_a_conversation_whose_turns_are_rewritten_is_a_row_for_each_answer_or_for_the_last(
    folders: dict[str, Path], render: Any, tmp_path: Path, name: str
) -> None:
    rows = family_rows.many_turns(BY_NAME[name])
    rendering = render(name, rows)
    assert rendering.report.split == len(rows)
    assert rendering.report.kept == family_rows.answers_of(rows)
    last = tokenizing.Turns(rewritten="last")
    _, report = tokenizing.tokenise_rows(rendering.tokenizer, tmp_path / "rows.jsonl", LIMITS, -1, last)
    assert report.kept == len(rows)
    assert report.answers_untrained == family_rows.answers_of(rows) - len(rows)


@pytest.mark.parametrize("name", NAMES)
def test_the_end_tokens_of_a_family_are_known(render: Any, name: str) -> None:
    family = BY_NAME[name]
    tokenizer = render(name, family_rows.one_turn(family)).tokenizer
    ends = set(tokenizer.convert_ids_to_tokens(chat.end_tokens(tokenizer)))
    configured = family.generation["eos_token_id"]
    assert ends == {
        *family.ends,
        *family.tool_ends,
        family.eos,
        *([configured] if isinstance(configured, str) else configured),
    }


@pytest.mark.parametrize("name", [family.name for family in FAMILIES if family.bos not in (None, family.eos)])
def test_a_bos_is_there_once_where_the_family_has_one(render: Any, name: str) -> None:
    family = BY_NAME[name]
    rendering = render(name, family_rows.one_turn(family))
    written = family.template is None or "bos_token" in family.template
    for row in rendering.tokens:
        assert row["input_ids"].count(rendering.tokenizer.bos_token_id) == int(written)
        assert not written or row["input_ids"][0] == rendering.tokenizer.bos_token_id


@pytest.mark.parametrize("name", NAMES)
def test_trained_tokens_are_those_of_the_training_template_of_trl(render: Any, name: str) -> None:
    family = BY_NAME[name]
    rendering = render(name, family_rows.one_turn(family))
    template = training_template(family, rendering.saved)
    if template is None:
        pytest.skip("trl has no training template for the family")
    require_same_as_masked(rendering, template, thinking=False)


@pytest.mark.parametrize("name", [name for name in THINKING if not name.startswith("DeepSeek")])
def test_trained_thoughts_are_those_of_the_training_template_of_trl(render: Any, name: str) -> None:
    """DeepSeek's templates have no place for a thought: trl's take it as part of the answer's text."""
    rows = [row for row in family_rows.with_thoughts(BY_NAME[name]) if len(row["messages"]) == 2]
    rendering = render(name, [row for row in rows if "reasoning_content" in row["messages"][-1]])
    template = training_template(BY_NAME[name], rendering.saved)
    assert template is not None
    require_same_as_masked(rendering, template, thinking=True)


def training_template(family: Family, tokenizer: Any) -> str | None:
    """The template with marked answers that trl has for the family's own."""
    from trl.chat_template_utils import get_training_chat_template

    if family.template is None:
        return None
    tokenizer.chat_template = family.template
    try:
        found: str | None = get_training_chat_template(tokenizer)
    except ValueError:
        return None
    return found


def require_same_as_masked(rendering: Rendering, template: str, *, thinking: bool) -> None:
    for row, (before, answer) in zip(rendering.rows, rendering.answers(), strict=True):
        question, said = row["messages"]
        whole = rendering.saved.apply_chat_template(
            [question, {**said, "thinking": said["reasoning_content"]} if thinking else said],
            chat_template=template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            enable_thinking=thinking,
        )
        ids, mask = whole["input_ids"], whole["assistant_masks"]
        masked = [token for token, trained in zip(ids, mask, strict=True) if trained]
        # What follows the end token is not trained here, and an empty thought belongs to the prompt.
        end = len(masked) - masked[::-1].index(answer[-1])
        assert masked[:end][-len(answer) :] == answer
        if "</think>" not in rendering.text(before) or rendering.text(before) in rendering.text(ids):
            assert ids[: len(before) + len(answer)] == before + answer


@pytest.mark.parametrize("name", THINKING)
def test_thoughts_are_trained_where_the_family_puts_them(render: Any, name: str) -> None:
    rendering = render(name, family_rows.with_thoughts(BY_NAME[name]))
    assert rendering.report.lost == 0
    found = rendering.answers()
    assert [before for before, _ in found] == rendering.served_prompts(by_thought=True)
    for (before, answer), message in zip(found, rendering.messages, strict=True):
        assert rendering.token(answer) in BY_NAME[name].ends
        assert rendering.text(answer[:-1]).endswith(said(name, message["content"]))
        thought = message.get("reasoning_content")
        assert rendering.text(answer).count(thought or "The user is in") == (thought is not None)
        assert "The user is in" not in rendering.text(before)  # a thought of an earlier answer is not shown


@pytest.mark.parametrize("name", THINKING)
@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_thinking_switches_thoughts_in_training_and_serving(render: Any, name: str, thinking: Thinking) -> None:
    """Rows that hold thoughts all: on and auto train them, off leaves them out, and says so."""
    rows = [row for row in family_rows.with_thoughts(BY_NAME[name]) if "reasoning_content" in row["messages"][-1]]
    rendering = render(name, rows, thinking)
    assert rendering.report.thoughts_left_out == (0 if thinking != "off" else len(rows))
    found = rendering.answers()
    assert [before for before, _ in found] == rendering.served_prompts()
    for _, answer in found:
        assert ("The user is in" in rendering.text(answer)) is (thinking != "off")


def test_deepseek_r1_opens_one_thought_in_the_prompt(render: Any) -> None:
    rendering = render("DeepSeek-R1 distill", family_rows.with_thoughts(BY_NAME["DeepSeek-R1 distill"]))
    for (before, answer), message in zip(rendering.answers(), rendering.messages, strict=True):
        last = rendering.text(before).rpartition("<｜Assistant｜>")[2] + rendering.text(answer)
        thought = message.get("reasoning_content")
        assert last.count("<think>") == last.count("</think>") == 1
        assert last.startswith("<think>\n")
        assert ("</think>" in rendering.text(answer)) is (thought is not None)


@pytest.mark.parametrize("name", WITH_TOOLS)
def test_tool_calls_are_trained_with_their_tools(render: Any, name: str) -> None:
    family = BY_NAME[name]
    rendering = render(name, family_rows.with_tools(family))
    assert rendering.report.lost == 0
    found = rendering.answers()
    assert [before for before, _ in found] == rendering.served_prompts()
    for (before, answer), message in zip(found, rendering.messages, strict=True):
        called = bool(message.get("tool_calls"))
        assert rendering.token(answer) in (family.tool_ends if called else family.ends)
        assert ("switch_light" in rendering.text(answer)) is called
        assert "Switch the light of a room." in rendering.text(before)


@pytest.mark.parametrize("name", DATED)
def test_a_template_with_a_date_prints_that_of_the_training_and_saved_that_of_the_day(
    folders: dict[str, Path], tmp_path: Path, name: str
) -> None:
    from transformers import AutoTokenizer

    asked = [family_rows.question("kitchen")]
    later = date.today() + timedelta(days=40)
    tokenizer, _ = chat.load_tokenizer(str(folders[name]), chat_template.TemplateSettings(today=later))
    fixed = chat.render_prompt(tokenizer, asked)
    assert str(later.year) in tokenizer.decode(fixed)
    chat.save_tokenizer(tokenizer, tmp_path)
    today = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        asked, add_generation_prompt=True, return_dict=False
    )
    assert today != fixed
    assert today == chat.render_prompt(chat.load_tokenizer(str(tmp_path))[0], asked)
    again, _ = chat.load_tokenizer(str(tmp_path), chat_template.TemplateSettings(today=later))
    assert chat.render_prompt(again, asked) == fixed
