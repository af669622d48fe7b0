"""How much faster an evaluation answers its rows in batches than one by one: `python -m tests.bench.bench_answers`.

The evaluation of a train, on SmolLM2-135M-Instruct: 500 rows of the samples, short greedy answers, with the batches
that an evaluation makes and with batches of one row. Both times hold all of it, the loading of the model included.
Exit code 1 if an answer differs, or batches are less than 3 times as fast. The model is fetched and converted first,
into the home; one that is there already is taken.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from configs.base_models import find_base_model
from configs.settings import PROJECT_ROOT, load_settings
from tasks.base_models import fetch_base_model
from tasks.datasets import add_dataset
from tasks.evaluation import evaluate
from tasks.inference import Generation
from tasks.models import find_model

ASKED = 3
ROWS = 500
TOKENS = 16
MODEL = "smollm2-135m-instruct"
SAMPLES = PROJECT_ROOT / "configs" / "samples" / "commands_en"


def rows() -> Iterator[dict[str, str]]:
    """The sample rows, those of every file one after the other."""
    for name in ("train", "validation", "test"):
        with (SAMPLES / f"{name}.jsonl").open(encoding="utf-8") as lines:
            yield from map(json.loads, lines)


def main() -> int:
    """Print the figures; returns the exit code."""
    model = fetch_base_model(find_base_model(MODEL, load_settings()), load_settings())
    batches, single = Generation(max_new_tokens=TOKENS), Generation(max_new_tokens=TOKENS, batch_size=1)
    answers, seconds = [], []
    with tempfile.TemporaryDirectory(prefix="tuneline-bench-") as folder:
        os.environ["TUNELINE_HOME"] = folder  # the version of the rows and what is written beside it
        file = Path(folder) / "rows.jsonl"
        chosen = list(islice(rows(), ROWS))
        file.write_text("".join(json.dumps(row) + "\n" for row in chosen), encoding="utf-8")
        version = add_dataset(file)
        for generation in (batches, single):
            began = time.monotonic()
            found = evaluate(find_model(str(model)), version, generation)
            seconds.append(time.monotonic() - began)
            answers.append([row["prediction"] for row in found.predictions])
    differing = [row for row, (one, other) in enumerate(zip(*answers, strict=True), start=1) if one != other]
    faster = seconds[1] / seconds[0]
    print(
        f"evaluation of {len(answers[0])} rows, at most {TOKENS} tokens each, {os.cpu_count()} cores: one by one"
        f" {seconds[1]:.0f} s, in batches of {batches.batch_size} {seconds[0]:.0f} s: {faster:.1f} times as fast"
        f" ({ASKED} are asked); {len(differing)} answers differ" + (f": rows {differing[:10]}" if differing else "")
    )
    return int(len(answers[0]) != ROWS or bool(differing) or faster < ASKED)


if __name__ == "__main__":
    sys.exit(main())
