"""Blocks made into batches, and the proof that documents of one block do not see each other."""

from __future__ import annotations

from typing import Any

import torch

from methods.contract import Refused
from methods.toolkit.chat import IGNORED

_PROBE_TOKENS = 12
_SHARE = 0.1  # of what another document's tokens would change: above it is no rounding


COUNTS = "token_counts"
"""Tensor of a batch without an attention mask: tokens of each row. For the trainer, not for the model."""


class BlockCollator:
    """Pads blocks to the longest one of a batch; every token that follows from another one is a label.

    With `separate` there is no attention mask. Instead the positions start at 0 with each document, by which the models
    of transformers tell documents apart, and the first token of a document is no label. Padding is a document too.
    """

    def __init__(self, pad_token_id: int, *, separate: bool) -> None:
        self.pad_token_id, self.separate = pad_token_id, separate

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Tensors (rows, tokens of the longest row): ids, labels, and attention mask or positions."""
        shape = (len(rows), max(len(row["input_ids"]) for row in rows))
        ids, labels = torch.full(shape, self.pad_token_id), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.long)
        for number, row in enumerate(rows):
            length = len(row["input_ids"])
            ids[number, :length] = labels[number, :length] = torch.tensor(row["input_ids"])
            mask[number, :length] = 1
        if not self.separate:
            return {"input_ids": ids, "labels": labels, "attention_mask": mask}
        positions = torch.stack([_positions(row, shape[1]) for row in rows])
        labels[positions == 0] = IGNORED
        return {"input_ids": ids, "labels": labels, "position_ids": positions, COUNTS: mask.sum(dim=1)}


def _positions(row: dict[str, Any], width: int) -> torch.Tensor:
    """The position of each token in its document, or in the part of it that the block holds."""
    starts = sorted({0, *row["starts"], len(row["input_ids"])} - {width})
    ends = [*starts[1:], width]
    return torch.cat([torch.arange(end - start) for start, end in zip(starts, ends, strict=True)])


def require_separation(model: Any) -> None:
    """Refuse a model in which a document of a block sees the one before it, whatever the positions say."""
    size = model.config.get_text_config().vocab_size
    ids = torch.randint(size, (1, 2 * _PROBE_TOKENS), generator=torch.Generator().manual_seed(0)).to(model.device)
    second = ids[:, _PROBE_TOKENS:]
    positions = torch.arange(_PROBE_TOKENS, device=model.device).repeat(2)[None]
    training = model.training
    model.eval()
    with torch.no_grad():
        alone = model(input_ids=second, use_cache=False).logits
        together = model(input_ids=ids, use_cache=False).logits[:, _PROBE_TOKENS:]
        separate = model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, _PROBE_TOKENS:]
    model.train(training)
    if float((separate - alone).abs().max()) > _SHARE * float((together - alone).abs().max()):
        raise Refused(
            f"separate_documents: this model ({type(model).__name__}) sees the documents before one in its block, "
            "although their positions say not to. Set separate_documents: false, or packing: false."
        )
