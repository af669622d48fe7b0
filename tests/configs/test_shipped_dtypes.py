"""No shipped file fixes a number type for speed: what is fast depends on the machine, and `auto` asks it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from configs.aliases import VALUE_SPELLINGS, canonical_name, canonical_value, spelling_table
from configs.settings import PROJECT_ROOT

FOR_CORRECTNESS = {"configs/examples/full.yaml": "float32"}
"""Full-parameter training: small steps on all weights are lost in bfloat16."""

SHIPPED = sorted([*(PROJECT_ROOT / "configs").rglob("*.yaml"), *(PROJECT_ROOT / "methods").rglob("*.yaml")])
_FIXED = [name for name in VALUE_SPELLINGS["dtype"] if name != "auto"]
_KNOWN = spelling_table(["dtype"])


def fixed_dtypes(content: Any) -> Iterator[str]:
    """Every number type that is the value of a parameter named `dtype`, at any depth."""
    if isinstance(content, dict):
        for name, value in content.items():
            if canonical_name(str(name), _KNOWN) and canonical_value("dtype", value) in _FIXED:
                yield value
            yield from fixed_dtypes(value)
    elif isinstance(content, list):
        for each in content:
            yield from fixed_dtypes(each)


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: str(file.relative_to(PROJECT_ROOT)))
def test_a_shipped_file_fixes_no_number_type_for_speed(file: Path) -> None:
    found = list(fixed_dtypes(yaml.safe_load(file.read_text(encoding="utf-8"))))
    allowed = FOR_CORRECTNESS.get(str(file.relative_to(PROJECT_ROOT)))
    assert found == ([allowed] if allowed else [])


def test_the_documentation_advises_no_number_type_for_speed() -> None:
    pages = [*PROJECT_ROOT.glob("README*.md"), *(PROJECT_ROOT / "docs").glob("*.md")]
    advised = [page.name for page in pages for name in _FIXED if f"dtype={name}" in page.read_text(encoding="utf-8")]
    assert advised == []


@pytest.mark.parametrize("text", ["{hyperparameters: {dtype: bfloat16}}", "{a: [{DTYPE: bf16}]}"])
def test_a_fixed_number_type_is_found(text: str) -> None:
    assert len(list(fixed_dtypes(yaml.safe_load(text)))) == 1
