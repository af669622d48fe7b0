"""Program: the texts that a folder's chat template makes of chat messages, before they become tokens.

`PYTHON render_texts.py MODEL_FOLDER MESSAGES_JSON OUTPUT_JSON`. MESSAGES_JSON holds a list of conversations.
OUTPUT_JSON gets `texts` in the same order (null where the template refuses a conversation), `bos` and `eos`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from methods.toolkit import remote_code


def main() -> None:
    """Render every conversation with the header that makes the model answer."""
    from jinja2.exceptions import TemplateError
    from transformers import AutoTokenizer

    folder, messages_file, output = sys.argv[1:]
    loader: Any = AutoTokenizer
    tokenizer = loader.from_pretrained(folder, **remote_code.loading(folder))
    texts = []
    for messages in json.loads(Path(messages_file).read_text(encoding="utf-8")):
        try:
            texts.append(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except TemplateError:
            texts.append(None)
    content = {"texts": texts, "bos": tokenizer.bos_token, "eos": tokenizer.eos_token}
    Path(output).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
