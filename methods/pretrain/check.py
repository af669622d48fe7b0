"""Leaves what the check of this method needs: a tiny base model, documents, and texts to go on from.

Run as: python check.py FOLDER   (what is left in FOLDER is described in methods/toolkit/tiny_models.py)
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from methods.toolkit import tiny_models


def make_documents(count: int) -> list[dict[str, Any]]:
    """Stored rows of the kind `text`, each about the light in one of seven rooms, of different lengths."""
    sentences = [
        f"The light in the {room} is switched by the button beside the door. Its number is {number}. "
        for number in range(count)
        for room in [tiny_models.ROOMS[number % len(tiny_models.ROOMS)]]
    ]
    return [{"line": n + 1, "text": text * (1 + n % 3)} for n, text in enumerate(sentences)]


def main(folder: Path) -> None:
    """Leave the model and the rows in the folder."""
    tiny_models.make_tiny_chat_model(folder / "base_model", seed=1)
    rows = make_documents(30)
    tiny_models.write_rows(folder / "train_rows.jsonl", rows[:24])
    tiny_models.write_rows(folder / "validation_rows.jsonl", rows[24:])
    tiny_models.write_rows(folder / "requests.jsonl", [{"text": row["text"][:40]} for row in rows[:3]])
    (folder / "parameters.json").write_text(json.dumps({}), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
