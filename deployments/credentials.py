"""User and password of the servers: who needs them, where they are kept, which variables carry them.

One pair serves both servers. It comes from TUNELINE_USER and TUNELINE_PASSWORD; `up` keeps it in
`settings.services/credentials.json`, which only its owner may read, for later calls of `tuneline`. It never stands in a
command line, a record or a log: it travels in the environment of the processes that need it.
"""

from __future__ import annotations

import base64
import secrets
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_serializer

from configs.errors import UserError
from configs.settings import Settings
from deployments.ports import is_open_to_the_network
from tasks.files import read_record, write_record

LEAST_CHARACTERS = 12  # what MLflow asks for as well
FILE = "credentials.json"
# What clients read. Stages get none of them, by their prefixes (tasks/stages.py).
CLIENT_VARIABLES = ("PREFECT_API_AUTH_STRING", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD")
# What Tuneline itself reads; the servers and workers it starts are given what they need under other names.
OWN_VARIABLES = (
    "TUNELINE_USER",
    "TUNELINE_PASSWORD",
    "TUNELINE_PREFECT_DATABASE",
    "TUNELINE_MLFLOW_DATABASE",
    "PREFECT_API_DATABASE_CONNECTION_URL",
)


class Credentials(BaseModel):
    """One user of both servers. Shown nowhere: printing it shows asterisks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    user: str
    password: SecretStr
    mlflow_key: SecretStr = Field(description="Signs the forms of MLflow's pages; drawn once.")

    @field_serializer("password", "mlflow_key", when_used="json")
    def _open(self, secret: SecretStr) -> str:
        return secret.get_secret_value()

    def same_as(self, other: Credentials) -> bool:
        """Whether user and password are the same."""
        return (self.user, self.password) == (other.user, other.password)


def find_credentials(settings: Settings) -> Credentials | None:
    """The credentials of the environment, else those that `up` has kept; None if there are none.

    Raises UserError for half a pair, a password that is too short, or a user that no server takes.
    """
    kept = kept_credentials(settings)
    password = settings.password.get_secret_value() if settings.password is not None else ""
    if not settings.user and not password:
        return kept
    if not settings.user or not password:
        missing = "TUNELINE_PASSWORD" if settings.user else "TUNELINE_USER"
        raise UserError("user and password are needed together", field=missing, mend=_how_to_make_one())
    if len(password) < LEAST_CHARACTERS:
        raise UserError(
            f"the password is too short: {len(password)} characters",
            field="TUNELINE_PASSWORD",
            expected=f"at least {LEAST_CHARACTERS}",
            mend=_how_to_make_one(),
        )
    if not _is_plain(password):
        raise UserError(
            "clients of the two servers write such a password differently",
            field="TUNELINE_PASSWORD",
            expected="printable ASCII characters",
            mend=_how_to_make_one(),
        )
    if ":" in settings.user or not _is_plain(settings.user):
        raise UserError(
            "this is no user's name",
            field="TUNELINE_USER",
            value=settings.user,
            expected="printable ASCII characters without a colon",
        )
    key = kept.mlflow_key if kept is not None else SecretStr(secrets.token_urlsafe(32))
    return Credentials(user=settings.user, password=SecretStr(password), mlflow_key=key)


def kept_credentials(settings: Settings) -> Credentials | None:
    """What the last `up` has kept."""
    path = credentials_file(settings)
    return read_record(path, Credentials) if path.is_file() else None


def keep_credentials(settings: Settings, credentials: Credentials) -> None:
    """Write them down for later calls, for the owner's eyes only."""
    if credentials != kept_credentials(settings):
        write_record(credentials_file(settings), credentials, private=True)


def credentials_file(settings: Settings) -> Path:
    """Where `up` keeps them."""
    return settings.services / FILE


def require_credentials(settings: Settings) -> Credentials | None:
    """The credentials that the servers are to ask for; None only on loopback. Raises UserError if they are missing."""
    found = find_credentials(settings)
    if found is None and is_open_to_the_network(settings):
        raise UserError(
            "the servers would be open to the network without a password",
            field="TUNELINE_HOST",
            value=settings.host,
            expected="TUNELINE_USER and TUNELINE_PASSWORD with it, or a loopback address such as 127.0.0.1",
            mend=f"{_how_to_make_one()}\n  or keep the servers on loopback and reach the pages through an SSH tunnel: "
            f"ssh -L {settings.prefect_port}:127.0.0.1:{settings.prefect_port} "
            f"-L {settings.mlflow_port}:127.0.0.1:{settings.mlflow_port} THIS_HOST",
        )
    return found


def client_environment(credentials: Credentials | None) -> dict[str, str]:
    """What a client of the servers needs in its environment."""
    if credentials is None:
        return {}
    password = credentials.password.get_secret_value()
    return dict(zip(CLIENT_VARIABLES, (f"{credentials.user}:{password}", credentials.user, password), strict=True))


def authorization(credentials: Credentials | None) -> dict[str, str]:
    """The header of a request to either server."""
    if credentials is None:
        return {}
    pair = f"{credentials.user}:{credentials.password.get_secret_value()}"
    return {"Authorization": f"Basic {base64.b64encode(pair.encode()).decode()}"}


def _is_plain(text: str) -> bool:
    return text.isascii() and text.isprintable()


def _how_to_make_one() -> str:
    draw = "python3 -c 'import secrets; print(secrets.token_urlsafe(18))'"
    return f'export TUNELINE_USER=admin TUNELINE_PASSWORD="$({draw})"'
