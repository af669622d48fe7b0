"""Flows run in this process against a Prefect server that lives as long as the tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.postgres import own_databases


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    from prefect.testing.utilities import prefect_test_harness

    own = own_databases()
    with server_on(own["TUNELINE_PREFECT_DATABASE"]) if own else prefect_test_harness(server_startup_timeout=120):
        yield


@contextmanager
def server_on(database: str) -> Iterator[None]:
    """A Prefect server on this PostgreSQL database; the harness of Prefect's own takes SQLite alone."""
    from prefect.context import _temporary_global_settings_context, get_settings_context
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, PREFECT_SERVER_DATABASE_CONNECTION_URL, temporary_settings

    address = database.replace("postgresql://", "postgresql+asyncpg://")
    with temporary_settings({PREFECT_SERVER_DATABASE_CONNECTION_URL: address}):
        server = SubprocessASGIServer()
        server.start(timeout=120)
        try:
            with (
                temporary_settings({PREFECT_API_URL: server.api_url}),
                _temporary_global_settings_context(get_settings_context()),
            ):
                yield
        finally:
            server.stop()
