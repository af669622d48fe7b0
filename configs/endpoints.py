"""The record of an endpoint: what is deployed at a stable address, and what was before."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

API_KEY_VARIABLE = "TUNELINE_ENDPOINT_KEY"
"""The environment variable an endpoint's API key is taken from: in argv or a flow's parameters it would be
stored."""

LOOPBACK_HOSTS = frozenset({"127.0.0.1", "::1", "localhost"})

Target = Literal["transformers", "llama.cpp", "vllm", "ollama", "custom"]
Quantization = Literal["bnb-4bit", "bnb-8bit", "q8_0", "q4_K_M", "q4_K_S", "bitsandbytes", "fp8"]
QUANTIZATIONS: dict[Target, tuple[Quantization, ...]] = {
    "transformers": ("bnb-4bit", "bnb-8bit"),
    "llama.cpp": ("q8_0", "q4_K_M", "q4_K_S"),
    "vllm": ("bitsandbytes", "fp8"),
    "ollama": ("q8_0", "q4_K_M", "q4_K_S"),
    "custom": (),
}
"""How each target can hold the weights with fewer bits."""

GREEDY_SETTINGS = (
    "repetition_penalty",
    "no_repeat_ngram_size",
    "bad_words_ids",
    "suppress_tokens",
    "begin_suppress_tokens",
    "sequence_bias",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "exponential_decay_length_penalty",
    "min_length",
    "min_new_tokens",
    "guidance_scale",
)
"""Settings of a model's generation_config.json that change its answers at temperature 0 too."""
APPLIED_SETTINGS: dict[Target, tuple[str, ...]] = {
    "transformers": GREEDY_SETTINGS,
    "llama.cpp": (),
    "vllm": ("repetition_penalty",),
    "ollama": (),
    "custom": GREEDY_SETTINGS,
}
"""Those of them that each target applies to the answers of every request."""
DeploymentState = Literal["starting", "current", "retired", "failed"]


MODEL_NAME_BYTES = 200
"""Longest name of a model in UTF-8: it is the name of a folder, of which a file system takes 255 bytes."""


def _usable_as_folder(name: str) -> str:
    if ".." in name:
        raise ValueError("may not contain '..'")
    if len(name.encode()) > MODEL_NAME_BYTES:
        raise ValueError(f"may not have more than {MODEL_NAME_BYTES} bytes in UTF-8")
    return name


EndpointName = Annotated[
    str,
    StringConstraints(pattern=r"^[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?$"),
    Field(json_schema_extra={"limits": "a-z, 0-9 and - inside (at most 63), as in a host name"}),
]
# No '@' and no ':': `transformers serve` reads a revision or a GGUF file after them. No '/': the name is a folder.
# Letters of any script: the name of a train, which may be Chinese, is a part of it.
ModelName = Annotated[str, StringConstraints(pattern=r"^[^\W_][\w.-]*$"), AfterValidator(_usable_as_folder)]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ProcessReference(_Record):
    """A process that can be told from a later one to which the system gave the same pid."""

    pid: int = Field(gt=0)
    started: float = Field(description="When the process began, in the unit of `process_start()`.")


class Probe(_Record):
    """One question whose prompt tokens, and answer, are known from training."""

    messages: list[dict[str, Any]] = Field(min_length=1, description="Chat messages as OpenAI's interface takes them.")
    tools: list[dict[str, Any]] | None = Field(default=None, description="Tools that the model may call, by schema.")
    prompt_token_ids: list[int] = Field(min_length=1, description="What the model's template makes of them today.")
    tool_calls: list[dict[str, Any]] = Field(
        default_factory=list, description="Name and arguments of each call in the greedy answer."
    )
    answer: str | None = Field(default=None, description="Greedy answer of the model; None: not compared.")
    max_new_tokens: int = Field(default=64, ge=1)


