"""How well a model finds what belongs together: figures over held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from methods.embedding import encoders, rows

DEEPEST = 10


def measure(model: Any, path: Path, batch_size: int) -> dict[str, float]:
    """The figures of a model on stored rows: of ranking for pairs and triplets, `spearman` for scored pairs."""
    kind, found = rows.read_rows(path)
    return measure_rows(model, kind, found, batch_size)


def measure_rows(model: Any, kind: str, found: list[dict[str, Any]], batch_size: int) -> dict[str, float]:
    """As `measure`, of rows that are read already."""
    if kind == "scored_pair":
        first, second = (
            encoders.encode(model, [row[column] for row in found], batch_size=batch_size)
            for column in rows.COLUMNS[kind]
        )
        alike = torch.nn.functional.cosine_similarity(first, second)
        return {"spearman": spearman(alike, torch.tensor([float(row[rows.SCORE]) for row in found]))}
    anchors, documents, relevant = ranking_task(found)
    queries = encoders.encode(model, anchors, "query", batch_size)
    targets = encoders.encode(model, documents, "document", batch_size)
    similarities = model.similarity(queries, targets)
    return ranking_figures(similarities, relevant)


def ranking_task(found: list[dict[str, Any]]) -> tuple[list[str], list[str], list[set[int]]]:
    """The different anchors, the different texts they are looked for among, and which of them are right for each.

    The texts are the positives and the negatives of all rows.
    """
    documents: dict[str, int] = {}
    relevant: dict[str, set[int]] = {}
    for row in found:
        place = documents.setdefault(row["positive"], len(documents))
        relevant.setdefault(row["anchor"], set()).add(place)
        if "negative" in row:
            documents.setdefault(row["negative"], len(documents))
    return list(relevant), list(documents), list(relevant.values())


def ranking_figures(similarities: torch.Tensor, relevant: list[set[int]]) -> dict[str, float]:
    """Means over the queries of what stands at the top of each ranking.

    `similarities` is (queries, documents), `relevant` the columns that are right for each query. accuracy_at_1: whether
    the first is right; recall_at_5: share of the right ones among the first five; mrr_at_10: one divided by the place
    of the first right one, 0 if it is none of ten; ndcg_at_10: the right ones weighted by 1 / log2(1 + place), divided
    by the most that can be had.
    """
    depth = min(DEEPEST, similarities.shape[1])
    ranked = similarities.topk(depth, dim=1).indices.tolist()
    gains = [1.0 / float(torch.log2(torch.tensor(place + 1.0))) for place in range(1, DEEPEST + 1)]
    sums = dict.fromkeys(("ndcg_at_10", "mrr_at_10", "recall_at_5", "accuracy_at_1"), 0.0)
    for order, right in zip(ranked, relevant, strict=True):
        hits = [document in right for document in order]
        sums["ndcg_at_10"] += sum(gain for gain, hit in zip(gains, hits, strict=False) if hit) / sum(
            gains[: len(right)]
        )
        sums["mrr_at_10"] += next((1.0 / place for place, hit in enumerate(hits, start=1) if hit), 0.0)
        sums["recall_at_5"] += sum(hits[:5]) / len(right)
        sums["accuracy_at_1"] += float(hits[0])
    return {name: value / len(relevant) for name, value in sums.items()}


def spearman(left: torch.Tensor, right: torch.Tensor) -> float:
    """Spearman's rank correlation of two series, equal values sharing their mean rank; 0 where one does not vary."""
    ranks = torch.stack([_ranks(left.double()), _ranks(right.double())])
    if not bool((ranks.std(dim=1) > 0).all()):
        return 0.0
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(values: torch.Tensor) -> torch.Tensor:
    _, place, count = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    end = count.cumsum(0).double()
    return (end - (count.double() - 1) / 2)[place]
