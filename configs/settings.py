"""Where an installation keeps its things. Every path of Tuneline is derived here and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from configs.errors import UserError

PROJECT_ROOT = Path(__file__).resolve().parent.parent


class Settings(BaseSettings):
    """Settings of this installation, each from the environment variable `TUNELINE_<NAME>`."""

    model_config = SettingsConfigDict(env_prefix="TUNELINE_", extra="ignore")

    home: Path = Field(default=Path("~/.tuneline"), description="Folder of everything Tuneline writes.")
    host: str = Field(default="127.0.0.1", description="Address the servers bind to.")
    prefect_port: int = Field(default=4200, ge=1, le=65535, description="Port of the Prefect server.")
    mlflow_port: int = Field(default=5000, ge=1, le=65535, description="Port of the MLflow server.")
    grace_seconds: float = Field(
        default=60.0, gt=0, description="How long a cancelled stage may take to save its checkpoint."
    )

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
    def trains(self) -> Path:
        """Job folders of trains: `TRAIN_ID/STAGE/`."""
        return self.root / "trains"

    @property
    def endpoints(self) -> Path:
        """One folder an endpoint: what is deployed there, its history and logs."""
        return self.root / "endpoints"

    @property
    def services(self) -> Path:
        """Records and logs of the servers that `tuneline up` started."""
        return self.root / "services"

    @property
    def mlflow_database(self) -> Path:
        """The SQLite file that the embedded client and the server share."""
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
            value=first["input"],
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
