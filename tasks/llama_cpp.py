"""llama.cpp on this host: its server, its quantiser and its converter, built once from a source package.

The package of its Python bindings carries the whole source of llama.cpp, so that pip is all that is needed to get it.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from configs.errors import UserError
from configs.settings import Settings, load_settings
from tasks.files import last_lines

PACKAGE, VERSION = "llama-cpp-python", "0.3.36"
SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CMAKE_VARIABLE = "CMAKE_ARGS"
"""The variable that the bindings' own build reads, too: CMAKE_ARGS="-DGGML_CUDA=on" builds for an NVIDIA GPU."""

_PROGRAMS = ("llama-server", "llama-quantize")
_CONVERTER = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
_OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # or the build would fetch its page from the network
    "-DLLAMA_OPENSSL=OFF",  # it listens on loopback, behind the gateway
)
_PERCENT = re.compile(rb"^\[\s*(\d+)%\]")


@dataclass(frozen=True)
class LlamaCpp:
    """The programs of one version."""

    folder: Path

    @property
    def server(self) -> Path:
        """llama-server."""
        return self.folder / "bin" / "llama-server"

    @property
    def quantiser(self) -> Path:
        """llama-quantize."""
        return self.folder / "bin" / "llama-quantize"

    @property
    def converter(self) -> Path:
        """convert_hf_to_gguf.py."""
        return self.folder / "convert" / "convert_hf_to_gguf.py"


def installed(settings: Settings | None = None) -> LlamaCpp | None:
    """The llama.cpp of this host, or None. It is there whole or not at all."""
    folder = _root(settings) / VERSION
    return LlamaCpp(folder) if (folder / "built.json").is_file() else None


def needed() -> LlamaCpp:
    """The llama.cpp of this host. Raises UserError that says how to install it."""
    found = installed()
    if found is None:
        raise UserError(
            "llama.cpp is not installed on this host",
            file=_root(None) / VERSION,
            mend="`tuneline targets install llama.cpp` builds it, once (minutes; needs a C++ compiler)",
        )
    return found


def install(
    settings: Settings | None = None, jobs: int | None = None, say: Callable[[str], None] = lambda _: None
) -> LlamaCpp:
    """Build llama.cpp unless it is there; `jobs` compilers at a time, by default one a core.

    Whoever comes second waits for the first. What an interrupted build left is thrown away. Raises UserError with the
    end of the build's log.
    """
    root = _root(settings)
    root.mkdir(parents=True, exist_ok=True)
    with (root / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        found = installed(settings)
        if found is not None:
            return found
        for left in root.glob(f".{VERSION}.*"):
            shutil.rmtree(left)
        with tempfile.TemporaryDirectory(prefix=f".{VERSION}.", dir=root) as scratch:
            made = _build(Path(scratch), root / "build.log", jobs or os.cpu_count() or 1, say)
            made.rename(root / VERSION)
    return LlamaCpp(root / VERSION)


def _root(settings: Settings | None) -> Path:
    return (settings or load_settings()).llama_cpp.expanduser().resolve()


def _build(scratch: Path, log: Path, jobs: int, say: Callable[[str], None]) -> Path:
    """Fetch, configure, compile; returns the folder to keep."""
    if not any(map(shutil.which, ("c++", "g++", "clang++"))):
        raise UserError(
            "there is no C++ compiler", mend="install one: build-essential, gcc-c++ or the command line tools of Xcode"
        )
    started = time.monotonic()
    log.unlink(missing_ok=True)
    say(f"fetching {PACKAGE} {VERSION}")
    source = _fetch(scratch, log)
    build, kept = scratch / "build", scratch / "kept"
    cmake = _cmake(scratch, log)
    extra = shlex.split(os.environ.get(CMAKE_VARIABLE, ""))
    say("configuring")
    _run([cmake, "-S", source, "-B", build, *_OPTIONS, *extra], log)
    command: list[str | Path] = [
        cmake,
        "--build",
        build,
        "--config",
        "Release",
        "-j",
        str(jobs),
        "--target",
        *_PROGRAMS,
    ]
    _run(command, log, lambda percent: say(f"compiling: {percent} %"))
    (kept / "bin").mkdir(parents=True)
    (kept / "convert").mkdir()
    for name in _PROGRAMS:
        shutil.move(build / "bin" / name, kept / "bin" / name)
    for name in _CONVERTER:
        shutil.move(source / name, kept / "convert" / name)
    shutil.move(source / "LICENSE", kept / "LICENSE")
    told = {"package": PACKAGE, "version": VERSION, "options": extra, "seconds": round(time.monotonic() - started)}
    (kept / "built.json").write_text(json.dumps(told), encoding="utf-8")
    return kept


def _fetch(scratch: Path, log: Path) -> Path:
    """The source of llama.cpp inside the package, which must be the very file that we know."""
    wanted = scratch / "requirements.txt"
    wanted.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n", encoding="utf-8")
    pip: list[str | Path] = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE]
    _run([*pip, "--require-hashes", "-r", wanted, "-d", scratch], log)
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as files:
        files.extractall(scratch / "source", filter="data")
    archive.unlink()
    (source,) = (scratch / "source").glob("*/vendor/llama.cpp")
    return source


def _cmake(scratch: Path, log: Path) -> Path:
    """The host's cmake, or one from the package index in an environment that goes with the build."""
    found = shutil.which("cmake")
    if found is not None:
        return Path(found)
    tools = scratch / "tools"
    _run([sys.executable, "-m", "venv", tools], log)
    _run([tools / "bin" / "python", "-m", "pip", "install", "--quiet", "cmake"], log)
    return tools / "bin" / "cmake"


def _run(command: Sequence[str | Path], log: Path, on_percent: Callable[[int], None] = lambda _: None) -> None:
    with log.open("ab") as kept:
        process = subprocess.Popen(
            list(map(str, command)), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        told = -1
        try:
            for line in process.stdout or []:
                kept.write(line)
                percent = _PERCENT.match(line)
                if percent is not None and int(percent[1]) >= told + 10:
                    told = int(percent[1])
                    on_percent(told)
            code = process.wait()
        except BaseException:
            process.terminate()  # make ends its compilers
            process.wait()
            raise
    if code != 0:
        raise UserError(
            f"llama.cpp could not be built: {Path(command[0]).name} ended with exit code {code}. "
            f"The end of the log:\n{last_lines(log, 20)}",
            file=log,
        )
