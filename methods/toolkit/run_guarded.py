"""Program: becomes another program, watched so that it ends with whoever started it.

`PYTHON run_guarded.py ENDPOINT_JSON COMMAND...`, with the starter's pipe as standard input. For servers that are no
Python of ours (`serve_model.py` watches from within): the command takes the place of this process, and keeps its id,
by which the endpoint's record knows it; a watcher beside it waits for the pipe to close. Standard library only.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from methods.toolkit.serve_model import is_kept


def watch(record: Path, server: int) -> None:
    """End the server's group once the starter has closed the pipe, normally or by dying, unless the record keeps it."""
    while os.read(0, 1024):
        continue
    try:
        kept = is_kept(record, server)
    except (OSError, ValueError, KeyError, TypeError) as error:
        print(f"{record} cannot be read, so this server ends: {error!r}", file=sys.stderr, flush=True)
        kept = False
    if not kept:
        os.killpg(os.getpgrp(), signal.SIGKILL)


def main() -> None:
    """Become the command."""
    record, *command = sys.argv[1:]
    server = os.getpid()
    first = os.fork()
    if first == 0:
        # Twice: the watcher becomes nobody's child, since the command would never fetch it when it ends.
        if os.fork() == 0:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the group's, while the server finishes its requests
            watch(Path(record), server)
        os._exit(0)
    os.waitpid(first, 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.execvp(command[0], command)  # noqa: S606 - no shell is meant


if __name__ == "__main__":
    main()
