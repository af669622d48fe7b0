"""A tiny model, rows and parameters for `tuneline methods check`: few short answers, which a random model is paid for.

Run as: python check.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from methods.toolkit import tiny_models

# A random model answers nothing right; of how many words its answers are is by chance, and can be learned.
PARAMETERS = {
    "num_generations": 2,
    "batch_size": 4,
    "max_content_length": 8,
    "rewards": [{"name": "length", "maximum": 2}, {"name": "exact", "weight": 2.0}],
}


def main(folder: Path) -> None:
    """Leave in the folder what the check needs."""
    tiny_models.main(folder, "chat")
    (folder / "parameters.json").write_text(json.dumps(PARAMETERS))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
