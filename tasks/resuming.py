"""Decides whether a train that crashed is taken up again by itself, and records why."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from configs.errors import UserError
from configs.records import TrainRecord
from tasks import tracking, trains


class CrashDecision(BaseModel):
    """What becomes of the train of a crashed flow run. `train` is None if this host has none."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train: str | None
    resume: bool
    alive: bool = False
    reason: str


def decide_after_crash(flow_run_id: str) -> CrashDecision:
    """Whether the train of a flow run that Prefect calls crashed is to be taken up again.

    To be called when the trains are settled. If so, this process owns it now, and one of its `resume_after_crash`
    times is used. A train whose process is alive, or that somebody has taken up or cancelled meanwhile, is left alone.
    """
    record = trains.train_of_flow_run(flow_run_id)
    if record is None:
        return CrashDecision(
            train=None, resume=False, reason=f"not resumed: no train of this host belongs to flow run {flow_run_id}"
        )
    if record.flow_run_id != flow_run_id:
        reason = f"not resumed: flow run {record.flow_run_id} has taken it up since"
        return CrashDecision(train=record.id, resume=False, reason=reason)
    try:
        # Before anything is looked at: two of these may run side by side, and only one of them may take it up.
        trains.own_train(record.id)
    except UserError:
        reason = "not resumed: its process is alive"
        return CrashDecision(train=record.id, resume=False, alive=True, reason=reason)
    decision = _decide(trains.load_train(record.id), flow_run_id)
    if not decision.resume:
        trains.let_go(record.id)
    return decision


def _decide(record: TrainRecord, flow_run_id: str) -> CrashDecision:
    allowed, used = record.config.resume_after_crash, record.crash_resumes
    resume = False
    if record.flow_run_id != flow_run_id:
        reason = f"not resumed: flow run {record.flow_run_id} has taken it up since"
    elif record.status != "interrupted":
        reason = f"not resumed: the train is {record.status}{f' ({record.reason})' if record.reason else ''}"
    elif used >= allowed:
        reason = f"not resumed: resume_after_crash is {allowed}{', and as often it was' if allowed else ''}"
    else:
        resume, used = True, used + 1
        reason = f"resumed ({used} of {allowed})"
    trains.update_train(record.id, crash_resumes=used, after_crash=reason)
    tracking.mlflow_client().set_tag(record.run_id, "tuneline.after_crash", reason)
    return CrashDecision(train=record.id, resume=resume, reason=reason)
