"""A tiny model behind an HTTP route, for the deploying files of methods."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

Reply = tuple[int, dict[str, Any]]
Route = Callable[[dict[str, Any]], Reply]


class Answering:
    """A model folder (and adapters on it by name) that answers greedily."""

    def __init__(self, base: Path, tokenizer: Path, adapters: Mapping[str, Path]) -> None:
        from peft import PeftModel
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.models = {"": AutoModelForCausalLM.from_pretrained(base)}
        for name, path in adapters.items():
            self.models[name] = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), path)

    def tokens(self, messages: list[dict[str, str]]) -> list[int]:
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        return list(rendered["input_ids"])

    def chat(self, asked: dict[str, Any], name: str = "") -> Reply:
        import torch

        ids = self.tokens(asked["messages"])
        with torch.no_grad():
            output = self.models[name].generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                do_sample=False,
                max_new_tokens=asked["max_tokens"],
            )
        text = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        usage = {"prompt_tokens": len(ids), "completion_tokens": 1, "total_tokens": len(ids) + 1}
        return 200, {"id": "x", "object": "chat.completion", "model": asked["model"], "created": 1, "choices": [choice],
                     "usage": usage}  # fmt: skip


def handler(routes: Mapping[str, Route]) -> type[BaseHTTPRequestHandler]:
    """Answers in JSON: `routes` by `METHOD /path`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            route = routes.get(f"{self.command} {self.path}")
            code, content = route(json.loads(body or b"{}")) if route else (404, {"error": "no such route"})
            text = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = _answer  # noqa: N815

        def log_message(self, format: str, *arguments: object) -> None:
            """Nothing."""

    return Handler
