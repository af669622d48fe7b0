"""What the demo promises before it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.resolve import resolve_train
from flows import demo
from tasks.hardware import Hardware
from tests.flows.command_line import printed, tuneline

QUIET = {"gflops": 130.0, "cpu_share": 1.0}
"""Two quiet AVX2 cores in float32."""


def hardware(auto: str, **speed: float) -> Hardware:
    return Hardware(device="cpu", described="some CPU", auto=auto, auto_inference=auto, warnings={}, **speed)


def test_the_demo_takes_under_ten_minutes_on_two_quiet_cores() -> None:
    assert demo.forecast_seconds(**QUIET) < 600


def test_the_forecast_grows_with_what_others_take() -> None:
    quiet = demo.forecast_seconds(**QUIET)
    assert demo.forecast_seconds(gflops=65.0, cpu_share=0.5) == pytest.approx(2 * quiet)


def test_the_forecast_is_of_the_demo_as_it_is() -> None:
    """Its figures were measured with these; who changes one measures again."""
    config = resolve_train(demo.DEMO_FILE).config
    p = config.hyperparameters
    assert (p.max_samples, p.epochs, p.batch_size, p.dtype) == (400, 1.0, 4, "auto")
    assert (config.evaluation_samples, config.max_new_tokens) == (48, 64)


@pytest.mark.parametrize(
    ("found", "said", "not_said"),
    [
        (hardware("float32", **QUIET), ["about 8 min", "float32 on it", "a GPU", "AVX512-BF16"], ["a quiet machine"]),
        (hardware("bfloat16", gflops=65.0, cpu_share=0.5), ["a quiet machine", "50%"], ["AVX512-BF16"]),
        (None, [], ["min here"]),
    ],
)
def test_the_demo_says_how_long_it_takes_and_what_makes_it_faster(
    found: Hardware | None,
    said: list[str],
    not_said: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("tasks.hardware.ask_hardware", lambda python, speed: found)
    demo._forecast()
    out = capsys.readouterr().out
    assert [text for text in said if text not in out] == []
    assert [text for text in not_said if text in out] == []


@pytest.mark.parametrize(("dtype", "warned"), [("bfloat16", True), ("auto", False)])
def test_a_dry_run_warns_of_a_number_type_that_this_host_emulates(tmp_path: Path, dtype: str, warned: bool) -> None:
    made = tuneline(
        *("train", demo.DEMO_FILE, "--set", f"dtype={dtype}", "--dry-run"),
        home=tmp_path / "home",
        cwd=tmp_path,
        extra={"TUNELINE_NATIVE_BFLOAT16": "no"},
    )
    assert ("dtype bfloat16 is emulated on" in printed(made)) == warned
