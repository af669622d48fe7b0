"""Converts a model whose weights are pickles (pytorch_model*.bin) to a folder with safetensors, in a sandbox."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from configs.base_models import is_hub_id
from configs.errors import UserError
from configs.settings import PROJECT_ROOT, Settings
from tasks.base_models import BIN_FILES, HUB_FILES, download
from tasks.files import last_lines

PROGRAM = PROJECT_ROOT / "methods" / "toolkit" / "convert_bin.py"
INDEX = "pytorch_model.bin.index.json"

_SHARD = re.compile(r"pytorch_model[A-Za-z0-9_.-]*\.bin")
_KEPT_VARIABLES = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "SYSTEMROOT")
_KEPT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.tiktoken", "*.md", "LICENSE*", "NOTICE*")
_GIGABYTE = 1 << 30
# PyTorch maps several gigabytes of its own libraries, most of them on hosts with GPUs.
_PYTORCH_BYTES = 24 * _GIGABYTE
_SECONDS, _SECONDS_PER_GIGABYTE = 300, 120


class Conversion(BaseModel):
    """What a conversion has made."""

    folder: Path
    weights: list[str] = Field(description="Files of weights.")
    tensors: int
    bytes: int = Field(description="Size of all tensors.")
    shared: list[str] = Field(description="Tensors that shared memory with another one and are now written apart.")
    not_copied: list[str] = Field(description="Files of the source that the new folder does not have.")
    network: str = Field(description="Whether the converting process could reach a network.")


def convert_model(reference: str, to: Path | None, settings: Settings) -> Conversion:
    """Convert a model folder, or OWNER/NAME[@REVISION] on the hub; the new folder is there whole or not at all.

    `to`: where; by default a folder in the store of base models. Raises UserError for a file that is not plain weights.
    """
    source = _source(reference)
    target = (to or settings.base_models / "converted" / _name_of(reference)).expanduser().absolute()
    if target.exists():
        raise UserError("this folder exists", field="--to", value=str(target), mend="name one that does not")
    shards = _shards(source)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as work:
        made = Path(work, "model")
        made.mkdir()
        results = _convert_all(source, shards, made, Path(work))
        _write_index(made, results)
        not_copied = _copy_others(source, made)
        made.replace(target)
    return Conversion(
        folder=target,
        weights=sorted(results),
        tensors=sum(len(result["tensors"]) for result in results.values()),
        bytes=sum(sum(result["tensors"].values()) for result in results.values()),
        shared=sorted(name for result in results.values() for name in result["shared"]),
        not_copied=not_copied,
        network="none" if _without_network() else "reachable: this host does not let users unshare it",
    )


def _source(reference: str) -> Path:
    folder = Path(reference).expanduser()
    if folder.is_dir():
        return folder.resolve()
    repository, _, revision = reference.rpartition("@") if "@" in reference else (reference, "", "")
    if not is_hub_id(repository):
        raise UserError(
            "there is no such model",
            field="model",
            value=reference,
            expected="a folder with pytorch_model.bin, or OWNER/NAME on the hub",
        )
    patterns = [name for name in HUB_FILES if name != "*.safetensors"] + BIN_FILES
    return download(repository, revision or None, patterns)


def _name_of(reference: str) -> str:
    folder = Path(reference).expanduser()
    return re.sub(r"[^\w.-]+", "-", folder.resolve().name if folder.is_dir() else reference).strip("-.") or "model"


def _shards(source: Path) -> list[str]:
    """Names of the files with weights, by the index if there is one. Raises UserError if there are none."""
    index = source / INDEX
    names = _indexed(index) if index.is_file() else [f.name for f in sorted(source.glob("pytorch_model*.bin"))]
    if not names:
        raise UserError("there is no pytorch_model.bin here, so there is nothing to convert", file=source)
    for name in names:
        if not _SHARD.fullmatch(name) or not (source / name).is_file():
            raise UserError(
                "the index names a file of weights that is not there",
                file=index,
                value=name,
                expected="files pytorch_model-....bin beside the index",
            )
    return names


def _indexed(index: Path) -> list[str]:
    try:
        return sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError("the index of the weights has no weight_map", file=index) from error


def _convert_all(source: Path, shards: list[str], made: Path, work: Path) -> dict[str, dict[str, Any]]:
    """Convert each file on its own; returns the sizes of its tensors by the name of the file that was written."""
    results: dict[str, dict[str, Any]] = {}
    for number, name in enumerate(shards, start=1):
        single = len(shards) == 1
        written = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        result = _convert_one(source / name, made / written, work)
        known = {tensor for other in results.values() for tensor in other["tensors"]}
        twice = sorted(known & set(result["tensors"]))
        if twice:
            raise UserError("two files of weights hold a tensor of one name", file=source / name, value=twice[0])
        results[written] = result
    return results


def _convert_one(source: Path, target: Path, work: Path) -> dict[str, Any]:
    size = source.resolve().stat().st_size
    seconds = _SECONDS + _SECONDS_PER_GIGABYTE * (size // _GIGABYTE)
    limits = {"memory": _PYTORCH_BYTES + 6 * size, "seconds": seconds, "file": 2 * size + _GIGABYTE // 16}
    answered, limit_file, log = work / "result.json", work / "limits.json", work / "log"
    limit_file.write_text(json.dumps(limits), encoding="utf-8")
    answered.unlink(missing_ok=True)
    command = [sys.executable, "-s", "-P", PROGRAM, source.resolve(), target, answered, limit_file]
    code = _run_sandboxed([str(word) for word in command], work, log, 2 * seconds)
    if not answered.is_file():
        why = f"signal {-code}" if code < 0 else f"exit code {code}"
        said = last_lines(log, 5) or "(no output)"
        raise UserError(f"the conversion of these weights ended with {why}: {said}", file=source)
    result: dict[str, Any] = json.loads(answered.read_text(encoding="utf-8"))
    if "refused" in result:
        raise UserError(f"these weights are not converted: {result['refused']}", file=source)
    return result


def _run_sandboxed(command: list[str], work: Path, log: Path, seconds: int) -> int:
    """Run the command without keys, network (where the host lets it) and our files; returns its exit code.

    Raises UserError if it takes longer than `seconds`.
    """
    kept = {name: os.environ[name] for name in _KEPT_VARIABLES if name in os.environ}
    own = {"HOME": str(work), "TMPDIR": str(work), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as out:
        process = subprocess.Popen(
            [*_without_network(), *command],
            cwd=work,
            env=kept | own,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise UserError(f"the conversion took longer than {seconds} s and was ended", file=log) from error
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def _without_network() -> list[str]:
    """The words that start a command in a network of its own, which has no way out; none where users cannot do that."""
    words = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    works = subprocess.run([*words, "true"], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    return words if works.returncode == 0 else []


def _write_index(made: Path, results: dict[str, dict[str, Any]]) -> None:
    if len(results) == 1:
        return
    placed = {tensor: file for file, result in results.items() for tensor in result["tensors"]}
    total = sum(sum(result["tensors"].values()) for result in results.values())
    content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}
    (made / "model.safetensors.index.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def _copy_others(source: Path, made: Path) -> list[str]:
    """Copy configuration, tokenizer and code; returns the names of what is left behind, weights apart."""
    wanted = {file for pattern in _KEPT_FILES for file in source.rglob(pattern) if file.is_file()}
    left = []
    for file in sorted(source.rglob("*")):
        name = file.relative_to(source).as_posix()
        if file in wanted and name != INDEX and not any(part.startswith(".") for part in Path(name).parts):
            copy = made / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
        elif file.is_file() and not _SHARD.fullmatch(name) and name != INDEX:
            left.append(name)
    return left
