"""Writes a sample of plain text: the manual of a machine that does not exist, as documents separated by blank lines.

    python configs/samples/make_manual.py [FOLDER]

It goes to FOLDER/manual_en (FOLDER: where this file lies) as train.txt, validation.txt and test.txt. The seed is fixed:
every run writes the same bytes. The machine and its parts are invented, so that no model knows them before it has read
the manual; validation and test tell of the same parts in sentences that the training documents do not have.
"""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random
from typing import NamedTuple

SEED = 20261130
MACHINE = "Orvelle 40"
PARTS = (
    "brine pump",
    "drum motor",
    "feed screw",
    "frost sensor",
    "gate valve",
    "glass filter",
    "heat coil",
    "intake fan",
    "level float",
    "main relay",
    "mixing arm",
    "ozone cell",
    "pressure plate",
    "rinse nozzle",
    "salt hopper",
    "settling tank",
    "spindle lock",
    "steam trap",
    "tilt switch",
    "vapour hood",
)
PLACES = ("behind the left panel", "under the drum", "on top of the boiler", "beside the drain", "inside the door")
COLOURS = ("amber", "blue", "green", "red", "violet")
TOOLS = ("a hex key", "a torque wrench", "a soft brush", "a feeler gauge")


class Part(NamedTuple):
    """What the manual says of a part."""

    name: str
    code: str
    place: str
    lamp: str
    tool: str
    torque: int
    hours: int
    alarm: int


TRAIN = (
    "The {name} of the {machine} has the code {code}. It sits {place}. Its four bolts are tightened to {torque} newton "
    "metres with {tool}. Write the date of the work on the card inside the door.",
    "Maintenance of the {name} ({code}). Inspect it every {hours} hours. Switch the {machine} off, wait until the "
    "{lamp} lamp is dark, and open the machine {place}. You need {tool}.",
    "Alarm {alarm} means that the {name} does not answer. The {lamp} lamp flashes. Restart the {machine} once. If the "
    "alarm comes back, replace part {code} and tighten its bolts to {torque} newton metres.",
    "Spare part {code}: {name} for the {machine}, delivered with four bolts and a seal. Replace it after {hours} hours "
    "of work, or when alarm {alarm} appears twice in a day.",
    "When you clean the {machine}, start with the {name} {place}. Use {tool} and no water. The {lamp} lamp stays on "
    "while the cover is open, and alarm {alarm} can be ignored until the cover is closed.",
)
HELD_OUT = {
    "validation": "Each {machine} is delivered with a {name}, part {code}, which you find {place}. After {hours} hours "
    "of work it is due for inspection. Its bolts take {torque} newton metres, and its alarm has the number {alarm}.",
    "test": "Question of a customer: the {lamp} lamp of my {machine} flashes and the display shows alarm {alarm}. "
    "Answer: the {name} needs attention. Open the machine {place}, take {tool}, and order part {code}.",
}


def make_parts(random: Random) -> list[Part]:
    """The parts, each with a code and an alarm of its own."""
    alarms = random.sample(range(100, 1000), len(PARTS))
    return [
        Part(
            name=name,
            code=f"{name[0].upper()}{name.split()[1][0].upper()}-{random.randint(10, 99)}{alarm % 10}",
            place=random.choice(PLACES),
            lamp=random.choice(COLOURS),
            tool=random.choice(TOOLS),
            torque=random.randint(3, 40),
            hours=100 * random.randint(2, 30),
            alarm=alarm,
        )
        for name, alarm in zip(PARTS, alarms, strict=True)
    ]


def make_splits() -> dict[str, list[str]]:
    """The documents of each split."""
    random = Random(SEED)  # noqa: S311 - a sample, no secret
    parts = make_parts(random)
    told = {
        "train": [text.format(machine=MACHINE, **part._asdict()) for part in parts for text in TRAIN],
        **{
            split: [text.format(machine=MACHINE, **part._asdict()) for part in parts]
            for split, text in HELD_OUT.items()
        },
    }
    for documents in told.values():
        random.shuffle(documents)
    return told


def main() -> None:
    """Write the files."""
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent
    folder = root / "manual_en"
    folder.mkdir(parents=True, exist_ok=True)
    for split, documents in make_splits().items():
        (folder / f"{split}.txt").write_text("\n\n".join(documents) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
