"""The records of started services: one file each in `settings.services`, `prefect.json`, `worker-POOL.json`."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pydantic import ValidationError

from configs.errors import UserError
from configs.services import ServiceName, ServiceRecord
from configs.settings import Settings
from deployments.processes import is_alive
from tasks.files import write_record as write_file


def record_path(settings: Settings, name: ServiceName, pool: str | None = None) -> Path:
    """The file of a service's record; `pool` names that of a worker."""
    return settings.services / f"{name if pool is None else f'{name}-{pool}'}.json"


def read_record(settings: Settings, name: ServiceName, pool: str | None = None) -> ServiceRecord | None:
    """The record of a service, whether it still runs or not. Raises UserError naming a damaged file."""
    path = record_path(settings, name, pool)
    try:
        return ServiceRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise UserError(
            f"this record of a started server cannot be read: {error.errors()[0]['msg']}",
            file=path,
            mend="end the server by hand if it runs, then delete this file",
        ) from error


def write_record(settings: Settings, record: ServiceRecord) -> None:
    """Keep the record, for its owner's eyes only."""
    write_file(record_path(settings, record.name, record.pool), record, private=True)


def forget_record(settings: Settings, record: ServiceRecord) -> None:
    """Remove the record of a service that has ended."""
    record_path(settings, record.name, record.pool).unlink(missing_ok=True)


def recorded_pools(settings: Settings) -> list[str]:
    """The work pools that this host has a worker's record for."""
    return sorted(path.stem.removeprefix("worker-") for path in settings.services.glob("worker-*.json"))


def all_records(settings: Settings) -> list[ServiceRecord]:
    """Every record: the servers' and then the workers', whether they still run or not."""
    workers = [read_record(settings, "worker", pool) for pool in recorded_pools(settings)]
    found = [read_record(settings, "prefect"), read_record(settings, "mlflow"), *workers]
    return [record for record in found if record is not None]


def running(settings: Settings, name: ServiceName, pool: str | None = None) -> ServiceRecord | None:
    """The record of a service that runs and was seen healthy (a supervised one is taken to be)."""
    record = read_record(settings, name, pool)
    usable = record is not None and (record.ready or record.supervised) and is_alive(record)
    return record if usable else None


@contextmanager
def locked(settings: Settings) -> Iterator[None]:
    """Let one `up` or `down` work at a time; the system frees the lock even if its holder is killed."""
    settings.services.mkdir(parents=True, exist_ok=True)
    with (settings.services / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
