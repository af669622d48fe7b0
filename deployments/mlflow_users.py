"""MLflow's users: its configuration file, and the one user that Tuneline's credentials name.

Run as: python -m deployments.mlflow_users [FORMER_USER]   (user, password and configuration in the environment, as the
server gets them). MLflow itself sets a password only when it makes the user: a password that was changed afterwards
would be refused, and the old one taken for ever.
"""

from __future__ import annotations

import sys
from pathlib import Path

from configs.settings import Settings
from tasks.files import write_text

FILE = "mlflow-users.ini"


def write_configuration(settings: Settings, database: str) -> Path:
    """Write MLflow's configuration of users, for its owner's eyes only, and return its path.

    Users that somebody adds on MLflow's pages may look, and change only what they were given.
    """
    escaped = database.replace("%", "%%")  # a percent sign begins a reference to another value
    lines = [
        "[mlflow]",
        "default_permission = READ",
        f"database_uri = {escaped}",
        "authorization_function = mlflow.server.auth:authenticate_request_basic_auth",
    ]
    path = settings.services / FILE
    write_text(path, "\n".join([*lines, ""]), private=True)
    return path


def set_user(former: str | None) -> None:
    """Give the user of the environment its password and the right to everything; remove the former user."""
    from mlflow.server.auth.config import read_auth_config
    from mlflow.server.auth.sqlalchemy_store import SqlAlchemyStore

    config = read_auth_config()
    store = SqlAlchemyStore()
    store.init_db(config.database_uri)
    if store.has_user(config.admin_username):
        store.update_user(config.admin_username, password=config.admin_password, is_admin=True)
    else:
        store.create_user(config.admin_username, config.admin_password, is_admin=True)
    if former is not None and former != config.admin_username and store.has_user(former):
        store.delete_user(former)


if __name__ == "__main__":
    set_user(sys.argv[1] if len(sys.argv) > 1 else None)
