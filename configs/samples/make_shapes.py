"""Writes the sample images: one coloured shape each, with a question about it and with a caption.

    python configs/samples/make_shapes.py [FOLDER]

FOLDER/shapes (FOLDER: where this file lies) gets images/NAME.png, 64 pixels wide and high, and as JSON lines

- train.jsonl, validation.jsonl, test.jsonl: `image`, `question`, `answer`, for vision-language methods; each split
  has every shape in every colour, at places and sizes that no other split has;
- captions.jsonl: `image`, `caption`, for image-generation methods; the images are those of train.jsonl.

The seed is fixed: every run writes the same images and the same lines.
"""

from __future__ import annotations

import json
import sys
from itertools import product
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

SEED = 20261125
WIDTH = 64
COLOURS = {"red": (220, 30, 30), "green": (30, 180, 60), "blue": (40, 60, 220), "yellow": (230, 210, 30)}
SHAPES = ("circle", "square")
BACKGROUND = (245, 245, 245)
SPLITS = {"train": 4, "validation": 1, "test": 1}  # images of each shape in each colour


def draw(shape: str, colour: str, left: int, top: int, size: int) -> Image.Image:
    """A picture of one shape that fills `size` pixels each way from its upper left corner on."""
    picture = Image.new("RGB", (WIDTH, WIDTH), BACKGROUND)
    pen = ImageDraw.Draw(picture)
    box = (left, top, left + size, top + size)
    if shape == "circle":
        pen.ellipse(box, fill=COLOURS[colour])
    else:
        pen.rectangle(box, fill=COLOURS[colour])
    return picture


def main() -> None:
    """Write all images and lines."""
    target = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent) / "shapes"
    (target / "images").mkdir(parents=True, exist_ok=True)
    random = Random(SEED)  # noqa: S311
    places = [(size, *corner) for size in range(28, 41) for corner in product(range(WIDTH - size), repeat=2)]
    rows: dict[str, list[dict[str, str]]] = {split: [] for split in SPLITS}
    captions: list[dict[str, str]] = []
    for colour in COLOURS:
        for shape in SHAPES:
            # Drawn without replacement: no split has a place of another one.
            for number, (size, left, top) in enumerate(random.sample(places, sum(SPLITS.values()))):
                name = f"images/{colour}_{shape}_{number}.png"
                draw(shape, colour, left, top, size).save(target / name)
                split = next(split for split in SPLITS if number < _last(split))
                question, answer = f"What colour is the {shape}?", f"The {shape} is {colour}."
                rows[split].append({"image": name, "question": question, "answer": answer})
                if split == "train":
                    captions.append({"image": name, "caption": f"a {colour} {shape} on a white background"})
    for name, lines in {**rows, "captions": captions}.items():
        random.shuffle(lines)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (target / f"{name}.jsonl").write_text(text, encoding="utf-8")


def _last(split: str) -> int:
    """How many images of a kind the splits up to this one have."""
    names = list(SPLITS)
    return sum(SPLITS[name] for name in names[: names.index(split) + 1])


if __name__ == "__main__":
    main()
