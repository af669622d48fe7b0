"""Lists of words that scoring leaves out: the ones that ship, or a file of one's own."""

from __future__ import annotations

from pathlib import Path

from configs.errors import UserError
from configs.scoring import STOP_WORD_LISTS

LISTS = Path(__file__).resolve().parent.parent / "configs" / "stop_words"


def read_stop_words(name: str | Path | None) -> frozenset[str]:
    """The words of `zh`, of `en`, of both (`zh,en`), or of a UTF-8 file with one a line; none for None.

    They are compared with whole tokens, case and all. Blank lines and whitespace around words are ignored. Raises
    UserError if a file cannot be read or holds no word.
    """
    if name is None:
        return frozenset()
    parts = [part.strip() for part in str(name).split(",")]
    if set(parts) <= set(STOP_WORD_LISTS):
        return frozenset().union(*(_read(LISTS / f"{part}.txt") for part in parts))
    path = Path(name).expanduser()
    if not path.exists():
        raise UserError(
            "there is no such list of stop words",
            field="stop_words",
            value=str(name),
            expected=f"{', '.join(STOP_WORD_LISTS)}, {','.join(STOP_WORD_LISTS)}, or a file with one word a line",
        )
    return _read(path)


def _read(path: Path) -> frozenset[str]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", file=path) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start + 1} of the file is not UTF-8", file=path, mend="save the file as UTF-8"
        ) from error
    words = frozenset(line.strip() for line in text.splitlines()) - {""}
    if not words:
        raise UserError("the file holds no stop words", file=path, expected="one stop word a line")
    return words
