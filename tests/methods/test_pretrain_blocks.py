"""Documents become the blocks that they are trained in: token by token as counted by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from methods import contract
from methods.pretrain import batches, blocks
from methods.toolkit import chat, documents, models
from methods.toolkit.documents import Block
from tests.methods.stage_jobs import open_job, training_job

A, B, C = [1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11]


def write_documents(path: Path, *texts: str) -> Path:
    lines = (json.dumps({"line": n, "text": text}, ensure_ascii=False) + "\n" for n, text in enumerate(texts, start=1))
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_packed_documents_fill_every_block_and_the_last_one_holds_the_rest() -> None:
    assert list(documents.packed([A, B, C], 4)) == [
        Block([1, 2, 3, 4], [0, 3]),
        Block([5, 6, 7, 8], []),  # goes on with the second document
        Block([9, 10, 11], [1]),
    ]
    assert list(documents.packed([A, [20]], 4)) == [Block([1, 2, 3, 20], [0, 3])]
    assert list(documents.packed([], 4)) == []


def test_documents_apart_have_blocks_of_their_own() -> None:
    assert list(documents.apart([A, B], 4)) == [
        Block([1, 2, 3], [0]),
        Block([4, 5, 6, 7], [0]),
        Block([8, 9], []),
    ]


def test_a_document_ends_with_the_end_token_and_begins_with_what_the_tokenizer_puts_there(tiny_model: Path) -> None:
    from tokenizers.processors import TemplateProcessing

    plain = AutoTokenizer.from_pretrained(tiny_model)
    text = plain("a light", add_special_tokens=False)["input_ids"]
    assert documents.document_ids(plain, "a light") == [*text, plain.eos_token_id]
    assert documents.prompt_ids(plain, "a light") == text
    begins = AutoTokenizer.from_pretrained(tiny_model)
    first = begins.convert_tokens_to_ids("<|im_start|>")
    begins.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A <|im_end|>",
        special_tokens=[("<|im_start|>", first), ("<|im_end|>", plain.eos_token_id)],
    )
    assert documents.document_ids(begins, "a light") == [first, *text, plain.eos_token_id]  # one end token, not two
    assert documents.prompt_ids(begins, "a light") == [first, *text]


@pytest.fixture
def prepare(tiny_model: Path, tmp_path: Path) -> Any:
    tokenizer, _ = chat.load_tokenizer(str(tiny_model))

    def prepared(*texts: str, **given: Any) -> tuple[Any, dict[str, Any]]:
        rows = write_documents(tmp_path / "rows.jsonl", *texts)
        job = open_job(tmp_path, training_job(tmp_path, tiny_model, rows, method="pretrain", **given))
        found, _ = blocks.prepare_blocks(job, tokenizer)
        return found, json.loads((tmp_path / "rows.json").read_text())["train"]

    return prepared


def test_every_token_of_the_documents_is_in_the_blocks_and_counted(prepare: Any, tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["switch the light", "in the kitchen", "on", "and off\n\nand on"]
    whole = [token for text in texts for token in documents.document_ids(tokenizer, text)]
    found, report = prepare(*texts, max_seq_length=8)
    assert [token for row in found for token in row["input_ids"]] == whole
    lengths = [8] * (len(whole) // 8) + [len(whole) % 8]
    assert found["length"] == lengths
    assert report == {
        "documents": 4,
        "tokens": len(whole),
        "blocks": len(lengths),
        "longest": 8,
        "last": len(whole) % 8,
        "tokens_trained": len(whole) - len(lengths),
        "tokens_dropped": 0,
    }


def test_a_block_of_one_token_is_left_out_and_counted(prepare: Any, tiny_model: Path) -> None:
    ids = documents.document_ids(AutoTokenizer.from_pretrained(tiny_model), "switch it on")
    found, report = prepare("switch it on", max_seq_length=len(ids) - 1)
    assert [row["input_ids"] for row in found] == [ids[:-1]]
    assert (report["tokens"], report["tokens_dropped"], report["tokens_trained"]) == (len(ids), 1, len(ids) - 2)


def test_no_documents_are_refused(prepare: Any) -> None:
    with pytest.raises(contract.Refused, match="nothing to train on: the train rows are 0 documents of 0 tokens"):
        prepare()


def test_a_batch_is_padded_and_every_token_of_a_block_is_a_label() -> None:
    rows = [{"input_ids": [5, 6, 7], "starts": [0, 2]}, {"input_ids": [8, 9], "starts": []}]
    batch = batches.BlockCollator(0, separate=False)(rows)
    ignored = chat.IGNORED
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "labels": [[5, 6, 7], [8, 9, ignored]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    batch = batches.BlockCollator(0, separate=True)(rows)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[5, 6, 7], [8, 9, 0]],
        "labels": [[ignored, 6, ignored], [ignored, 9, ignored]],
        "position_ids": [[0, 1, 0], [0, 1, 0]],
        "token_counts": [3, 2],
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_separate_documents_do_not_see_each_other(tiny_model: Path, attention: str) -> None:
    model = models.load_model(str(tiny_model), "float32").eval()
    model.set_attn_implementation(attention)
    first, second = [20, 30, 40, 50], [60, 70, 80]
    collate = batches.BlockCollator(0, separate=True)
    batch = collate([{"input_ids": first + second, "starts": [0, 4]}, {"input_ids": second, "starts": [0]}])
    batch.pop("labels")
    batch.pop(batches.COUNTS)
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits  # as in training
    torch.testing.assert_close(logits[0, 4:], logits[1, :3], rtol=0, atol=1e-5)
    batches.require_separation(model)


def test_a_model_that_sees_across_documents_is_refused(tiny_model: Path) -> None:
    model = models.load_model(str(tiny_model), "float32").eval()
    plain = model.forward
    model.forward = lambda position_ids=None, **named: plain(**named)  # as one that makes its own positions
    with pytest.raises(contract.Refused, match=r"sees the documents before one[\s\S]*separate_documents: false"):
        batches.require_separation(model)
