"""Leaves what the check of this method needs: a tiny base model, pairs of answers, and answers to score.

Run as: python check.py FOLDER   (what is left in FOLDER is described in methods/toolkit/tiny_models.py)
"""

from __future__ import annotations

import sys
from pathlib import Path

from methods.toolkit import tiny_models


def main(folder: Path) -> None:
    """Leave the model and the rows in the folder."""
    tiny_models.make_tiny_chat_model(folder / "base_model", seed=1)
    rows = tiny_models.chat_rows(30, "preference")
    tiny_models.write_rows(folder / "train_rows.jsonl", rows[:24])
    tiny_models.write_rows(folder / "validation_rows.jsonl", rows[24:])
    ranked = tiny_models.chat_rows(3, "ranking")
    tiny_models.write_rows(
        folder / "requests.jsonl", [{"prompt": row["prompt"], "answers": row["answers"]} for row in ranked]
    )
    (folder / "parameters.json").write_text("{}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
