"""Train a line again on new rows, and promote the result only if it is better on held-out rows.

Run as: python -m flows.retrain LINE
"""

from __future__ import annotations

from prefect import flow

from configs.endpoints import EndpointName
from configs.records import ModelRecord
from configs.retraining import AfterPromotion, MetricName, RetrainAttempt, RetrainOutcome
from flows.complete import train_to_complete
from flows.customized import train_from_base
from tasks import lifecycle, retraining
from tasks import retrain_lifecycle as steps


@flow(name="retrain", on_failure=[lifecycle.show_cancelled], on_cancellation=[lifecycle.record_cancelled])
def retrain(
    line: str,
    dataset: str | None = None,
    evaluation_dataset: str | None = None,
    metric: MetricName | None = None,
    margin: float | None = None,
    confidence: float | None = None,
    then: AfterPromotion | None = None,
    endpoint: EndpointName | None = None,
    seed: int | None = None,
    force: bool = False,
) -> RetrainOutcome:
    """Retrain a line by its policy (what is given here counts for this run); returns what came of it, and why."""
    given = {"dataset": dataset, "evaluation_dataset": evaluation_dataset, "metric": metric, "margin": margin}
    given |= {"confidence": confidence, "then": then, "endpoint": endpoint, "seed": seed}
    policy = steps.read_policy(line, given)
    with retraining.holding(line) as free:
        if not free:
            return steps.skip(policy, "another retraining of this line is running")
        with steps.recording(line):
            attempt = steps.begin(policy, force)
            if isinstance(attempt, str):
                return steps.skip(policy, attempt)
            attempt = train_challenger(attempt)
            if attempt.model is None:
                attempt = steps.compare(attempt)
            if attempt.comparison is not None and attempt.comparison.promoted:
                return promote(attempt)
            return steps.refuse(attempt)


def train_challenger(attempt: RetrainAttempt) -> RetrainAttempt:
    """The attempt with its challenger: trained from the champion's configuration, or there already."""
    if attempt.challenger is not None:
        return attempt
    record = steps.open_challenger(attempt)
    with lifecycle.closing(record.id):
        full = record.config.hyperparameters.tuning == "full"
        model = train_to_complete(record) if full else train_from_base(record)
    return steps.note_challenger(attempt, record, model)


def promote(attempt: RetrainAttempt) -> RetrainOutcome:
    """Complete and deploy as the policy says; only when all of it has worked is the model the champion."""
    model: ModelRecord = lifecycle.find_model(attempt.model or str(attempt.challenger))
    if attempt.policy.then != "registered" and model.adapter:
        model = lifecycle.save_complete(model)
    attempt = steps.note_model(attempt, model)
    endpoint = retraining.serving(attempt)
    if endpoint is not None:
        served, target, quantization = retraining.served_model(endpoint)
        if served != model.name:
            lifecycle.deploy_model(model, endpoint, target, quantization, None)
    return steps.promote(attempt, model)


def main() -> None:
    """Retrain the line of the command line with no server at all; exit code 0 only if it worked."""
    import sys

    from configs.errors import UserError
    from configs.settings import load_settings
    from deployments.guard import start_embedded_server
    from deployments.services import connect

    connect(load_settings())
    start_embedded_server()
    try:
        print(retrain(line=sys.argv[1]).model_dump_json(indent=2))
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
