"""What can be started from the Prefect page: one declarative description, and making the server match it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict

from configs.base_models import load_base_models
from configs.errors import UserError
from configs.settings import Settings
from deployments import forms
from methods.registry import Method, load_methods

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.responses import DeploymentResponse

WORK_POOL = "tuneline"
TAG = "tuneline"
_PAGE = 200  # the most deployments that Prefect tells at once

# A module, not a file: the flows are found wherever Tuneline is installed, whatever folder a worker runs in.
ENTRYPOINTS = {
    "customized": "flows.customized.customized",
    "complete": "flows.complete.complete",
    "deployed": "flows.deployed.deployed",
    "undeploy": "flows.records.undeploy",
    "add-dataset": "flows.records.add_dataset",
    "add-base-model": "flows.records.register_base_model",
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

    @property
    def title(self) -> str:
        """`FLOW/NAME`, as Prefect calls it."""
        return f"{self.flow}/{self.name}"


class DeploymentChange(BaseModel):
    """What was done to one deployment of the server."""

    deployment: str
    change: Change


def describe_deployments(settings: Settings) -> list[FlowDeployment]:
    """Every deployment that the methods and base models of this installation ask for.

    Raises UserError for a manifest or a list of base models that is wrong.
    """
    base_models = list(load_base_models(settings))
    trains = [
        _train_deployment(method, through, base_models)
        for method in load_methods().values()
        for through in method.lifecycle
        if "training" in method.stages
    ]
    return [*trains, *_plain_deployments()]


def _train_deployment(method: Method, through: forms.Through, base_models: list[str]) -> FlowDeployment:
    return FlowDeployment(
        flow=through,
        name=method.name,
        description=f"{method.description}\n\nFrom a base model and a dataset to {_PATHS[through]}. "
        "To try one thing differently: open a run, and choose *Copy to new run* from its menu.",
        form=forms.train_form(method, through, base_models),
    )


def _plain_deployments() -> list[FlowDeployment]:
    """What starts from a model, an endpoint or a file instead of from a train."""
    plain: list[tuple[str, str, str, type[BaseModel], tuple[str, ...]]] = [
        ("complete", "from-model", f"From a customized model to {_PATHS['complete']}.", forms.CompleteFromModel, ()),
        ("deployed", "from-model", f"From a model to {_ENDPOINT}.", forms.DeployedFromModel, ("model",)),
        ("undeploy", "endpoint", "Stop serving at an endpoint; its address and history are kept.", forms.Undeploy, ()),
        ("add-dataset", "file", "Validate a file and store its rows as an immutable dataset.", forms.AddDataset, ()),
        ("add-base-model", "model", "Register a base model: a folder or a hub id.", forms.AddBaseModel, ()),
    ]
    return [
        FlowDeployment(flow=flow, name=name, description=text, form=forms.plain_form(model, first))
        for flow, name, text, model, first in plain
    ]


def deploy_flows(settings: Settings, prefect_api: str) -> list[DeploymentChange]:
    """Make the Prefect server at `prefect_api` match the description; what matches already is not touched.

    Deployments with the tag `tuneline` that are described no more are removed. Schedules and default parameters
    that somebody has set on the page are kept. Raises UserError if the server does not answer or refuses.
    """
    import httpx
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_API_AUTH_STRING

    wanted = describe_deployments(settings)
    password = PREFECT_API_AUTH_STRING.value()
    try:
        with SyncPrefectClient(prefect_api, auth_string=password.get_secret_value() if password else None) as client:
            _ensure_pool(client)
            found = _deployments_of_ours(client)
            changes = [_match(client, item, found.get(item.title), settings) for item in wanted]
            return [*changes, *_remove(client, found, {item.title for item in wanted})]
    except PrefectHTTPStatusError as error:
        raise _refused(prefect_api, f"{error.response.status_code} {error.response.text[:500]}") from error
    except httpx.TransportError as error:
        raise _refused(prefect_api, str(error)) from error


def _refused(prefect_api: str, why: str) -> UserError:
    return UserError(
        f"the Prefect server did not take the deployments: {why}",
        field="PREFECT_API_URL",
        value=prefect_api,
        mend="see with `tuneline status` whether it runs, then run `tuneline deploy-flows`",
    )


def _ensure_pool(client: SyncPrefectClient) -> None:
    """A deployment needs its work pool, which otherwise its first worker makes, with the template used here."""
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
    from prefect.workers.process import ProcessWorker

    try:
        client.read_work_pool(WORK_POOL)
    except ObjectNotFound:
        template = ProcessWorker.get_default_base_job_template()
        pool = WorkPoolCreate(name=WORK_POOL, type=ProcessWorker.type, base_job_template=template)
        try:
            client.create_work_pool(pool)
        except ObjectAlreadyExists:  # a worker was quicker
            return


def _deployments_of_ours(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    """The deployments of the server that have our tag, by FLOW/NAME."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags

    ours = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found: list[DeploymentResponse] = []
    while True:
        page = client.read_deployments(deployment_filter=ours, limit=_PAGE, offset=len(found))
        found += page
        if len(page) < _PAGE:
            break
    flows = {flow_id: client.read_flow(flow_id).name for flow_id in {item.flow_id for item in found}}
    return {f"{flows[item.flow_id]}/{item.name}": item for item in found}


def _match(
    client: SyncPrefectClient, wanted: FlowDeployment, found: DeploymentResponse | None, settings: Settings
) -> DeploymentChange:
    fields = _fields(wanted, settings)
    if found is None:
        client.create_deployment(client.create_flow_from_name(wanted.flow), wanted.name, **fields)
        return DeploymentChange(deployment=wanted.title, change="created")
    differing = {name: value for name, value in fields.items() if getattr(found, name) != value}
    if not differing:
        return DeploymentChange(deployment=wanted.title, change="unchanged")
    from prefect.client.schemas.actions import DeploymentUpdate

    # Never created again, which would delete the schedules that somebody has given it.
    client.update_deployment(found.id, DeploymentUpdate(**differing))
    return DeploymentChange(deployment=wanted.title, change="updated")


def _fields(wanted: FlowDeployment, settings: Settings) -> dict[str, Any]:
    return {
        "description": wanted.description,
        "entrypoint": ENTRYPOINTS[wanted.flow],
        "parameter_openapi_schema": wanted.form,
        "enforce_parameter_schema": True,
        "work_pool_name": WORK_POOL,
        "job_variables": {"env": {"TUNELINE_HOME": str(settings.root)}},
        "tags": [TAG],
    }


def _remove(
    client: SyncPrefectClient, found: dict[str, DeploymentResponse], wanted: set[str]
) -> list[DeploymentChange]:
    gone = [title for title in found if title not in wanted]
    for title in gone:
        client.delete_deployment(found[title].id)
    return [DeploymentChange(deployment=title, change="removed") for title in gone]
