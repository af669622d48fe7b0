"""What can be started from the Prefect page: one declarative description, and making the server match it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from configs.base_models import load_base_models
from configs.errors import UserError
from configs.profiles import list_profiles
from configs.settings import Settings
from deployments import alerts, automations, forms, retraining
from deployments.work_pools import WORK_POOL, ensure_pool
from methods.registry import Method, load_methods

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

TAG = "tuneline"
_MAY_TRAIN = ("customized", "complete", "deployed", "resume")
_AFTER_CRASH = "resume/after-crash"
_PAGE = 200  # the most deployments that Prefect tells at once

# A module, not a file: the flows are found wherever Tuneline is installed, whatever folder a worker runs in.
ENTRYPOINTS = {
    "customized": "flows.customized.customized",
    "complete": "flows.complete.complete",
    "deployed": "flows.deployed.deployed",
    "undeploy": "flows.records.undeploy",
    "add-dataset": "flows.records.add_dataset",
    "add-base-model": "flows.records.register_base_model",
    "add-method": "flows.records.add_method",
    "new-method": "flows.records.new_method",
    "check-method": "flows.records.check_method",
    "delete-method": "flows.records.delete_method",
    "resume": "flows.resume.resume",
    "sweep": "flows.sweep.sweep",
    retraining.FLOW: "flows.retrain.retrain",
}
_PATHS = {
    "customized": "an adapter on top of the base model (a customized model)",
    "complete": "self-contained weights (a complete model), merged and verified",
    "deployed": "an OpenAI-compatible endpoint that serves the complete model",
}
_ENDPOINT = "an OpenAI-compatible endpoint that serves it; what was served before stays until this one is proved"

Change = Literal["created", "updated", "unchanged", "removed"]


class FlowDeployment(BaseModel):
    """One deployment as it is to be on the server: its flow, its form, its words."""

    model_config = ConfigDict(extra="forbid")

    flow: str
    name: str
    description: str
    form: dict[str, Any]
    pool: str = WORK_POOL
    on_creation: dict[str, Any] = {}  # what is left to the page afterwards: schedules, default parameters, limits

    @property
    def title(self) -> str:
        """`FLOW/NAME`, as Prefect calls it."""
        return f"{self.flow}/{self.name}"


class DeploymentChange(BaseModel):
    """What was done to one deployment of the server."""

    deployment: str
    change: Change


def describe_deployments(settings: Settings, pool: str = WORK_POOL) -> list[FlowDeployment]:
    """Every deployment that the methods and base models of this installation ask for, on one work pool.

    Names are unique on a server: on another pool than the first one they end in `@POOL`. Raises UserError for a
    manifest or a list of base models that is wrong.
    """
    base_models, profiles = list(load_base_models(settings)), list(list_profiles(settings))
    trains = [
        _train_deployment(method, through, base_models, profiles)
        for method in load_methods(settings).values()
        for through in method.lifecycle
        if "training" in method.stages
    ]
    described = [*trains, *_plain_deployments(), *_retrain_deployments(settings, pool)]
    if pool == WORK_POOL:
        return described
    return [item.model_copy(update={"name": f"{item.name}@{pool}", "pool": pool}) for item in described]


def _train_deployment(
    method: Method, through: forms.Through, base_models: list[str], profiles: list[str]
) -> FlowDeployment:
    return FlowDeployment(
        flow=through,
        name=method.name,
        description=f"{method.description}\n\nFrom a base model and a dataset to {_PATHS[through]}. "
        "To try one thing differently: open a run, and choose *Copy to new run* from its menu.",
        form=forms.train_form(method, through, base_models, profiles),
    )


def _plain_deployments() -> list[FlowDeployment]:
    """What starts from a model, an endpoint or a file instead of from a train."""
    plain: list[tuple[str, str, str, type[BaseModel], tuple[str, ...]]] = [
        ("complete", "from-model", f"From a customized model to {_PATHS['complete']}.", forms.CompleteFromModel, ()),
        ("deployed", "from-model", f"From a model to {_ENDPOINT}.", forms.DeployedFromModel, ("model",)),
        (
            "resume",
            "train",
            "Go on with a cancelled, failed or crashed train from its newest checkpoint, as far as it was to go.",
            forms.Resume,
            (),
        ),
        (
            "resume",
            "after-crash",
            "For the automation that hears of a crashed run: goes on with its train if the train's parameter "
            "resume_after_crash allows it, and records why or why not.",
            forms.ResumeAfterCrash,
            (),
        ),
        (
            "sweep",
            "train",
            "Several trains of one file that differ in some parameters, some at a time. They are compared, and the "
            "model of the best one is the challenger of its line. Run again, it takes up what is not completed.",
            forms.Sweep,
            (),
        ),
        ("undeploy", "endpoint", "Stop serving at an endpoint; its address and history are kept.", forms.Undeploy, ()),
        ("add-dataset", "file", "Validate a file and store its rows as an immutable dataset.", forms.AddDataset, ()),
        ("add-base-model", "model", "Register a base model: a folder or a hub id.", forms.AddBaseModel, ()),
        ("add-method", "folder", "Add a training method: a folder with a method.yaml.", forms.AddMethod, ()),
        (
            "new-method",
            "template",
            "Begin a training method with a copy of another one: a folder to change and then to add.",
            forms.NewMethod,
            (),
        ),
        (
            "check-method",
            "name",
            "Run every stage of a method on a tiny model, then cancel, resume and fail; takes some minutes.",
            forms.CheckMethod,
            (),
        ),
        (
            "delete-method",
            "name",
            "Delete a training method that was added, with its deployments; past trains and models stay.",
            forms.DeleteMethod,
            (),
        ),
    ]
    return [
        FlowDeployment(flow=flow, name=name, description=text, form=forms.plain_form(model, first))
        for flow, name, text, model, first in plain
    ]


def _retrain_deployments(settings: Settings, pool: str) -> list[FlowDeployment]:
    return [
        FlowDeployment(
            flow=retraining.FLOW,
            name=line.policy.line,
            description=f"Trains {line.policy.line} again, {line.schedule.told()}, and promotes the result only if it "
            "is better on held-out rows. What is changed in the form counts for that run alone.",
            form=retraining.retrain_form(line.policy),
            on_creation=retraining.on_creation(line),
        )
        for line in retraining.scheduled_lines(settings)
        if line.schedule.pool == pool
    ]


def deploy_flows(settings: Settings, prefect_api: str, pool: str = WORK_POOL) -> list[DeploymentChange]:
    """Make the work pool of the Prefect server at `prefect_api` match the description; what matches is not touched.

    Deployments of this pool with the tag `tuneline` that are described no more are removed; those of other pools,
    which other hosts describe, are left alone. Schedules, default parameters and job variables that somebody has set
    on the page are kept. Raises UserError if the server does not answer or refuses.
    """
    wanted = describe_deployments(settings, pool)
    with _asking(prefect_api) as client:
        ensure_pool(client, pool)
        found = _deployments_of_ours(client, pool, {item.title for item in wanted})
        changes = [_match(client, item, found.get(item.title), settings) for item in wanted]
        removed = _remove(client, found, {item.title for item in wanted})
        return [*changes, *removed, *_match_automations(client, wanted, pool, settings)]


def change_schedule(prefect_api: str, line: retraining.RetrainedLine) -> None:
    """Give the deployment of a retrained line the schedule it has now. Raises UserError as `deploy_flows`."""
    with _asking(prefect_api) as client:
        retraining.replace_schedule(client, line)


@contextmanager
def _asking(prefect_api: str) -> Iterator[SyncPrefectClient]:
    """A client of the server; what the server refuses, or that it does not answer, is told as UserError."""
    import httpx
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.exceptions import PrefectHTTPStatusError

    # Not by Prefect's settings, which are read once at import: `up` may have got to know the password since.
    try:
        with SyncPrefectClient(prefect_api, auth_string=os.environ.get("PREFECT_API_AUTH_STRING")) as client:
            yield client
    except PrefectHTTPStatusError as error:
        raise _refused(prefect_api, f"{error.response.status_code} {error.response.text[:500]}") from error
    except httpx.TransportError as error:
        raise _refused(prefect_api, str(error)) from error


def _match_automations(
    client: SyncPrefectClient, deployed: list[FlowDeployment], pool: str, settings: Settings
) -> list[DeploymentChange]:
    (title,) = (item.title for item in deployed if item.title.partition("@")[0] == _AFTER_CRASH)
    resume = client.read_deployment_by_name(title)
    lines = [line for line in retraining.scheduled_lines(settings) if line.schedule.pool == pool]
    wanted = [
        *automations.describe_automations(TAG, pool, resume.id),
        *retraining.describe_automations((line, client.read_deployment_by_name(line.title).id) for line in lines),
    ]
    changes = automations.match_automations(client, pool, wanted) | alerts.match_automations(client)
    return [DeploymentChange(deployment=f"automation {name}", change=change) for name, change in changes.items()]


def _refused(prefect_api: str, why: str) -> UserError:
    return UserError(
        f"the Prefect server did not take the deployments: {why}",
        field="PREFECT_API_URL",
        value=prefect_api,
        mend="see with `tuneline status` whether it runs, then run `tuneline deploy-flows`",
    )


def _deployments_of_ours(client: SyncPrefectClient, pool: str, wanted: set[str]) -> dict[str, DeploymentResponse]:
    """The deployments of the pool that have our tag, by FLOW/NAME.

    With them those of a wanted name that somebody has moved to another pool, and, in the first pool, those whose pool
    is gone.
    """
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found: list[DeploymentResponse] = []
    while True:
        page = client.read_deployments(deployment_filter=ours, limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            break
    flows = {flow_id: client.read_flow(flow_id).name for flow_id in {item.flow_id for item in found}}
    titled = {f"{flows[item.flow_id]}/{item.name}": item for item in found}
    pools = (pool, None) if pool == WORK_POOL else (pool,)
    return {title: item for title, item in titled.items() if item.work_pool_name in pools or title in wanted}


def _match(
    client: SyncPrefectClient, wanted: FlowDeployment, found: DeploymentResponse | None, settings: Settings
) -> DeploymentChange:
    fields = _fields(wanted, settings, found.job_variables if found is not None else {})
    if found is None:
        client.create_deployment(client.create_flow_from_name(wanted.flow), wanted.name, **fields, **wanted.on_creation)
        return DeploymentChange(deployment=wanted.title, change="created")
    differing = {name: value for name, value in fields.items() if getattr(found, name) != value}
    if not differing:
        return DeploymentChange(deployment=wanted.title, change="unchanged")
    from prefect.client.schemas.actions import DeploymentUpdate

    # Never created again, which would delete the schedules that somebody has given it.
    client.update_deployment(found.id, DeploymentUpdate(**differing))
    return DeploymentChange(deployment=wanted.title, change="updated")


def _fields(wanted: FlowDeployment, settings: Settings, job_variables: dict[str, Any]) -> dict[str, Any]:
    if wanted.pool == WORK_POOL:
        # Hosts of other pools have homes of their own, which their workers' environments name.
        home = {"TUNELINE_HOME": str(settings.root)}
        job_variables = {**job_variables, "env": {**job_variables.get("env", {}), **home}}
    return {
        "description": wanted.description,
        "entrypoint": ENTRYPOINTS[wanted.flow],
        "parameter_openapi_schema": wanted.form,
        "enforce_parameter_schema": True,
        "work_pool_name": wanted.pool,
        "job_variables": job_variables,
        "tags": [TAG, automations.train_tag(wanted.pool)] if wanted.flow in _MAY_TRAIN else [TAG],
    }


def _remove(
    client: SyncPrefectClient, found: dict[str, DeploymentResponse], wanted: set[str]
) -> list[DeploymentChange]:
    gone = [title for title in found if title not in wanted]
    for title in gone:
        client.delete_deployment(found[title].id)
    return [DeploymentChange(deployment=title, change="removed") for title in gone]
