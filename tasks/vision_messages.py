"""Stored conversations with images as OpenAI's interface takes them: to ask a stage or an endpoint, each alike."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_TYPES = {".jpg": "jpeg"}  # every other suffix of a stored image is the name of its type


def with_images(row: Mapping[str, Any], folder: Path) -> Mapping[str, Any]:
    """A stored row with its images, which lie below `folder`, in its messages as data URLs; one of text as it is."""
    if "images" not in row:
        return row
    waiting = iter(row["images"])
    messages = [{**each, "content": _content(each["content"], waiting, folder)} for each in row["messages"]]
    return {**row, "messages": messages}


def _content(content: Any, waiting: Any, folder: Path) -> Any:
    if isinstance(content, str):
        return content
    if all(part["type"] == "text" for part in content):
        return "".join(part["text"] for part in content)
    return [_image(folder / next(waiting)) if part["type"] == "image" else part for part in content]


def _image(file: Path) -> dict[str, Any]:
    kind = _TYPES.get(file.suffix, file.suffix.removeprefix("."))
    encoded = base64.b64encode(file.read_bytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/{kind};base64,{encoded}"}}
