"""Program: the prompt tokens that a served folder's chat template makes of chat messages.

`PYTHON render_prompts.py MODEL_FOLDER MESSAGES_JSON OUTPUT_JSON`. MESSAGES_JSON holds a list of pairs, the messages
of a conversation and its tools (null without), OUTPUT_JSON gets a list of token id lists in the same order (a file,
because libraries print to standard output).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from methods.toolkit import remote_code


def main() -> None:
    """Render every conversation the way `transformers serve` does: same loader, same arguments."""
    from transformers import AutoProcessor

    folder, messages_file, output = sys.argv[1:]
    conversations = json.loads(Path(messages_file).read_text(encoding="utf-8"))
    loader: Any = AutoProcessor
    processor = loader.from_pretrained(folder, **remote_code.loading(folder))
    rendered = [
        processor.apply_chat_template(
            [_as_served(message) for message in messages],
            tools=tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )["input_ids"]
        for messages, tools in conversations
    ]
    Path(output).write_text(json.dumps([_flat(ids) for ids in rendered]), encoding="utf-8")


def _as_served(message: dict[str, Any]) -> dict[str, Any]:
    """A message with its images where the server puts them: OpenAI's interface calls them otherwise."""
    if isinstance(message.get("content") or "", str):
        return message
    parts = [
        {"type": "image", "url": part["image_url"]["url"]} if part["type"] == "image_url" else part
        for part in message["content"]
    ]
    return {**message, "content": parts}


def _flat(ids: Any) -> list[int]:
    """The token ids of one conversation; a processor of images gives them as a batch of one."""
    return list(ids[0] if len(ids) == 1 and not isinstance(ids[0], int) else ids)


if __name__ == "__main__":
    main()
