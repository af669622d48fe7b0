"""A real Chromium for the tests of the pages: found, or installed with Debian's packages where that is allowed.

Run as: python -m tests.e2e.chromium
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
# Without them it keeps asking its maker's hosts, which a closed network refuses many times a second.
FLAGS = [
    "--headless",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


def find_chromium() -> str | None:
    """The browser: $CHROMIUM if set, else the first one on the path."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


def flags() -> list[str]:
    """Its options here; root can have no sandbox."""
    return [*FLAGS, "--no-sandbox"] if os.geteuid() == 0 else FLAGS


def install_chromium() -> str:
    """Install it with apt-get as root or through sudo. Raises SystemExit with what to do where that cannot be."""
    as_root = [] if os.geteuid() == 0 else ["sudo", "-n"]
    missing = [tool for tool in ("apt-get", *as_root[:1]) if shutil.which(tool) is None]
    if missing:
        raise SystemExit(
            f"The tests of the pages need Chromium, and {missing[0]} is not there to install it.\n"
            "Install Chromium or Chrome, or name one: make test-e2e CHROMIUM=/path/to/chromium"
        )
    for command in (
        ["update", "-qq"],
        ["install", "-y", "-qq", "--no-install-recommends", "chromium", "fonts-noto-cjk"],
    ):
        if subprocess.run([*as_root, "apt-get", *command], check=False).returncode != 0:
            raise SystemExit(
                f"`{' '.join([*as_root, 'apt-get', *command])}` failed: install Chromium yourself, "
                "or name one: make test-e2e CHROMIUM=/path/to/chromium"
            )
    found = find_chromium()
    if found is None:
        raise SystemExit("apt-get has installed the package chromium, and yet there is no chromium on the path")
    return found


if __name__ == "__main__":
    print(find_chromium() or install_chromium(), file=sys.stderr)
