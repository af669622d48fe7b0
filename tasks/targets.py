"""What serves a deployed model: one file a target, each with the same functions in the same order."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from configs.endpoints import Deployment, Probe, Target
from tasks import target_custom, target_llama_cpp, target_ollama, target_transformers, target_vllm
from tasks.model_server import EndpointWork


class TargetFile(Protocol):
    """What every `target_….py` offers."""

    PROMPTS_NEED_SERVER: bool
    """Whether `prompt_tokens` asks the server; otherwise it can go on while that starts."""

    def ready(self) -> str | None:
        """Why this host cannot serve so, and how to mend it; None: it can."""

    def check(self, deployment: Deployment) -> None:
        """Refuse what cannot be served, before anything is started. Raises UserError."""

    def prepare(self, work: EndpointWork, deployment: Deployment) -> Path:
        """Make what is served, a file or a folder, unless it is there. Raises UserError."""

    def start(self, work: EndpointWork, deployment: Deployment, served: Path, timeout: float) -> None:
        """Have it served, and wait until it is. Nothing if it is served already. Raises UserError."""

    def prompt_tokens(
        self, deployment: Deployment, served: Path, probes: Sequence[Probe], timeout: float
    ) -> list[list[int]] | None:
        """Token ids that are made of each probe; None if the target does not tell them. Raises UserError."""

    def is_up(self, deployment: Deployment) -> bool:
        """Whether it is served now."""

    def stop(self, deployment: Deployment, grace: float) -> None:
        """Serve it no longer; requests under way get `grace` seconds."""


TARGETS: dict[Target, TargetFile] = {
    "transformers": target_transformers,
    "llama.cpp": target_llama_cpp,
    "vllm": target_vllm,
    "ollama": target_ollama,
    "custom": target_custom,
}
