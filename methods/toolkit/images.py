"""The images of conversations: opened, and put where the messages show them."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterator
from io import BytesIO
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from methods.contract import Refused

_DATA_URL = "data:image/"


def open_image(source: str) -> Image.Image:
    """The image of a path, or of a data URL, upright and in RGB. Raises Refused."""
    if "://" in source:
        raise Refused(f"images are files or data URLs, and {source[:80]!r} is neither: Tuneline fetches nothing")
    try:
        content = base64.b64decode(source.partition(",")[2]) if source.startswith(_DATA_URL) else source
        with Image.open(BytesIO(content) if isinstance(content, bytes) else content) as opened:
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise Refused(f"cannot open the image {source[:80]!r}: {error}") from error


def shrunk(image: Image.Image, pixels: int) -> Image.Image:
    """The image with that many pixels at most, in its own aspect ratio."""
    if image.width * image.height <= pixels:
        return image
    scale = math.sqrt(pixels / (image.width * image.height))
    return image.resize((max(1, int(image.width * scale)), max(1, int(image.height * scale))))


def data_url(image: Image.Image) -> str:
    """The image as the text that OpenAI's interface takes it as (PNG)."""
    buffer = BytesIO()
    image.save(buffer, "PNG")
    return f"{_DATA_URL}png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def conversation(messages: list[dict[str, Any]], files: list[str]) -> list[dict[str, Any]]:
    """Messages as processors take them, each image in its place.

    A message's content is a text, or parts: `text`, `image` (the next one of `files`), or `image_url` with a data URL.
    Raises Refused if there are more or fewer places than files, or for a part of another type.
    """
    waiting = iter(files)
    found = [{"role": each["role"], "content": _parts(each["content"], waiting)} for each in messages]
    if left := list(waiting):
        raise Refused(f"the messages have no place for {len(left)} of {len(files)} images")
    return found


def _parts(content: Any, files: Iterator[str]) -> list[dict[str, Any]]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    parts: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "text":
            parts.append({"type": "text", "text": part["text"]})
        elif part["type"] == "image":
            file = next(files, None)
            if file is None:
                raise Refused("the messages have more places for images than there are images")
            parts.append({"type": "image", "image": open_image(file)})
        elif part["type"] == "image_url":
            url = part["image_url"]
            url = url["url"] if isinstance(url, dict) else url
            if not url.startswith(_DATA_URL):
                raise Refused(f"an image_url is a data URL (data:image/…), not {url[:80]!r}: Tuneline fetches nothing")
            parts.append({"type": "image", "image": open_image(url)})
        else:
            raise Refused(f"a message has a part of the type {part['type']!r}: text, image and image_url are known")
    return parts
