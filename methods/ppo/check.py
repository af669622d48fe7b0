"""A tiny model, a tiny reward model, rows and parameters for `tuneline methods check`.

Run as: python check.py FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from methods.toolkit import tiny_models

PARAMETERS = {"batch_size": 4, "grad_accum_steps": 1, "max_content_length": 8, "actor_learning_rate": 0.01}
REWARD_MODEL = "reward_model"


def main(folder: Path) -> None:
    """Leave in the folder what the check needs."""
    tiny_models.main(folder, "chat")
    (folder / "parameters.json").write_text(json.dumps(PARAMETERS))
    tiny_models.make_tiny_reward_model(folder / "base_model", folder / REWARD_MODEL, seed=2)
    model = {"path": REWARD_MODEL, "base_model": None, "adapter": False, "method": "reward"}
    (folder / "models.json").write_text(json.dumps({"reward_model": model}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
