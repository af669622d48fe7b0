"""What the code of a model is, for the user to read before it is allowed: files, digests, and what to look at first."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from configs.base_models import BaseModelEntry, find_base_model, is_hub_id
from configs.errors import UserError
from configs.settings import Settings
from methods.toolkit.remote_code import ModelCode
from tasks.base_models import source_folder
from tasks.models import list_models
from tasks.remote_code import model_code, needs_code

_WATCHED_IMPORTS = frozenset(
    {
        *("ctypes", "cffi", "multiprocessing", "os", "pip", "pty", "runpy", "shutil", "subprocess"),
        *("ftplib", "http", "httpx", "requests", "smtplib", "socket", "urllib", "webbrowser"),
        *("builtins", "dill", "importlib", "joblib", "marshal", "pickle", "shelve"),
    }
)
_WATCHED_CALLS = frozenset({"__import__", "compile", "eval", "exec", "globals", "open"})
_WATCHED_METHODS = frozenset({"torch.load", "np.load", "numpy.load"})  # each can unpickle


@dataclass(frozen=True)
class ListedCode:
    """The code of a model as it lies in `folder`, and the entry by which it is allowed."""

    folder: Path
    code: ModelCode
    entry: str
    needed: bool

    def source(self, name: str) -> bytes:
        """The content of one of the files."""
        return (self.folder / name).read_bytes()


def list_code(reference: str, settings: Settings) -> ListedCode:
    """The code of a model: a registered name, a folder, a hub id (OWNER/NAME@REVISION too), or a model made here.

    Files from the hub are fetched, its weights are not, and nothing is imported. Raises UserError if the model brings
    no code, or code that cannot be allowed.
    """
    folder, hub = _folder(reference, settings)
    code = model_code(folder)
    if code is None:
        raise UserError(
            "this model brings no code of its own: there is nothing to allow",
            file=folder,
            field="model",
            value=reference,
        )
    return ListedCode(folder, code, hub or code.digest, needs_code(folder))


def _folder(reference: str, settings: Settings) -> tuple[Path, str | None]:
    own = next((model for model in list_models(settings) if model.name == reference), None)
    if own is not None:
        return (own.base_path if own.adapter else own.path), None
    repository, _, revision = reference.rpartition("@")
    if is_hub_id(repository):
        entry = BaseModelEntry(name="hub", title=reference, hub=repository, revision=revision)
        return source_folder(entry, settings)
    return source_folder(find_base_model(reference, settings), settings)


def warnings_of(source: bytes) -> list[str]:
    """What a reader of Python code is to look at first: `line N: ...` for imports and calls that can reach out.

    A plain listing by the syntax tree; code can hide from it, so it proves nothing.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return [f"cannot be parsed as Python: {error}"]
    found = [(node.lineno, text) for node in ast.walk(tree) for text in _watched(node) if hasattr(node, "lineno")]
    return [f"line {line}: {text}" for line, text in sorted(found)]


def _watched(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
        return [f"imports {name}" for name in names if name.split(".")[0] in _WATCHED_IMPORTS]
    if isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
        return [f"imports from {node.module}"] if node.module.split(".")[0] in _WATCHED_IMPORTS else []
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
        called = ast.unparse(node.func)
        return [f"calls {called}()"] if called in _WATCHED_CALLS | _WATCHED_METHODS else []
    return []