class RequestProbe(_Record):
    """A request to a model that does not chat, and what its inference stage has made of it."""

    request: dict[str, Any] = Field(description="`{texts: [...]}` or `{caption: ...}`, as that stage is asked.")
    prediction: dict[str, Any] = Field(description="`{embeddings: [[...]]}`, or `{b64_json: ...}` of a picture.")


class Verification(_Record):
    """What was proved before the endpoint was switched to a deployment."""

    prompts_checked: int
    answers_checked: int
    prompts_compared: Literal["tokens", "counts", "nothing"] = Field(
        default="tokens", description="What of the prompts was compared: every token, or their number alone."
    )
    answers_skipped: str | None = Field(default=None, description="Why some answers were not compared.")
    answers_same: int | None = Field(
        default=None, description="Quantised here: how many known answers it gave all the same."
    )
    figures: dict[str, float] = Field(
        default_factory=dict, description="Models that do not chat: how near the answers came to those expected."
    )


class Deployment(_Record):
    """One deployed model: its weights, the server process it runs in, and how it came to be current."""

    model: ModelName = Field(description="Deployed model name, `MODEL_d_xxxx[_QUANT]`.")
    model_name: ModelName
    model_path: Path
    target: Target = "transformers"
    quantization: Quantization | None = None
    python: Path = Field(description="Interpreter that serves it.")
    program: Path | None = Field(default=None, description="Target custom: the method's deploying file.")
    base_path: Path | None = Field(default=None, description="Target custom: the base model, if this is an adapter.")
    device: str = "auto"
    dtype: str = "auto"
    port: int | None = Field(default=None, description="Port of the backend, always on 127.0.0.1.")
    process: ProcessReference | None = None
    server: str | None = Field(default=None, description="Base URL of a server that is not ours and holds the model.")
    name_there: str | None = Field(default=None, description="The model's name at that server.")
    log: Path
    state: DeploymentState = "starting"
    created_at: datetime
    switched_at: datetime | None = Field(default=None, description="When the endpoint was last switched to it.")
    verification: Verification | None = None
    notes: list[str] = Field(default_factory=list, description="What one ought to know of how it is served.")
    failure: str | None = None

    @property
    def backend(self) -> str:
        """Base URL of the server behind the gateway."""
        return self.server or f"http://127.0.0.1:{self.port}"

    @property
    def backend_model(self) -> str:
        """What the server behind the gateway calls the model."""
        return self.name_there or self.model

    @property
    def health_path(self) -> str:
        """Where that server says that it is up; Ollama has its word of welcome for it."""
        return "/" if self.target == "ollama" else "/health"


class Gateway(_Record):
    """The process that listens on the endpoint's address; the port is kept for good."""

    host: str
    port: int = Field(ge=1, le=65535)
    process: ProcessReference | None = None
    log: Path


class Endpoint(_Record):
    """A stable address with a name, its current deployment and its history (oldest first)."""

    name: EndpointName
    gateway: Gateway | None = None
    deployments: list[Deployment] = Field(default_factory=list)
    current: ModelName | None = Field(default=None, description="Deployed model that answers; None: undeployed.")
    api_key_sha256: str | None = None

    @property
    def address(self) -> str | None:
        """Base URL for an OpenAI client, e.g. `http://127.0.0.1:8100/v1`."""
        if self.gateway is None:
            return None
        host = self.gateway.host
        return f"http://{f'[{host}]' if ':' in host else host}:{self.gateway.port}/v1"

    def deployment(self, model: str | None) -> Deployment | None:
        """The deployment of this deployed model name, or None."""
        return next((each for each in self.deployments if each.model == model), None)

    @property
    def current_deployment(self) -> Deployment | None:
        """The deployment that answers now, or None after `undeploy`."""
        return self.deployment(self.current)


class EndpointStatus(BaseModel):
    """An endpoint as it is at this moment."""

    model_config = ConfigDict(protected_namespaces=())

    name: str
    address: str | None
    current: str | None
    state: Literal["up", "gateway down", "model down", "down", "undeployed"]
    api_key_required: bool
    history: list[str] = Field(description="Deployed models that were once current, oldest first.")
