"""Evaluations as `tasks.evaluation` makes them, of answers that are simply told."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

from configs.datasets import DatasetVersion
from configs.scoring import ScoringOptions
from tasks.evaluation import Evaluation, score_answers
from tasks.inference import Answer


def evaluation_of(
    answers: Sequence[tuple[str, str, str]],
    extra: Sequence[dict[str, Any]] | None = None,
    *,
    model: str = "a model",
    dataset: str = "test@0123456789ab",
    options: ScoringOptions | None = None,
) -> Evaluation:
    """The evaluation of `(prompt, reference, prediction)` rows; a prediction that ends in … was cut at the limit."""
    rows = [
        {
            "messages": [{"role": "user", "content": prompt}, {"role": "assistant", "content": reference}],
            "extra": extra[index] if extra else {},
        }
        for index, (prompt, reference, _) in enumerate(answers)
    ]
    given = [
        Answer(answer=prediction, tokens=1, hit_limit=prediction.endswith("…"), prompt_token_ids=[])
        for _, _, prediction in answers
    ]
    version = cast("DatasetVersion", SimpleNamespace(reference=dataset))
    return score_answers(model, version, rows, given, options)
