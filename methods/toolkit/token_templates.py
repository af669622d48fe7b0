"""A chat template for models that mark turns by single tokens and name these in their generation configuration.

Baichuan2 is of this kind: `user_token_id` before what the user says, `assistant_token_id` before each answer, a system
text in front of both, and no template in the folder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from methods.contract import Refused
from methods.toolkit.remote_code import read_object

_TEMPLATE = (
    "{{% for message in messages %}}"
    "{{% if message['role'] == 'user' %}}{{{{ {user!r} + message['content'] }}}}"
    "{{% elif message['role'] == 'assistant' %}}{{{{ {assistant!r} + message['content'] + eos_token }}}}"
    "{{% else %}}{{{{ message['content'] }}}}{{% endif %}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ {assistant!r} }}}}{{% endif %}}"
)


def of_generation_config(path: str, tokenizer: Any) -> str | None:
    """A template of the two tokens that generation_config.json names; None if it names none.

    A tokenizer that reads the text of such a token together with what is around it is given it as a special token: then
    each turn is tokenised on its own, as the model was trained.

    Raises Refused if the tokenizer does not read the text of such a token as the token itself.
    """
    file = Path(path) / "generation_config.json"
    content = read_object(file) if file.is_file() else {}
    ids = [content.get(f"{role}_token_id") for role in ("user", "assistant")]
    if not all(isinstance(each, int) for each in ids):
        return None
    user, assistant = (_text(tokenizer, each, file) for each in ids)
    return _TEMPLATE.format(user=user, assistant=assistant)


def _read(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids


def _text(tokenizer: Any, token: Any, file: Path) -> str:
    text = tokenizer.convert_ids_to_tokens(token)
    if isinstance(text, str) and _read(tokenizer, text) != [token]:
        tokenizer.add_tokens([text], special_tokens=True)
    read = _read(tokenizer, text) if isinstance(text, str) else []
    if read != [token]:
        raise Refused(
            f"{file} names the token {token} for turns, but the tokenizer reads its text {text!r} as {read}: "
            "register the base model with a template of its own (`tuneline models add --chat-template FILE`)"
        )
    return str(text)
