"""The databases behind both servers: SQLite files in the home folder, or PostgreSQL by its address.

The addresses may hold passwords: they travel in environments and private files, never in a command line.
"""

from __future__ import annotations

import os
from urllib.parse import urlsplit

from pydantic import SecretStr

from configs.errors import UserError
from configs.settings import Settings
from deployments.ports import is_shared
from deployments.service_records import running

PROXIED_ARTIFACTS = "mlflow-artifacts:/"
EXPERIMENT = "tuneline"


def prefect_database_uri(settings: Settings) -> str | None:
    """What PREFECT_API_DATABASE_CONNECTION_URL is to be; None for Prefect's own SQLite file in `prefect_home`.

    Raises UserError for anything but PostgreSQL.
    """
    return _postgres(settings.prefect_database, "TUNELINE_PREFECT_DATABASE", "postgresql+asyncpg")


def mlflow_database_uri(settings: Settings) -> str:
    """The tracking address of the embedded MLflow client, and the backend store of the server.

    Raises UserError for anything but PostgreSQL.
    """
    found = _postgres(settings.mlflow_database, "TUNELINE_MLFLOW_DATABASE", "postgresql+psycopg2")
    return found or f"sqlite:///{settings.mlflow_sqlite}"


def mlflow_users_uri(settings: Settings) -> str:
    """Where MLflow keeps its users: in the same PostgreSQL database, in tables of their own, or a SQLite file."""
    if settings.mlflow_database is not None:
        return mlflow_database_uri(settings)
    return f"sqlite:///{settings.mlflow_sqlite.with_name('users.db')}"


def _postgres(given: SecretStr | None, variable: str, driver: str) -> str | None:
    address = given.get_secret_value() if given is not None else ""
    if not address:
        return None
    scheme, separator, rest = address.partition("://")
    if not separator or scheme.partition("+")[0] not in ("postgresql", "postgres") or not urlsplit(f"x://{rest}").path:
        raise UserError(
            f"this is no address of a PostgreSQL database: {scheme if separator else 'no scheme'}://…",
            field=variable,
            expected="postgresql://USER:PASSWORD@HOST:PORT/NAME, with % & / ? # @ : in the password as %XX",
            mend=f"unset {variable} for a SQLite file in the home folder",
        )
    return f"{driver}://{rest}"


def mlflow_artifact_location(settings: Settings) -> str | None:
    """The `artifact_location` that every experiment must be created with, embedded or not.

    A file address on a server for this host alone, not `mlflow-artifacts:`, which a client on the database cannot
    resolve: with it, a run logged with the servers up could not be read after `tuneline down`. A server that other
    hosts share sends files through itself instead, because they have another disk. None, the server's own choice, if
    the tracking server is not one of this home.
    """
    if is_shared(settings):
        return PROXIED_ARTIFACTS
    tracking = os.environ.get("MLFLOW_TRACKING_URI", "")
    own = running(settings, "mlflow")
    if tracking.startswith(("http://", "https://")) and (own is None or own.address != tracking):
        return None
    return settings.mlflow_artifacts.as_uri()


def share_artifacts(settings: Settings) -> None:
    """Let runs from now on be kept through the server, where the experiment was begun on this host's disk alone.

    Runs that were kept so far stay where they are; the server reads them there. MLflow has no interface for it.
    """
    if not is_shared(settings) or (settings.mlflow_database is None and not settings.mlflow_sqlite.is_file()):
        return
    import sqlalchemy

    engine = sqlalchemy.create_engine(mlflow_database_uri(settings))
    try:
        if not sqlalchemy.inspect(engine).has_table("experiments"):
            return
        move = sqlalchemy.text(
            "UPDATE experiments SET artifact_location = :shared WHERE name = :name AND artifact_location LIKE 'file:%'"
        )
        with engine.begin() as connection:
            connection.execute(move, {"shared": PROXIED_ARTIFACTS, "name": EXPERIMENT})
    except sqlalchemy.exc.SQLAlchemyError:
        return  # a damaged or unreachable database: the server, started next, tells it better
    finally:
        engine.dispose()
