"""Every method on a tiny model of every family: trained, saved and asked, with nothing dropped that it can render."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.families import table
from tests.families.cells import BY_TITLE, CASES, run_cell
from tests.families.conftest import CELL_PROPERTY, writes_documents
from tests.families.family_models import BY_NAME, FAMILIES


@pytest.mark.families
@pytest.mark.usefixtures("stages")
@pytest.mark.parametrize("case", [case.title for case in CASES])
@pytest.mark.parametrize("family", [family.name for family in FAMILIES])
def test_the_cell_is_what_the_documents_say(family: str, case: str, tmp_path: Path, record_property: Any) -> None:
    cell = run_cell(BY_NAME[family], BY_TITLE[case], tmp_path)
    record_property(CELL_PROPERTY, cell.as_dict())
    assert cell.state != "failed", cell.reason
    if cell.state == "ok":
        assert cell.kept == cell.read > 0
    if not writes_documents():
        for document in table.DOCUMENTS:
            assert table.written(document).shown(family, case) == table.shown(cell)


@pytest.mark.parametrize("document", table.DOCUMENTS, ids=lambda document: document.name)
def test_the_documents_show_every_family_and_method(document: Path) -> None:
    found = table.written(document)
    assert set(found.cells) == {(family.name, case.title) for family in FAMILIES for case in CASES}
    for family in FAMILIES:
        for case in CASES:
            text, _ = found.shown(family.name, case.title)
            assert (text == "–") is not case.applies_to(family)
            assert text.split()[0] in ("ok", "refused", "–")
