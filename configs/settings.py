"""Where an installation keeps its things. Every path of Tuneline is derived here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from configs.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent
HEARTBEAT_SECONDS = 30
"""How often a flow run says that it is alive; Prefect takes no less."""
SILENCE_SECONDS = 3 * HEARTBEAT_SECONDS + 10
"""After how long without a heartbeat a flow run has crashed. With less than three, one late report would do it."""


class Settings(BaseSettings):
    """Settings of this installation, each from the environment variable `TUNELINE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="TUNELINE_", extra="ignore")

    home: Path = Field(default=Path("~/.tuneline"), description="Folder of everything Tuneline writes.")
    host: str = Field(default="127.0.0.1", description="Address the servers bind to.")
    prefect_port: int = Field(default=4200, ge=1, le=65535, description="Port of the Prefect server.")
    mlflow_port: int = Field(default=5000, ge=1, le=65535, description="Port of the MLflow server.")
    public_host: str | None = Field(
        default=None,
        description="Name or address by which browsers and other hosts reach the servers. By default the host they "
        "bind to, or this host's name if that is every address (0.0.0.0).",
    )
    user: str | None = Field(default=None, description="User of both servers; needed if the host is not loopback.")
    password: SecretStr | None = Field(default=None, description="Password of that user, at least 12 characters.")
    prefect_database: SecretStr | None = Field(
        default=None, description="postgresql://USER:PASSWORD@HOST/NAME of Prefect; by default a SQLite file."
    )
    mlflow_database: SecretStr | None = Field(
        default=None, description="postgresql://USER:PASSWORD@HOST/NAME of MLflow; by default a SQLite file."
    )
    grace_seconds: float = Field(
        default=60.0, gt=0, description="How long a cancelled stage may take to save its checkpoint."
    )
    gpus: str | None = Field(
        default=None,
        pattern=r"^\s*$|^\s*(\d+|(GPU|MIG)-[\w/-]+)(\s*,\s*(\d+|(GPU|MIG)-[\w/-]+))*\s*$",
        description="GPUs that trains on this host may use, as CUDA device ids (those of nvidia-smi) or UUIDs, such as "
        "0,1; empty: none; not set: what `nvidia-smi -L` lists.",
    )
    gpu_locks: Path = Field(
        default=Path("~/.tuneline-gpus"),
        description="Folder of the GPU slots' lock files; one for the whole host, whatever installations it has.",
    )
    conda: str | None = Field(
        default=None,
        description="Program that makes conda environments: conda, mamba or micromamba, or its path; empty: none; not "
        "set: the first of the three on the PATH.",
    )
    method_changes: Literal["allowed", "closed"] = Field(
        default="allowed", description="Whether training methods can be added and deleted."
    )
    endpoint_gpus: str | None = Field(
        default=None,
        description="CUDA_VISIBLE_DEVICES of model servers, which hold no slot; not set: that of whoever deploys.",
    )
    endpoint_host: str | None = Field(
        default=None,
        description="Address that endpoints listen on; by default 127.0.0.1. Any other needs an API key.",
    )
    llama_cpp: Path = Field(
        default=Path("~/.cache/tuneline/llama.cpp"),
        description="Folder that llama.cpp is built into, once for all installations that share it.",
    )
    vllm: Path | None = Field(default=None, description="Folder of an environment that has vLLM (bin/vllm).")

    @property
    def root(self) -> Path:
        """The home folder, absolute, with `~` resolved."""
        return self.home.expanduser().resolve()

    @property
    def datasets(self) -> Path:
        """Immutable dataset versions: `NAME/DIGEST/`."""
        return self.root / "datasets"

    @property
    def models(self) -> Path:
        """Weights: one folder a model, named by the model."""
        return self.root / "models"

    @property
    def base_models(self) -> Path:
        """Base models fetched or converted once, and `base_models.yaml` with what the user added."""
        return self.root / "base_models"

    @property
    def allowed_code(self) -> Path:
        """The user's consent to code that models bring, by digest; the only place that can give it."""
        return self.root / "allow_remote_code.yaml"

    @property
    def trains(self) -> Path:
        """Job folders of trains: `TRAIN_ID/STAGE/`."""
        return self.root / "trains"

    @property
    def endpoints(self) -> Path:
        """One folder an endpoint: what is deployed there, its history and logs."""
        return self.root / "endpoints"

    @property
    def retraining(self) -> Path:
        """One folder a line that is retrained: its policy, its schedule, what came of it."""
        return self.root / "retraining"

    @property
    def evaluations(self) -> Path:
        """Models side by side: a folder each, with its report and its table of rows."""
        return self.root / "evaluations"

    @property
    def sweeps(self) -> Path:
        """One folder a sweep: what it is to train, the logs of its trains, what came of it."""
        return self.root / "sweeps"

    @property
    def comparisons(self) -> Path:
        """Pages of trains side by side."""
        return self.root / "comparisons"

    @property
    def methods(self) -> Path:
        """Training methods that were added: a folder each, named by the method."""
        return self.root / "methods"

    @property
    def profiles(self) -> Path:
        """Parameter profiles: a YAML file each, named by the profile."""
        return self.root / "profiles"

    @property
    def environments(self) -> Path:
        """Environments of stages: one a name, made from a method's `environment.yml`."""
        return self.root / "envs"

    @property
    def services(self) -> Path:
        """Records and logs of the servers that `tuneline up` started."""
        return self.root / "services"

    @property
    def mlflow_sqlite(self) -> Path:
        """The SQLite file that the embedded client and the server share, unless `mlflow_database` names another."""
        return self.root / "mlflow" / "mlflow.db"

    @property
    def mlflow_artifacts(self) -> Path:
        """Artifacts of MLflow runs."""
        return self.root / "mlflow" / "artifacts"

    @property
    def prefect_home(self) -> Path:
        """Prefect's own folder; the ephemeral and the standing server share its SQLite file."""
        return self.root / "prefect"


def load_settings() -> Settings:
    """The settings of the environment as it is now (not cached, so that tests can move the home).

    Raises UserError for a variable with an impossible value.
    """
    try:
        return Settings()
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(
            "an environment variable has an impossible value",
            field=f"TUNELINE_{str(first['loc'][0]).upper()}",
            value=first["input"],  # never a secret: those take any text, and are checked where they are used
            expected=first["msg"],
        ) from error


def apply_environment(settings: Settings) -> None:
    """Set the variables Prefect, MLflow and the Hugging Face libraries read, before any of them is imported.

    A variable that is already set is left alone: whoever set it wants it so.
    """
    defaults = {
        "PREFECT_HOME": str(settings.prefect_home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
        "DO_NOT_TRACK": "1",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    # Not left alone: with Prefect's own 180 s, or more, every healthy run would be taken for a crashed one.
    os.environ["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"] = str(HEARTBEAT_SECONDS)
