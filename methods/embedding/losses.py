"""The losses of the method: which fit which kind of rows, and the library's own with our parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods.contract import Refused
from methods.toolkit import unused

IN_BATCH = ("multiple_negatives", "cached_multiple_negatives")
"""Those that take the other texts of the batch for wrong answers."""

FITTING = {
    "pair": IN_BATCH,
    "triplet": (*IN_BATCH, "triplet"),
    "scored_pair": ("cosent", "cosine"),
}
"""Losses by kind of rows; `auto` is the first."""

_USES: dict[str, set[str]] = {
    "multiple_negatives": {"temperature", "no_duplicates"},
    "cached_multiple_negatives": {"temperature", "no_duplicates", "mini_batch_size"},
    "triplet": {"triplet_margin"},
    "cosent": {"temperature"},
    "cosine": set(),
}
"""The parameters of the method that each loss reads."""


def chosen_loss(p: dict[str, Any], kind: str) -> str:
    """The loss of a train on rows of this kind. Raises Refused for one that does not fit them."""
    fitting = FITTING[kind]
    if p["loss"] == "auto":
        return fitting[0]
    if p["loss"] not in fitting:
        raise Refused(f"loss {p['loss']} does not fit rows of the kind {kind}: {', '.join(fitting)}, or auto")
    return str(p["loss"])


def make_loss(p: dict[str, Any], name: str, model: Any) -> Any:
    """The library's loss of that name; over cut vectors as well with `matryoshka_dims`. Raises Refused."""
    from sentence_transformers.sentence_transformer import losses

    scale = 1 / p["temperature"]
    if name == "multiple_negatives":
        loss = losses.MultipleNegativesRankingLoss(model, scale=scale)
    elif name == "cached_multiple_negatives":
        size = p["mini_batch_size"]
        loss = losses.CachedMultipleNegativesRankingLoss(model, scale=scale, mini_batch_size=size)
    elif name == "triplet":
        metric = losses.TripletDistanceMetric.COSINE
        loss = losses.TripletLoss(model, distance_metric=metric, triplet_margin=p["triplet_margin"])
    elif name == "cosent":
        loss = losses.CoSENTLoss(model, scale=scale)
    else:
        loss = losses.CosineSimilarityLoss(model)
    if p["matryoshka_dims"] is None:
        return loss
    whole = model.get_embedding_dimension()
    if too_long := [size for size in p["matryoshka_dims"] if size >= whole]:
        raise Refused(f"matryoshka_dims {too_long} are no part of a vector of {whole} numbers")
    return losses.MatryoshkaLoss(model, loss, matryoshka_dims=[whole, *sorted(p["matryoshka_dims"], reverse=True)])


def check_scores(name: str, scores: list[float]) -> None:
    """Refuse scores that the loss cannot reach. Raises Refused."""
    if name == "cosine" and (min(scores) < 0 or max(scores) > 1):
        raise Refused(
            f"the loss cosine takes scores from 0 to 1, and these go from {min(scores):g} to {max(scores):g}: choose "
            "cosent, which takes their order only"
        )


def unused_settings(p: dict[str, Any], name: str) -> dict[str, Any]:
    """The parameters of losses with another value than the default that this one makes no use of, by name."""
    of_losses = {parameter for used in _USES.values() for parameter in used}
    return unused.set_in_vain(p, of_losses - _USES[name], unused.manifest_defaults(Path(__file__).parent))
