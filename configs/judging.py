"""How a judge, any model behind an OpenAI-compatible address, scores answers; and what its scores come to."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, ValidationError
from pydantic_core import PydanticCustomError

from configs.scoring import Interval
from configs.strict_yaml import read_yaml
from configs.validation_errors import Place, one_error, problems_of

PLACEHOLDER = re.compile(r"\{\{\s*([^{}]+?)\s*\}\}")
ANSWER, ANSWER_B = "answer", "answer_b"

SCORE_PROMPT = """You grade the answer that an assistant gave to a request.

Request:
{{prompt}}

Reference answer, which is correct:
{{reference}}

Answer to grade:
{{answer}}

Is the answer correct and complete, judged by the reference? Wording does not matter, content does. Give a whole number
from 0 (wrong, or no answer) to {{maximum}} (as good as the reference). Reason in one or two sentences, then end with a
line of this form:
Score: NUMBER
"""

COMPARE_PROMPT = """Two assistants answered the same request. Decide which answer is better.

Request:
{{prompt}}

Reference answer, which is correct:
{{reference}}

Answer A:
{{answer}}

Answer B:
{{answer_b}}

Judge by correctness first, completeness second; neither length nor the order of the two answers counts. Reason in one
or two sentences, then end with a line that is one of these:
Winner: A
Winner: B
Winner: tie
"""


def _base_address(value: str) -> str:
    parts = urlsplit(value)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise PydanticCustomError("address", "no address of a server")
    if parts.username or parts.password or parts.query or parts.fragment:
        # It is recorded with every evaluation.
        raise PydanticCustomError("address", "the address may hold no password, key or query")
    return value.rstrip("/").removesuffix("/chat/completions")


def _judged_prompt(value: str) -> str:
    if ANSWER not in placeholders(value):
        raise PydanticCustomError("prompt", "the prompt shows no answer: it has no {{answer}}")
    return value


def placeholders(prompt: str) -> list[str]:
    """The names between double braces, each once, in order."""
    return list(dict.fromkeys(PLACEHOLDER.findall(prompt)))


Prompt = Annotated[str, Field(min_length=1, max_length=100_000), AfterValidator(_judged_prompt)]


class Judge(BaseModel):
    """A judge, as its YAML file describes it. The key itself stands in the environment and is recorded nowhere."""

    model_config = ConfigDict(extra="forbid")

    address: Annotated[str, AfterValidator(_base_address)] = Field(
        description="Base address of the server, such as https://host/v1.",
    )
    model: str = Field(min_length=1, description="What the server calls the model.")
    key_variable: Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")] = Field(
        default="TUNELINE_JUDGE_KEY", description="Environment variable with the key; without it none is sent."
    )
    prompt: Prompt = Field(
        default=SCORE_PROMPT,
        description="Placeholders: {{prompt}}, {{reference}}, {{answer}}, {{maximum}} and every column of the dataset; "
        "with {{answer_b}} the first model's answer is compared with each other's.",
    )
    maximum: Annotated[int, Field(ge=1, le=100)] = Field(default=5, description="The best score; 0 is the worst.")
    max_tokens: Annotated[int, Field(ge=1)] = Field(default=512, description="Longest reply of the judge, in tokens.")
    at_a_time: Annotated[int, Field(ge=1, le=64)] = Field(default=4, description="Questions on their way at once.")
    timeout: Annotated[float, Field(gt=0)] = Field(default=120.0, description="Seconds to wait for a reply.")
    attempts: Annotated[int, Field(ge=1, le=10)] = Field(
        default=3, description="How often a question is asked if the server is busy or away."
    )

    @property
    def compares(self) -> bool:
        """Whether it compares two answers instead of scoring one."""
        return ANSWER_B in placeholders(self.prompt)


def read_judge(path: Path) -> Judge:
    """The judge of a YAML file; `prompt: compare` is the prompt for pairs that ships.

    Raises UserError, with the line, for what is wrong.
    """
    source = read_yaml(path)
    values = dict(source.values)
    if values.get("prompt") == "compare":
        values["prompt"] = COMPARE_PROMPT
    try:
        return Judge.model_validate(values)
    except ValidationError as error:
        places = {name: Place(name, f"file {path}", path, source.lines.get((name,))) for name in source.values}
        raise one_error(problems_of(error.errors(), places, {}), path) from error


Winner = Literal["first", "other", "tie"]


class Judgement(BaseModel):
    """What the judge said of one row. Neither a score nor a winner: it could not be read, or there was no reply."""

    model_config = ConfigDict(frozen=True)

    row: int
    score: float | None = None
    winner: Winner | None = None
    replies: tuple[str, ...] = Field(default=(), description="In full; of a pair one for each order.")
    failure: str | None = Field(default=None, description="Why there was no reply.")


class JudgedScores(BaseModel):
    """What a judge's scores of one model come to; 0 to `maximum`."""

    maximum: int
    rows: int = Field(description="Rows with a score; the figures are of these.")
    unparsable: int = Field(description="Replies in which no score could be found.")
    failed: int = Field(description="Rows that the judge did not reply to.")
    mean: float | None = None
    interval: Interval | None = None
    deviation: float | None = Field(default=None, description="Standard deviation.")
    median: float | None = None
    distribution: dict[str, int] = Field(default_factory=dict, description="How many rows got each score.")


class JudgedPairs(BaseModel):
    """How often a judge found the other model's answer better than the first's."""

    rows: int = Field(description="Rows that were judged in both orders.")
    unparsable: int
    failed: int
    wins: int = Field(description="The other's answer is better, whichever stands first.")
    losses: int
    ties: int = Field(description="Called equal, or decided by the order of the answers alone.")
    by_order: int = Field(description="Of the ties, those where each order had another winner.")
    p: float | None = Field(default=None, description="Exact sign test: could the two be equally good?")
