"""Loads embedding models: folders of sentence-transformers, plain encoders with a pooling, and adapters on them."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from methods.contract import Refused
from methods.toolkit import hardware, models, remote_code

ROLES = ("query", "document")
"""What a text can be: what is looked for, or what is found. Some models put another prompt before each."""


def load_encoder(path: str, dtype: str, pooling: str = "auto", device: str = "auto") -> Any:
    """Load a folder of sentence-transformers, or a plain encoder with a pooling on top (`auto`: the mean).

    Raises Refused if it is neither, if it brings code, or if a pooling is asked of a model that has its own.
    """
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    if remote_code.code_of(Path(path)) is not None:
        raise Refused(f"{path} brings its own Python code, which the method embedding does not run")
    where = None if device == "auto" else device
    computes: hardware.Device = hardware.training_device() if where is None else hardware.kind_of(where)
    loading = {"dtype": models.choose_dtype(dtype, computes), "use_safetensors": True}
    try:
        if (Path(path) / "modules.json").is_file():
            if pooling != "auto":
                raise Refused(f"the base model has a pooling of its own: pooling cannot be {pooling}, leave it at auto")
            return SentenceTransformer(path, device=where, model_kwargs=loading)
        transformer = Transformer(path, model_kwargs=loading)
        mode = "mean" if pooling == "auto" else pooling
        layers = [transformer, Pooling(transformer.get_embedding_dimension(), mode)]
        return SentenceTransformer(modules=layers, device=where)
    except (OSError, ValueError, ImportError) as error:
        raise Refused(f"cannot load {path} as an embedding model: {error}") from error


def load_customized(base: str, adapter: str, dtype: str, work: Path, device: str = "auto") -> Any:
    """Load what training has left of a LoRA train: the adapter's folder, on the base model that is named here.

    `work` is a folder to write in: the adapter's own files name a folder that may have moved since.
    """
    view = work / "customized"
    shutil.rmtree(view, ignore_errors=True)
    shutil.copytree(adapter, view)
    models.relocate_adapter(view, weights_folder(base))
    return load_encoder(str(view), dtype, device=device)


def weights_folder(path: str) -> str:
    """The folder of the transformer inside of a folder of sentence-transformers; that of a plain encoder is its own."""
    import json

    file = Path(path) / "modules.json"
    if not file.is_file():
        return path
    first = json.loads(file.read_text(encoding="utf-8"))[0]["path"]
    return str(Path(path) / first) if first else path


def set_prompts(model: Any, query: str | None, document: str | None) -> None:
    """Give the model its prompts; None leaves what it has."""
    given = {"query": query, "document": document}
    model.prompts.update({role: text for role, text in given.items() if text is not None})
    for role in ROLES:
        model.prompts.setdefault(role, "")


def encode(model: Any, texts: list[str], role: str | None = None, batch_size: int = 32) -> Any:
    """The vectors of texts as a float32 tensor (texts, dimension) on the CPU; `role` puts that prompt before them."""
    import torch

    if not texts:
        return torch.zeros((0, model.get_embedding_dimension()))
    function = {None: model.encode, "query": model.encode_query, "document": model.encode_document}[role]
    vectors = function(texts, batch_size=batch_size, convert_to_tensor=True, show_progress_bar=False)
    return vectors.float().cpu()
