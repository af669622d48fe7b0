"""What `tuneline up` remembers of a server it started, and what it tells about it."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

ServiceName = Literal["prefect", "mlflow", "worker"]
ServiceState = Literal[
    "started", "already running", "running", "not answering", "stopped", "not running", "left to its supervisor"
]


class ServiceRecord(BaseModel):
    """One started server: enough to find exactly this process again, and never another one."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ServiceName
    pool: str | None = Field(default=None, description="Work pool of a worker; None for a server.")
    pid: int = Field(gt=1, description="Leader of the process group that the server runs in.")
    process_start: float = Field(description="When the process began, in the unit of `process_start()`.")
    token: str = Field(min_length=1, description="Value of TUNELINE_SERVICE_TOKEN in its environment.")
    started_at: datetime = Field(description="When it was started, UTC.")
    command: list[str] = Field(min_length=1)
    address: str = Field(description="URL it answers at; for the worker, the Prefect API it asks for work.")
    given: dict[str, str] = Field(description="Addresses of the other servers that it was started with.")
    log: Path | None = Field(description="Where its output goes; None if its supervisor (systemd) keeps it.")
    ready: bool = Field(description="Whether it has been seen healthy.")
    supervised: bool = Field(default=False, description="Run by `tuneline serve`: `down` leaves it alone.")

    @property
    def label(self) -> str:
        """What it is called in messages and files: `prefect`, `mlflow`, `worker-POOL`."""
        return self.name if self.pool is None else f"{self.name}-{self.pool}"


class ServiceStatus(BaseModel):
    """How a server is now, or what `up` or `down` has just done with it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: ServiceName
    pool: str | None = None
    state: ServiceState
    pid: int | None = None
    address: str | None = None
    log: Path | None = None


class Addresses(BaseModel):
    """Where the running servers answer; None for one that does not run."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prefect_api: str | None = None
    prefect_ui: str | None = None
    mlflow: str | None = None
