"""A model's chat template as a Go template, the only kind that Ollama takes; refused where the two would differ.

Nothing is guessed from names of model families. The model's own template renders a few conversations; the text before,
between and after their messages is all that the Go template writes. Conversations of other lengths, and those the model
was trained on, must then come out the same.

What cannot be seen so: templates that cut white space at the ends of a message; Go's does not.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.errors import UserError

Messages = Sequence[Mapping[str, str]]

_SYSTEM, _FIRST, _ANSWER, _SECOND = "SYSTEMTEXT", "FIRSTTEXT", "ANSWERTEXT", "SECONDTEXT"


def _turns(*contents: str, system: bool = False) -> list[dict[str, str]]:
    roles = ["system"] * system + ["user", "assistant"] * len(contents)
    return [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]


# The first three say all; the others are the test of it. Each ends with a user, whom the model is to answer.
CONVERSATIONS: list[list[dict[str, str]]] = [
    _turns(_FIRST),
    _turns(_FIRST, _ANSWER, _SECOND),
    _turns(_SYSTEM, _FIRST, system=True),
    _turns(_SYSTEM, _FIRST, _ANSWER, _SECOND, system=True),
    _turns("one", "two", "three", "four", "five"),
    _turns("none", "one\n\ntwo", "three", "four?", "five", "six", system=True),
]


@dataclass(frozen=True)
class Pieces:
    """What a template writes around the messages of a conversation.

    Attributes:
        first: before the first message of a user where there is no system message.
        before_system: before a system message; None if the template refuses those.
        after_system: between a system message and the user's.
        answer: between a user's message and the answer.
        next: between an answer and the next message of the user.
        tail: after the last message of a user; the model goes on from there.
        system: the system message that the template puts in where there is none.
    """

    first: str
    before_system: str | None
    after_system: str
    answer: str
    next: str
    tail: str
    system: str | None

    def compose(self, messages: Messages) -> str:
        """The text of a conversation, as the Go template makes it."""
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        text, last = "", ""
        for message in messages:
            before = {
                ("", "system"): self.before_system or "",
                ("", "user"): self.first,
                ("system", "user"): self.after_system,
                ("user", "assistant"): self.answer,
                ("assistant", "user"): self.next,
            }.get((last, message["role"]), "")
            text, last = text + before + message["content"], message["role"]
        return text + (self.tail if last == "user" else "")

    def go(self) -> str:
        """The Go template. Text stands in quotes, so that no brace or blank of it means anything."""
        system = ""
        if self.before_system is not None:
            system = f'{{{{ if eq .Role "system" }}}}{_quoted(self.before_system)}{{{{ .Content }}}}{_last("system")}'
        user = (
            f'{{{{ if eq $last "" }}}}{_quoted(self.first)}'
            f'{{{{ else if eq $last "system" }}}}{_quoted(self.after_system)}'
            f"{{{{ else }}}}{_quoted(self.next)}{{{{ end }}}}{{{{ .Content }}}}{_last('user')}"
        )
        answer = f"{_quoted(self.answer)}{{{{ .Content }}}}{_last('assistant')}"
        return (
            '{{ $last := "" }}{{ range .Messages }}'
            f'{system}{{{{ {"else " * bool(system)}if eq .Role "user" }}}}{user}'
            f'{{{{ else if eq .Role "assistant" }}}}{answer}{{{{ end }}}}'
            f'{{{{ end }}}}{{{{ if eq $last "user" }}}}{_quoted(self.tail)}{{{{ end }}}}'
        )


def derive(texts: Sequence[str | None], bos: str | None, adds_bos: bool) -> Pieces:
    """The pieces behind the rendered `CONVERSATIONS`; `adds_bos`: the server itself puts the first token in front.

    Raises UserError with the reason if no Go template writes the same.
    """
    one, two, with_system = (_without_bos(text, bos, adds_bos) for text in texts[:3])
    if one is None or two is None:
        raise _inexpressible("it refuses a plain conversation")
    try:
        first, rest = two.split(_FIRST)
        answer, rest = rest.split(_ANSWER)
        after, tail = rest.split(_SECOND)
        before_system, after_system = None, ""
        if with_system is not None:
            before_system, rest = with_system.split(_SYSTEM)
            after_system, _ = rest.split(_FIRST)
    except ValueError as error:
        raise _inexpressible("it does not write each message once, as it is") from error
    system = _default_system(first, before_system, after_system)
    pieces = Pieces(first, before_system, after_system, answer, after, tail, system)
    for messages, text in zip(CONVERSATIONS, texts, strict=False):
        if text is not None:
            verify(pieces, messages, _without_bos(text, bos, adds_bos))
    return pieces


def verify(pieces: Pieces, messages: Messages, text: str | None) -> None:
    """Refuse pieces that make another text of a conversation than the model's own template. Raises UserError."""
    composed = pieces.compose(messages)
    if text is None or composed == text:
        return
    shorter = min(len(composed), len(text))
    place = next((at for at in range(shorter) if composed[at] != text[at]), shorter)
    around = slice(max(0, place - 20), place + 40)
    raise _inexpressible(f"it writes {text[around]!r} where a Go template would write {composed[around]!r}")


def without_bos(text: str, bos: str | None, adds_bos: bool) -> str:
    """The text without its first token where the server adds that itself. Raises UserError if it would be one more."""
    if not adds_bos:
        return text
    if not bos or not text.startswith(bos):
        raise _inexpressible("the server adds a first token that the template does not write")
    return text.removeprefix(bos)


def _without_bos(text: str | None, bos: str | None, adds_bos: bool) -> str | None:
    return None if text is None else without_bos(text, bos, adds_bos)


def _default_system(first: str, before: str | None, after: str) -> str | None:
    """The system message that the template puts in by itself, if `first` holds one between `before` and `after`."""
    if before is None or len(first) <= len(before) + len(after):
        return None
    if not (first.startswith(before) and first.endswith(after)):
        return None
    return first[len(before) : len(first) - len(after)]


def _quoted(text: str) -> str:
    # JSON's strings are Go's as well, as long as nothing beyond the basic plane is written as two halves.
    return f"{{{{ {json.dumps(text, ensure_ascii=False)} }}}}" if text else ""


def _last(role: str) -> str:
    return f'{{{{ $last = "{role}" }}}}'


def _inexpressible(reason: str) -> UserError:
    return UserError(
        f"the model's chat template cannot be written as one of Ollama's: {reason}",
        field="chat_template",
        mend="deploy it to the target llama.cpp, which reads the model's own template",
    )
