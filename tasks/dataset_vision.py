"""Rows with images: conversations about them, questions and answers, captions."""

from __future__ import annotations

from typing import Any

from tasks.dataset_conversations import conversation, messages_of, pair_turns, require_answered, system_turns
from tasks.dataset_fields import RowRefusedError, Turn, filled, listed, text, wrong_type
from tasks.dataset_images import ImageFolder
from tasks.dataset_reading import parse_cell

IMAGE_MARK = "<image>"


def image_question_body(row: dict[str, object], names: tuple[str, ...], images: ImageFolder) -> dict[str, Any]:
    """An image (or several), a question and an answer; `names` are the three columns."""
    image, question, answer = names
    turns = [*system_turns(row), *pair_turns(row, question, answer)]
    return _body(turns, _taken(row[image], image, images), image)


def image_messages_body(
    row: dict[str, object], names: tuple[str, ...], images: ImageFolder, dropped: list[str]
) -> dict[str, Any]:
    """Messages with `<image>`, or a part of the type image, where each of the images stands."""
    image, column = names
    value = parse_cell(row[column])
    marked = [_marked(turn, f"{column}[{index}]") for index, turn in enumerate(listed(value, column, "a list"))]
    sharegpt = bool(marked) and isinstance(marked[0], dict) and "from" in marked[0]
    turns = conversation(marked, column, "sharegpt" if sharegpt else "messages", dropped)
    return _body([*system_turns(row), *turns], _taken(row[image], image, images), image)


def _marked(turn: object, field: str) -> object:
    """A message whose content is a list of parts, with its content as one text."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    told = ""
    for index, part in enumerate(turn["content"]):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "text"):
            raise wrong_type(f"{field}.content[{index}]", part, "a part of the type text or image")
        told += IMAGE_MARK if kind == "image" else text(part.get("text"), f"{field}.content[{index}].text")
    return {**turn, "content": told}


def deepextension_body(row: dict[str, object], images: ImageFolder) -> dict[str, Any]:
    """DeepExtension's multimodal rows: images by their `imageId`, and `qa`, a list of questions and answers."""
    turns: list[Turn] = []
    for index, pair in enumerate(listed(row["qa"], "qa", "a list of questions and answers")):
        if not isinstance(pair, dict) or not {"question", "answer"} <= pair.keys():
            raise wrong_type(f"qa[{index}]", pair, "an object with question and answer")
        found = pair_turns(pair, "question", "answer")
        turns += [turn._replace(field=f"qa[{index}].{turn.field}") for turn in found]
    if not turns:
        raise wrong_type("qa", row["qa"], "a question and an answer at least")
    return _body(turns, _taken(row["images"], "images", images), "images")


def caption_body(row: dict[str, object], names: tuple[str, ...], images: ImageFolder) -> dict[str, Any]:
    """An image and its caption; `names` are the two columns."""
    image, caption = names
    told = filled(row[caption], caption, "caption")
    taken = _taken(row[image], image, images)
    if len(taken) != 1:
        raise wrong_type(image, taken, "one image")
    return {"image": taken[0], "caption": told}


def _taken(value: object, field: str, images: ImageFolder) -> list[str]:
    value = parse_cell(value)
    if not isinstance(value, list):
        return [images.take(value, field)]
    return [images.take(item, f"{field}[{index}]") for index, item in enumerate(value)]


def _body(turns: list[Turn], taken: list[str], field: str) -> dict[str, Any]:
    """Messages of parts; without marks, all images stand before the first question."""
    require_answered(turns)
    marks = sum(turn.content.count(IMAGE_MARK) for turn in turns)
    if not taken or (marks and marks != len(taken)):
        raise RowRefusedError(
            "wrong_number_of_images",
            f"the messages have {marks} places for images, and the row has {len(taken)}",
            field=field,
            found=f"a list of {len(taken)}",
            expected=f"a list of {marks or '1 or more'}",
            mend=f"write {IMAGE_MARK} where each image stands, or nowhere",
        )
    if not marks:
        first = next(index for index, turn in enumerate(turns) if turn.role == "user")
        turns[first] = turns[first]._replace(content=IMAGE_MARK * len(taken) + turns[first].content)
    unread = next((turn for turn in turns if not turn.trained), None)
    if unread is not None:
        raise RowRefusedError(
            "weight_of_zero",
            f"{unread.field} has the weight 0, but every answer of a row with images is trained",
            field=unread.field,
            found="the weight 0",
            expected="no weight, or 1",
            mend="make a row that ends before this answer, and one whose prompt holds it",
        )
    messages = messages_of(turns)
    for message in messages:
        message["content"] = _parts(message["content"])
    return {"messages": messages, "images": taken}


def _parts(content: str) -> list[dict[str, str]]:
    found: list[dict[str, str]] = []
    for index, piece in enumerate(content.split(IMAGE_MARK)):
        found += [{"type": "image"}] if index else []
        found += [{"type": "text", "text": piece}] if piece else []
    return found
