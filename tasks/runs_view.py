"""The table of trains on MLflow's page: a saved view with the columns one compares by.

What the page shows at first is built into it (source, models, dataset). A saved view, which the page keeps as a tag
of the experiment, is the only way to offer other columns; it stands in the menu *Views*, and has a link of its own.
"""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

VIEW = "tuneline-trains"
NAME = "Trains"
TAG = f"mlflow.sharedViewState.{VIEW}"
COLUMNS = (
    "tags.`tuneline.base`",
    "tags.`tuneline.dataset`",
    "params.`method`",
    "params.`learning_rate`",
    "params.`epochs`",
    "params.`max_steps`",
    "params.`batch_size`",
    "params.`lora_rank`",
    "metrics.`loss`",
    "metrics.`eval_loss`",
    "metrics.`accuracy_base`",
    "metrics.`accuracy_tuned`",
    "metrics.`rouge_l_tuned`",
)


def view_tag() -> str:
    """The value of the tag: what the page (3.17) writes when somebody saves a view under *Views*."""
    state: dict[str, Any] = {
        "searchFilter": "",
        "orderByKey": "attributes.start_time",
        "orderByAsc": False,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": list(COLUMNS),
        "columnOrder": [],
        "columnWidths": {},
        "runsHiddenMode": "FIRST_10_RUNS",
        "viewMaximized": False,
        "runListHidden": False,
        "isAccordionReordered": False,
        "useGroupedValuesInCharts": True,
        "hideEmptyCharts": True,
        "groupBy": None,
        "groupsExpanded": {},
        "globalLineChartConfig": {"xAxisKey": "step", "lineSmoothness": 0, "selectedXAxisMetricKey": ""},
    }
    packed = base64.b64encode(zlib.compress(json.dumps(state).encode())).decode("ascii")
    # The times say when somebody saved it; fixed, so that the tag is the same wherever it is made.
    return json.dumps({"name": NAME, "createdAt": 0, "updatedAt": 0, "state": f"deflate;{packed}"})
