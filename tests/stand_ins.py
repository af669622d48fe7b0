"""Programs that stand in for servers that cannot be had here: made for a test, with the interface that they document.

They refuse what the real one would refuse, answer with what the test says, and keep what they were asked.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.endpoints import Probe
from tasks.llama_cpp import VERSION

_CHAT_SERVER = '''
import argparse, json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

HERE = Path(__file__).resolve().parent


def known(messages):
    """What the test says of these messages: tokens of the prompt, and the answer."""
    text = json.dumps(messages)
    return json.loads((HERE / "known.json").read_text())[text]


class Handler(BaseHTTPRequestHandler):
    routes = {}

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self.answer(*((200, {}) if self.path == "/health" else (404, {"error": "no such route"})))

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with (HERE / "asked.jsonl").open("a") as kept:
            told = {name.lower(): value for name, value in self.headers.items()}
            kept.write(json.dumps({"path": self.path, "headers": told, "body": asked}) + "\\n")
        route = self.routes.get(self.path)
        if route is None:
            self.answer(404, {"error": "no such route"})
            return
        route(self, asked)

    def chat(self, asked):
        told = known(asked["messages"])
        if not asked.get("stream"):
            message = {"role": "assistant", "content": told["answer"]}
            usage = {"prompt_tokens": len(told["tokens"]), "completion_tokens": 1, "total_tokens": 0}
            choice = {"index": 0, "message": message, "finish_reason": "stop"}
            self.answer(200, {"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"],
                              "choices": [choice], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        for word in told["answer"].split(" "):
            choice = {"index": 0, "delta": {"content": word + " "}, "finish_reason": None}
            chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": asked["model"],
                     "choices": [choice]}
            self.wfile.write(f"data: {json.dumps(chunk)}\\n\\n".encode())
        self.wfile.write(b"data: [DONE]\\n\\n")

    def log_message(self, *_):
        return


def keep_start():
    (HERE / "started.json").write_text(json.dumps({"argv": sys.argv[1:], "environment": dict(os.environ)}))


def serve(host, port):
    ThreadingHTTPServer((host, port), Handler).serve_forever()
'''

_VLLM = """
parser = argparse.ArgumentParser(allow_abbrev=False)
commands = parser.add_subparsers(required=True)
options = commands.add_parser("serve", allow_abbrev=False)
options.add_argument("model")
options.add_argument("--host", required=True)
options.add_argument("--port", type=int, required=True)
options.add_argument("--dtype", choices=["auto", "half", "float16", "bfloat16", "float", "float32"], default="auto")
options.add_argument("--served-model-name", nargs="+", required=True)
options.add_argument("--tokenizer")
options.add_argument("--quantization", choices=["bitsandbytes", "fp8", "awq", "gptq"])
options.add_argument("--enable-lora", action="store_true")
options.add_argument("--lora-modules", nargs="+", default=[])
options.add_argument("--max-lora-rank", type=int, choices=[1, 8, 16, 32, 64, 128, 256, 320, 512], default=16)
given = options.parse_args(sys.argv[2:]) if sys.argv[1] == "serve" else parser.parse_args()
if not (Path(given.model) / "config.json").is_file():
    sys.exit("vllm: error: no config.json in " + given.model)
if given.lora_modules and not given.enable_lora:
    sys.exit("vllm: error: --lora-modules without --enable-lora")
names = [*given.served_model_name, *(module.split("=", 1)[0] for module in given.lora_modules)]


def checked(route):
    def answer(self, asked):
        if asked.get("model") not in names:
            self.answer(404, {"error": {"message": "The model does not exist.", "code": 404}})
            return
        route(self, asked)
    return answer


def tokenize(self, asked):
    unknown = set(asked) - {"model", "messages", "add_generation_prompt", "add_special_tokens"}
    if unknown:
        self.answer(400, {"error": sorted(unknown)})
        return
    tokens = known(asked["messages"])["tokens"]
    self.answer(200, {"count": len(tokens), "max_model_len": 512, "tokens": tokens})


Handler.routes = {"/v1/chat/completions": checked(Handler.chat), "/tokenize": checked(tokenize)}
keep_start()
serve(given.host, given.port)
"""


_LLAMA_SERVER = """
options = argparse.ArgumentParser(allow_abbrev=False)
options.add_argument("--model", type=Path, required=True)
options.add_argument("--alias", required=True)
options.add_argument("--host", required=True)
options.add_argument("--port", type=int, required=True)
options.add_argument("--device", choices=["none"])
for switch in ("--jinja", "--offline", "--no-ui", "--no-slots"):
    options.add_argument(switch, action="store_true")
