"""The real `tuneline` program on a tiny chat model: every command does its work and prints what one needs of it."""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from configs.settings import PROJECT_ROOT
from flows.cli import app
from tests.flows.command_line import PROGRAM, printed, program_environment, read_json, tuneline
from tests.tiny_models import make_tiny_chat_model

HEAVY = ("prefect", "mlflow", "torch", "transformers", "trl", "jieba", "pandas", "numpy", "datasets", "matplotlib")


@dataclass
class Place:
    """A working folder with an installation of its own."""

    root: Path

    @property
    def home(self) -> Path:
        return self.root / "home"

    def run(self, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return tuneline(*arguments, home=self.home, cwd=self.root, **options)

    def text(self, *arguments: str | Path) -> str:
        return printed(self.run(*arguments))

    def json(self, *arguments: str | Path) -> Any:
        return read_json(self.run(*arguments, "--json"))


def write_rows(path: Path, count: int) -> None:
    rooms = ("kitchen", "hall", "attic")
    rows = [{"prompt": f"the light {i} in the {rooms[i % 3]}", "completion": f"on {i % 5}"} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    root = tmp_path_factory.mktemp("cli")
    write_rows(root / "rows.jsonl", 40)
    write_rows(root / "test.jsonl", 3)
    make_tiny_chat_model(root / "tiny", seed=1)
    hyper = {"max_steps": 4, "batch_size": 4, "max_seq_length": 128, "learning_rate": 0.01}
    content = {
        "name": "lights",
        "base_model": "tiny",
        "dataset": "rows.jsonl",
        "evaluation_dataset": "test.jsonl",
        "max_new_tokens": 8,
        "hyperparameters": hyper,
    }
    (root / "lights.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    found = Place(root)
    yield found
    for endpoint in json.loads(found.run("deployments", "--json").stdout):
        found.run("undeploy", endpoint["name"])
    found.run("down")


@pytest.fixture(scope="module")
def trained(place: Place) -> str:
    """The printed lines of a train that has ended."""
    return place.text("train", "lights.yaml", "--preset", "basic-lora", "--set", "loraRank=4", "--set", "seed=7")


@pytest.fixture(scope="module")
def train_id(place: Place, trained: str) -> str:
    return str(place.json("trains", "list")[0]["id"])


@pytest.fixture(scope="module")
def complete_name(place: Place, train_id: str) -> str:
    """The complete model, made by `save`, which proves it equal to what was trained."""
    text = place.text("save", "lights")
    name = str(place.json("models", "show", train_id)["name"])
    assert "complete model" in text
    assert name in text
    return name


# --- help ---------------------------------------------------------------------------------------------------


def test_help_of_every_command_imports_nothing_heavy(tmp_path: Path) -> None:
    code = """
import json, sys
from typer.main import get_command
from flows.cli import app
root = get_command(app)
commands = [[]]
for name, command in root.commands.items():
    commands += [[name], *([name, sub] for sub in getattr(command, "commands", {}))]
for arguments in commands:
    try:
        app([*arguments, "--help"])
    except SystemExit as end:
        assert end.code == 0, arguments
print("COMMANDS", len(commands), "HEAVY", [name for name in json.loads(sys.argv[1]) if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps(HEAVY)],
        cwd=tmp_path,
        env=program_environment(tmp_path / "home"),
        capture_output=True,
        text=True,
        check=False,
    )
    told = printed(done).count("Usage: ")
    assert told > 50
    # What a list of commands says of each is its first sentence, whole, in a terminal of 80 columns.
    assert [line for line in done.stdout.splitlines() if line.endswith("...") and "Usage: " not in line] == []
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert f"COMMANDS {told} HEAVY []" in done.stdout
    assert not (tmp_path / "home").exists()


# --- without a train ----------------------------------------------------------------------------------------


def test_scores_have_the_documented_keys_and_values(tmp_path: Path) -> None:
    row = {
        "prediction": "周末去澄迈采摘杨桃，入园免费，带走按2.5元/斤，快来报名！",
        "reference": "这个周末自驾游去摘杨桃啦！",
    }
    (tmp_path / "answers.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    scores = read_json(tuneline("score", "answers.jsonl", "--json", home=tmp_path / "home", cwd=tmp_path))
    documented = {"accuracy": 0.0, "rouge_1": 30.77, "rouge_2": 0.0, "rouge_l": 28.57, "bleu_4": 2.71}
    assert {name: round(scores[name], 2) for name in documented} == documented
    assert 0 < scores["f1"] < 100
    assert scores["rows"] == 1
    table = printed(tuneline("score", "answers.jsonl", home=tmp_path / "home", cwd=tmp_path))
    assert "Exact accuracy" in table
    assert "30.77" in table


def test_columns_slices_and_a_second_model_are_scored(tmp_path: Path) -> None:
    wanted = [f"light {number} on" for number in range(12)]
    for name, answers in {"old": ["off"] * 12, "new": [*wanted[:9], "off", "off", "off"]}.items():
        rows = [
            {"answer": answer, "truth": text, "room": "hall" if number < 9 else "attic"}
            for number, (answer, text) in enumerate(zip(answers, wanted, strict=True))
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = ("--prediction-column", "answer", "--reference-column", "truth", "--by", "room", "--stop-words", "en")
    command = ("score", "old.jsonl", *columns, "--against", "new.jsonl")
    found = read_json(tuneline(*command, "--json", home=tmp_path / "home", cwd=tmp_path))
    assert {value: part["rows"] for value, part in found["slices"]["room"].items()} == {"hall": 9, "attic": 3}
    (accuracy,) = (each for each in found["against"] if each["metric"] == "accuracy")
    assert (accuracy["first"], accuracy["second"], accuracy["verdict"]) == (0, 75, "better")
    assert accuracy["mcnemar_p"] == pytest.approx(2 / 2**9)
    table = printed(tuneline(*command, home=tmp_path / "home", cwd=tmp_path))
    assert "95 % interval" in table
    assert "attic" in table
    assert "McNemar p" in table
    assert "jieba 0.42" in table


def test_datasets_are_checked_added_listed_and_shown(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "q.jsonl").write_text('{"q": "x", "a": "y"}\n{"q": "z", "a": "w"}\n')
    columns = ("--prompt-column", "q", "--completion-column", "a")
    assert place.json("datasets", "check", "q.jsonl", *columns)["rows_kept"] == 2
    assert place.json("datasets", "list") == []
    added = place.json("datasets", "add", "q.jsonl", "--name", "mine", *columns)
    assert (added["name"], added["rows"]) == ("mine", 2)
    listed = place.json("datasets", "list")
    assert [(item["name"], item["digest"]) for item in listed] == [("mine", added["digest"])]
    assert place.json("datasets", "show", f"mine@{added['digest'][:8]}")["report"]["rows_kept"] == 2
    assert "mine@" in place.text("datasets", "list")
    assert "2 read, 2 kept, 0 refused" in place.text("datasets", "show", "mine")


@pytest.mark.lifecycle
def test_datasets_are_compared_mixed_and_shown_as_a_page(place: Place) -> None:
    for name, answer in {"one": "on", "two": "off"}.items():
        rows = [{"prompt": f"light {number}?", "completion": answer if number else "same"} for number in range(8)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (place.root / f"{name}.jsonl").write_text(text, encoding="utf-8")
    place.json("datasets", "add", "one.jsonl")
    against = ("--against", "one", "--model", "tiny", "--html", "page.html")
    report = place.json("datasets", "check", "two.jsonl", *against)
    assert (report["overlap"]["rows"], report["overlap"]["prompts"]) == (1, 8)
    assert report["tokens"]["model"] == "tiny"
    page = (place.root / "page.html").read_text(encoding="utf-8")
    assert page.startswith("<!doctype html>")
    assert "<mark>off" in page
    told = place.text("datasets", "check", "two.jsonl", "--against", "one.jsonl", "--model", "tiny")
    assert "8 of 8 rows ask what a row of one.jsonl asks" in told
    assert "⟦off" in told
    place.json("datasets", "add", "two.jsonl")
    changes = place.json("datasets", "diff", "one", "two")
    assert (changes["same"], changes["changed"], changes["added"]) == (1, 7, 0)
    assert "light 1? | on → light 1? | off" in place.text("datasets", "diff", "one", "two")
    mixed = place.json("datasets", "mix", "one=2", "two=1", "--name", "both", "--rows", "9", "--seed", "3")
    assert [(part["weight"], part["rows"]) for part in mixed["parents"]] == [(2, 6), (1, 3)]
    shown = place.text("datasets", "show", "both", "--against", "two")
    assert "6 rows of one@" in shown
    assert "seed" in shown
    refused = place.run("datasets", "mix", "one", "two=1", "--name", "both")
    assert refused.returncode == 2
    assert "DATASET=WEIGHT, such as orders=2" in refused.stderr


def test_refused_rows_are_stored_around_only_if_allowed(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "x", "completion": "y"}\n{"prompt": "z"}\n')
    assert place.run("datasets", "add", "rows.jsonl").returncode == 2
    added = place.json("datasets", "add", "rows.jsonl", "--allow-refused")
    assert (added["rows"], added["report"]["refused"]) == (1, {"missing_column": 1})


def test_base_models_are_added_listed_and_shown(place: Place) -> None:
    place.text("models", "add", "mine", "--path", "tiny", "--license", "apache-2.0", "--description", "very small")
    listed = {entry["name"]: entry for entry in place.json("models", "list")["preset"]}
    assert "smollm2-135m-instruct" in listed
    assert listed["mine"]["license"] == "apache-2.0"
    assert place.json("models", "show", "mine")["path"] == str(place.root / "tiny")
    assert "very small" in place.text("models", "show", "mine")
    assert "exists" in place.run("models", "add", "mine", "--path", "tiny").stderr


def test_methods_are_listed_and_shown(tmp_path: Path) -> None:
    place = Place(tmp_path)
    assert "sft" in [method["name"] for method in place.json("methods", "list")]
    shown = place.json("methods", "show", "sft")
    assert shown["stages"]["training"]["file"] == "training.py"
    text = place.text("methods", "show", "sft")
    assert "lora_rank" in text
    assert "LORA_RANK" in text


def test_presets_are_listed_and_shown_with_the_document_of_each_value(capsys: pytest.CaptureFixture[str]) -> None:
    def told(*arguments: str) -> str:
        app(["presets", *arguments], standalone_mode=False)
        return capsys.readouterr().out

    assert {"nl2sql", "nl2sql-lora", "baichuan2-7b-chat"} <= json.loads(told("list", "--json")).keys()
    assert "Natural language to SQL, with LoRA" in told("list")
    values = json.loads(told("show", "nl2sql-lora", "--json"))["values"]
    assert values["epochs"]["value"] == 4
    assert "NL2SQL" in values["epochs"]["source"]
    assert "局部微调" in values["learning_rate"]["source"]
    row = next(line.split() for line in told("show", "NL2SQL场景").splitlines() if line.startswith("epochs"))
    text = (PROJECT_ROOT / "configs" / "presets" / "nl2sql.yaml").read_text(encoding="utf-8").splitlines()
    assert text[int(row[-1]) - 1].split() == ["epochs:", row[1]]


def test_doctor_tells_each_check(tmp_path: Path) -> None:
    done = tuneline("doctor", "--json", home=tmp_path / "home", cwd=tmp_path)
    checks = json.loads(done.stdout)
    assert done.returncode == (0 if all(check["ok"] for check in checks) else 1)
    assert {"python", "disk", "memory"} <= {check["name"] for check in checks}
    assert all(check["ok"] or check["mend"] for check in checks)


# --- one train ----------------------------------------------------------------------------------------------


def test_dry_run_tells_every_value_and_starts_nothing(place: Place, tmp_path: Path) -> None:
    arguments = ["train", place.root / "lights.yaml", "--dry-run", "--preset", "nl2json", "--through", "complete"]
    done = tuneline(*arguments, "--set", "学习率=2e-4", home=tmp_path / "home", cwd=tmp_path)
    lines = {tuple(line.split()[:2]): line for line in printed(done).splitlines() if line}
    assert "command line" in lines["learning_rate", "0.0002"]
    assert "command line" in lines["through", "complete"]
    assert "file lights.yaml:" in lines["batch_size", "4"]
    assert "preset nl2json" in lines["lr_decay_ratio", "0.01"]
    assert "weight_decay: 0" in done.stdout  # a default
    assert "40 of 40" in done.stdout
    assert not (tmp_path / "home").exists()


def test_train_prints_configuration_progress_and_outcome(trained: str) -> None:
    assert "command line" in next(line for line in trained.splitlines() if line.startswith("lora_rank"))
    assert "Base" in trained
    assert "Fine-tuned" in trained
    assert "BLEU-4" in trained
    assert "status  " in trained


def test_trains_are_listed_and_shown(place: Place, train_id: str) -> None:
    listed = place.json("trains", "list")
    assert [(item["id"], item["status"]) for item in listed if item["id"] == train_id] == [(train_id, "completed")]
    shown = place.json("trains", "show", "lights")
    assert shown["config"]["hyperparameters"]["lora_rank"] == 4
    assert shown["origins"]["hyperparameters.lora_rank"] == "command line"
    assert shown["outcome"]["steps"] == 4
    assert {"base", "tuned"} == set(shown["evaluation"])
    assert shown["dataset"].startswith("rows@")
    assert train_id in place.text("trains", "list")
    text = place.text("trains", "show", train_id)
    assert shown["run_id"] in text
    assert shown["model"] in text


def test_log_of_a_train_is_printed(place: Place, train_id: str) -> None:
    assert place.text("trains", "log", train_id, "--follow").strip()


def test_copy_is_a_train_file_that_differs_where_told(place: Place, train_id: str) -> None:
    text = place.text("trains", "copy", "lights", "--set", "learning_rate=5e-4")
    assert train_id in text.splitlines()[0]
    assert yaml.safe_load(text)["hyperparameters"]["learning_rate"] == 5e-4
    assert "written to copy.yaml" in place.text("trains", "copy", "lights", "--set", "name=again", "-o", "copy.yaml")
    assert "this train would run" in place.text("train", "copy.yaml", "--dry-run")
    assert yaml.safe_load((place.root / "copy.yaml").read_text())["name"] == "again"


def test_customized_model_answers_and_is_scored(place: Place, train_id: str) -> None:
    answer = place.json("infer", train_id, "the light 3", "--max-new-tokens", "5", "--system", "be short")
    assert 0 < answer["tokens"] <= 5
    assert answer["model"].startswith("tiny_lights_")
    scores = place.json("evaluate", "lights", "--dataset", "test.jsonl", "--samples", "2", "--max-new-tokens", "5")
    assert scores["rows"] == 2
    assert "test@" in scores["dataset"]
    assert 0 <= scores["f1"] <= 100


# --- cancelled and resumed ----------------------------------------------------------------------------------


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.1)


@pytest.mark.lifecycle
def test_cancelled_train_keeps_its_checkpoint_and_is_resumed_to_its_end(place: Place, trained: str) -> None:
    slow = ["--set", "name=slow", "--set", "max_steps=600", "--set", "evaluation_dataset=null"]
    process = subprocess.Popen(
        [str(PROGRAM), "train", "lights.yaml", *slow],
        cwd=place.root,
        env=program_environment(place.home),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    trains = place.home / "trains"
    wait_for(lambda: any('"metrics"' in f.read_text() for f in trains.glob("slow_*/training/events.jsonl")), process)
    assert "slow" in "".join(place.json("status")["trains"])
    assert "already running" in (again := place.run("trains", "resume", "slow")).stderr or "is running" in again.stderr
    assert again.returncode == 2
    assert "was asked to stop" in place.text("trains", "cancel", "slow")
    _, told = process.communicate(timeout=90)
    assert process.returncode == 130, told
    assert "tuneline trains resume" in told
    assert "Traceback" not in told

    cancelled = place.json("trains", "show", "slow")
    assert cancelled["status"] == "cancelled"
    checkpoints = list((trains / cancelled["id"] / "training" / "checkpoints").glob("checkpoint-*"))
    assert checkpoints
    assert place.run("trains", "cancel", "slow").returncode == 2
    with contextlib.closing(sqlite3.connect(place.home / "prefect" / "prefect.db")) as database:
        states = database.execute("SELECT state_type FROM flow_run WHERE name LIKE 'slow_%'").fetchall()
    assert states == [("CANCELLED",)]  # what the Prefect page shows

    assert "completed" in place.text("trains", "resume", "slow")
    resumed = place.json("trains", "show", "slow")
    assert (resumed["status"], resumed["attempts"], resumed["outcome"]["steps"]) == ("completed", 2, 600)

    comparison = place.json("trains", "compare", "lights", "slow")
    assert comparison["parameters"]["max_steps"] == [4, 600]
    assert comparison["figures"]["steps"] == [4, 600]
    assert "Parameters that differ" in place.text("trains", "compare", "lights", "slow")


# --- complete and deployed ----------------------------------------------------------------------------------


def test_complete_model_is_listed_and_verified(place: Place, complete_name: str) -> None:
    mine = {model["name"]: model for model in place.json("models", "list")["mine"]}
    assert mine[complete_name]["stage"] == "complete"
    assert mine[complete_name]["parent"] in mine
    assert mine[complete_name]["verification"]


@pytest.mark.lifecycle
def test_models_are_deployed_rolled_back_and_undeployed(place: Place, complete_name: str) -> None:
    customized = place.json("models", "show", complete_name)["parent"]
    first = place.text("deploy", customized, "--endpoint", "lamps")
    assert "http://127.0.0.1:" in first
    second = place.text("deploy", complete_name, "--endpoint", "lamps")
    assert f"{complete_name}_d_" in second
    (endpoint,) = place.json("deployments")
    assert (endpoint["name"], endpoint["state"]) == ("lamps", "up")
    assert len(endpoint["history"]) == 2
    assert "lamps" in place.text("deployments")
    assert place.json("status")["endpoints"][0]["name"] == "lamps"
    assert place.text("deployments", "log", "lamps", "--lines", "5").strip()
    models = httpx.get(f"{endpoint['address']}/models", timeout=30, trust_env=False)
    assert models.status_code == 200

    assert f"{customized}_d_" in place.text("deployments", "rollback", "lamps")
    aliases = {model["name"]: model["aliases"] for model in place.json("models", "list")["mine"]}
    assert "deployed" in aliases[customized]
    assert place.json("models", "show", "lights@deployed")["name"] == customized

    assert "nothing is served at lamps" in place.text("undeploy", "lamps")
    assert place.json("deployments")[0]["state"] == "undeployed"
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"{endpoint['address']}/models", timeout=10, trust_env=False)


# --- servers ------------------------------------------------------------------------------------------------


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


def test_servers_go_up_show_what_ran_embedded_and_go_down(place: Place, trained: str) -> None:
    prefect, mlflow = free_ports(2)
    ports = {"TUNELINE_PREFECT_PORT": str(prefect), "TUNELINE_MLFLOW_PORT": str(mlflow)}
    try:
        text = printed(place.run("up", extra=ports))
        assert f"http://127.0.0.1:{prefect}" in text
        assert f"http://127.0.0.1:{mlflow}" in text
        told = read_json(place.run("status", "--json", extra=ports))
        assert {item["name"]: item["state"] for item in told["services"]} == dict.fromkeys(
            ("prefect", "mlflow", "worker"), "running"
        )
        flows = httpx.post(
            f"http://127.0.0.1:{prefect}/api/flow_runs/count", json={}, timeout=30, trust_env=False
        ).json()
        assert flows >= 1
        assert read_json(place.run("models", "list", "--json", extra=ports))["mine"]
    finally:
        down = place.run("down", extra=ports)
    assert printed(down).count("stopped") == 3
    assert {item["state"] for item in place.json("status")["services"]} == {"not running"}


def test_programs_of_the_readme_exist() -> None:
    from typer.main import get_command

    from flows.cli import app

    commands = [
        line.removeprefix("tuneline ").split()
        for line in (PROJECT_ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("tuneline ")
    ]
    root: Any = get_command(app)
    names = {(name, sub) for name, group in root.commands.items() for sub in getattr(group, "commands", {})}
    names |= {(name,) for name in root.commands}
    assert len(commands) > 10
    assert [command for command in commands if tuple(command[:2]) not in names and (command[0],) not in names] == []
