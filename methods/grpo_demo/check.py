"""A tiny model, rows and parameters for `tuneline methods check`.

Run as: python check.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from methods.grpo import check

if __name__ == "__main__":
    check.main(Path(sys.argv[1]))