given = options.parse_args()
if given.model.read_bytes()[:4] != b"GGUF":
    sys.exit("gguf_init_from_file: failed to read magic")


def apply_template(self, asked):
    self.answer(200, {"prompt": json.dumps(asked["messages"])})


def tokenize(self, asked):
    self.answer(200, {"tokens": known(json.loads(asked["content"]))["tokens"]})


Handler.routes = {
    "/v1/chat/completions": Handler.chat, "/apply-template": apply_template, "/tokenize": tokenize
}
keep_start()
serve(given.host, given.port)
"""

_QUANTISER = """
source, made, kind = sys.argv[1:]
if kind not in ("Q8_0", "Q4_K_M", "Q4_K_S"):
    sys.exit("invalid ftype '" + kind + "'")
Path(made).write_bytes(Path(source).read_bytes())
print("llama_model_quantize_impl: WARNING: 3 of 9 tensor(s) required fallback quantization")
keep_start()
"""

_CONVERTER = """
options = argparse.ArgumentParser(allow_abbrev=False)
options.add_argument("folder", type=Path)
options.add_argument("--outfile", type=Path, required=True)
options.add_argument("--outtype", choices=["f32", "f16", "bf16", "q8_0", "auto"], required=True)
options.add_argument("--model-name", required=True)
given = options.parse_args()
if json.loads((given.folder / "config.json").read_text()).get("model_type") != "llama":
    given.outfile.write_bytes(b"half a file")
    sys.exit("Model architecture is not supported")
import gguf
writer = gguf.GGUFWriter(given.outfile, "llama")
writer.add_name(given.model_name)
writer.add_file_type({"f32": 0, "f16": 1, "bf16": 32, "auto": 1}[given.outtype])
writer.add_add_bos_token(False)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.close()
keep_start()
"""


class StandIn:
    """A program of a test; `known` is what it says of the probes' messages."""

    def __init__(self, program: Path, code: str) -> None:
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!{sys.executable}\n{_CHAT_SERVER}\n{code}", encoding="utf-8")
        program.chmod(0o755)
        self.folder = program.parent

    def knows(self, probes: Iterable[Probe], changed: Mapping[str, Any] | None = None) -> None:
        """From now on it answers as the probes say, but for what is `changed`."""
        told = {
            json.dumps(probe.messages): {"tokens": probe.prompt_token_ids, "answer": probe.answer, **(changed or {})}
            for probe in probes
        }
        (self.folder / "known.json").write_text(json.dumps(told), encoding="utf-8")

    @property
    def started(self) -> dict[str, Any]:
        """The arguments and the environment of its last start."""
        content: dict[str, Any] = json.loads((self.folder / "started.json").read_text(encoding="utf-8"))
        return content

    @property
    def asked(self) -> list[dict[str, Any]]:
        """Every request that it got: path, headers, body."""
        return [json.loads(line) for line in (self.folder / "asked.jsonl").read_text(encoding="utf-8").splitlines()]


def vllm(environment: Path) -> StandIn:
    """An environment with `bin/vllm`, whose options and routes are those that vLLM documents."""
    return StandIn(environment / "bin" / "vllm", _VLLM)


@dataclass
class LlamaCppStandIn:
    """The three programs of llama.cpp; the converter writes real GGUF files, without weights."""

    server: StandIn
    quantiser: StandIn
    converter: StandIn


def llama_cpp(root: Path) -> LlamaCppStandIn:
    """What `tuneline targets install llama.cpp` leaves in `root`, whose programs take the options that we give."""
    folder = root / VERSION
    made = LlamaCppStandIn(
        StandIn(folder / "bin" / "llama-server", _LLAMA_SERVER),
        StandIn(folder / "quantise" / "llama-quantize", _QUANTISER),
        StandIn(folder / "convert" / "convert_hf_to_gguf.py", _CONVERTER),
    )
    (folder / "bin" / "llama-quantize").symlink_to(made.quantiser.folder / "llama-quantize")
    (folder / "built.json").write_text("{}", encoding="utf-8")
    return made
