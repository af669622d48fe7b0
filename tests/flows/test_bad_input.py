"""Every kind of bad input: one clear message, exit code 2, and nothing half made."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.records import TrainRecord
from configs.resolve import resolve_train
from tasks.trains import save_record
from tests.flows.command_line import files_below, printed, tuneline

TWO_ROWS = b'{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": "d"}\n'
TRAIN = "name: lights\nbase_model: base\ndataset: rows.jsonl\n"

BAD_ROWS: dict[str, tuple[bytes, list[str]]] = {
    "missing column": (
        TWO_ROWS + b'{"prompt": "x"}\n',
        ["rows.jsonl:3: the row has no column 'completion'", "field: completion"],
    ),
    "wrong type": (
        TWO_ROWS + b'{"prompt": 5, "completion": "x"}\n',
        ["rows.jsonl:3: prompt is the number 5 where text is expected", "field: prompt"],
    ),
    "empty file": (b"", ["rows.jsonl: the dataset file is empty", "expected: at least one row"]),
    "only blank lines": (b"\n \n\n", ["rows.jsonl", "expected: at least one row"]),
    "invalid JSON": (TWO_ROWS + b'{"prompt": "x", }\n', ["rows.jsonl:3: invalid JSON"]),
    "duplicate keys": (
        TWO_ROWS + b'{"prompt": "x", "prompt": "y", "completion": "z"}\n',
        ["rows.jsonl:3: the key 'prompt' is given twice", "field: prompt"],
    ),
    "huge line": (
        TWO_ROWS + b'{"prompt": "x", "completion": "' + b"y" * 9_000_000 + b'"}\n',
        ["rows.jsonl:3: the row is too long", "at most 8,388,608 bytes"],
    ),
    "wrong encoding": (
        '{"prompt": "打开灯", "completion": "on"}\n'.encode("gb18030"),
        ["rows.jsonl:1: the text is not UTF-8", "iconv"],
    ),
    "preference pairs": (
        b'{"prompt": "x", "chosen": "y", "rejected": "z"}\n',
        ["rows.jsonl:1: these are preference pairs; sft takes conversations", "field: chosen, rejected"],
    ),
    "comma-separated values": (b"prompt,completion\na,b\n", ["rows.jsonl:1"]),
    "empty answer": (TWO_ROWS + b'{"prompt": "x", "completion": ""}\n', ["rows.jsonl:3", "field: completion"]),
    "an array in a line": (TWO_ROWS + b'["x", "y"]\n', ["rows.jsonl:3", "expected: a JSON object"]),
}

BAD_TRAINS: dict[str, tuple[str, list[str]]] = {
    "no dataset file": ("name: t\nbase_model: base\ndataset: gone.jsonl\n", ["gone.jsonl: there is no such dataset"]),
    "no dataset of the name": ("name: t\nbase_model: base\ndataset: gone\n", ["there is no dataset 'gone'"]),
    "old Excel format": (
        "name: t\nbase_model: base\ndataset: table.xls\n",
        ["table.xls: the old Excel format is not read", "to mend: save it as .xlsx"],
    ),
    "no base model": (
        "name: t\nbase_model: smollm2-135m-instuct\ndataset: rows.jsonl\n",
        ["there is no such base model", "did you mean smollm2-135m-instruct"],
    ),
    "base model without safetensors": (
        "name: t\nbase_model: pickled\ndataset: rows.jsonl\n",
        ["pickled: the base model has no safetensors weights"],
    ),
    "unknown parameter": (TRAIN + "LORA_RNK: 8\n", ["train.yaml:4: there is no such parameter", "mean lora_rank?"]),
    "contradictory parameters": (
        TRAIN + "tuning: full\nload_in_4bit: true\n",
        ["train.yaml:4", "tuning", "load_in_4bit", "to mend: set tuning: lora"],
    ),
    "two spellings that disagree": (
        TRAIN + "LORA_RANK: 8\nloraRank: 16\n",
        ["LORA_RANK (train.yaml:4) = 8 and loraRank (train.yaml:5) = 16 are one parameter with two values"],
    ),
    "impossible value": (
        TRAIN + "lora_rank: 0\n",
        ["train.yaml:4: this value is impossible", "lora_rank = 0", "a whole number ≥ 1"],
    ),
    "text for a number": (TRAIN + "batch_size: many\n", ["train.yaml:4", "batch_size = 'many'", "a whole number"]),
    "unknown method": (TRAIN + "method: dpoo\n", ["no such training method", "method = 'dpoo'", "did you mean dpo?"]),
    "parameter that the method does not have": (
        TRAIN + "method_params: {beta: 0.1}\n",
        ["the method sft has no such parameter", "field: method_params.beta"],
    ),
    "no YAML": ("name: [t\nbase_model: base\n", ["train.yaml:2: this is not YAML"]),
    "a YAML list": ("- name\n- t\n", ["train.yaml", "`name: value`"]),
    "a key twice": (TRAIN + "name: other\n", ["train.yaml:4: `name` stands twice, on line 1 and on line 4"]),
    "missing parameter": ("name: t\ndataset: rows.jsonl\n", ["a required parameter is missing", "field: base_model"]),
    "name that leaves the store": ("name: ../../t\nbase_model: base\ndataset: rows.jsonl\n", ["train.yaml:1", "name"]),
    "endpoint that is no name": (
        TRAIN + "through: deployed\nendpoint: ../x\n",
        ["train.yaml:5: this value is impossible", "endpoint = '../x'"],
    ),
    "validation twice": (
        TRAIN + "validation_dataset: rows.jsonl\nvalidation_split: 0.1\n",
        ["validation_dataset", "validation_split", "to mend: keep one of the two"],
    ),
}

BAD_COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "no train file": (["train", "gone.yaml"], ["gone.yaml: there is no such file"]),
    "--set without =": (["train", "train.yaml", "--set", "lora_rank"], ["--set = 'lora_rank'", "name=value"]),
    "--set of an unknown name": (["train", "train.yaml", "--set", "learning_rat=1"], ["did you mean learning_rate?"]),
    "unknown preset": (["train", "train.yaml", "--preset", "nl2jsn"], ["did you mean nl2json"]),
    "unknown goal": (["train", "train.yaml", "--through", "nowhere"], ["through", "customized, complete, deployed"]),
    "resume of no train": (["trains", "resume", "gone"], ["there is no such train", "train = 'gone'"]),
    "train id outside of the store": (["trains", "cancel", "../../etc"], ["this is no id of a train"]),
    "comparison of one": (["trains", "compare", "one"], ["at least two trains"]),
    "deployment of no model": (["deploy", "gone"], ["there is no such model", "model = 'gone'"]),
    "deployment at no name": (["deploy", "base", "--endpoint", "../x"], ["no name for an endpoint", "'../x'"]),
    "deployment at no port": (["deploy", "base", "--port", "99999"], ["--port", "65535"]),
    "unknown quantisation": (["deploy", "base", "--quantization", "int3"], ["--quantization", "bnb-4bit"]),
    "saving of a base model": (["save", "base"], ["only a customized model can be saved", "train = 'base'"]),
    "question to no model": (["infer", "gone", "hello"], ["there is no such model"]),
    "evaluation on no dataset": (["evaluate", "base", "--dataset", "gone.jsonl"], ["gone.jsonl: there is no such"]),
    "undeploying nothing": (["undeploy", "gone"], ["there is no endpoint 'gone'"]),
    "log outside of the store": (["deployments", "log", "../x"], ["endpoint = '../x'"]),
    "rollback of nothing": (["deployments", "rollback", "gone"], ["there is no endpoint 'gone'"]),
    "base model named outside": (["models", "add", "../x", "--path", "base"], ["name = '../x'", "letters, digits"]),
    "base model from nowhere": (["models", "add", "mine", "--path", "gone"], ["there is no such folder"]),
    "base model of pickles": (["models", "add", "mine", "--path", "pickled"], ["no safetensors weights"]),
    "base model of two sources": (
        ["models", "add", "mine", "--path", "base", "--hub", "some/one"],
        ["exactly one of the two"],
    ),
    "base model with no hub id": (["models", "add", "mine", "--hub", "one"], ["hub = 'one'", "OWNER/NAME"]),
    "chat template that is not there": (
        ["models", "add", "mine", "--path", "base", "--chat-template", "gone.jinja"],
        ["gone.jinja", "chat template cannot be read"],
    ),
    "unknown model": (["models", "show", "gone"], ["there is no such model"]),
    "unknown method shown": (["methods", "show", "stf"], ["no such training method", "did you mean sft?"]),
    "dataset named outside": (["datasets", "add", "rows.jsonl", "--name", "../x"], ["no name for a dataset", "'../x'"]),
    "dataset that is not stored": (["datasets", "show", "gone"], ["there is no dataset 'gone'"]),
    "scores of no file": (["score", "gone.jsonl"], ["gone.jsonl: the file cannot be read"]),
    "score row of another type": (["score", "types.jsonl"], ["types.jsonl:1", "field: prediction = 3"]),
    "unknown command": (["frobnicate"], ["No such command 'frobnicate'"]),
}


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working folder with a good train: what a test then spoils is the only mistake in it."""
    for name, weights in {"base": "model.safetensors", "pickled": "pytorch_model.bin"}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / weights).touch()
    (tmp_path / "rows.jsonl").write_bytes(TWO_ROWS)
    (tmp_path / "train.yaml").write_text(TRAIN)
    (tmp_path / "table.xls").write_bytes(b"\xd0\xcf\x11\xe0")
    (tmp_path / "types.jsonl").write_text('{"prediction": 3, "reference": "x"}\n')
    return tmp_path


def refused(work: Path, *arguments: str, **extra: str) -> str:
    """The message of a command that must fail at once and leave its home as it was."""
    home = Path(extra.get("TUNELINE_HOME", work / "home"))
    before = files_below(home)
    done = tuneline(*arguments, home=home, cwd=work, seconds=60, extra=extra)
    assert done.returncode == 2, done.stderr + done.stdout
    assert "Traceback" not in done.stderr
    assert done.stderr.count("error:") <= 1
    assert files_below(home) == before
    return done.stderr


def assert_told(message: str, expected: list[str]) -> None:
    assert [text for text in expected if text not in message] == [], message


def test_good_train_is_accepted(work: Path) -> None:
    done = tuneline("train", "train.yaml", "--dry-run", home=work / "home", cwd=work)
    assert "2 of 2" in printed(done)
    assert "this train would run" in done.stdout
    assert files_below(work / "home") == set()


def test_byte_order_mark_is_accepted_and_told(work: Path) -> None:
    (work / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + TWO_ROWS)
    done = tuneline("datasets", "check", "rows.jsonl", "--json", home=work / "home", cwd=work)
    report = json.loads(printed(done))
    assert report["rows_kept"] == 2
    assert "byte order mark" in " ".join(report["notes"]).lower().replace("-", " ")


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_bad_rows_stop_a_train_before_it_begins(work: Path, kind: str) -> None:
    content, expected = BAD_ROWS[kind]
    (work / "rows.jsonl").write_bytes(content)
    assert_told(refused(work, "train", "train.yaml"), expected)


@pytest.mark.parametrize("kind", ["missing column", "invalid JSON", "wrong encoding"])
def test_bad_rows_are_not_stored(work: Path, kind: str) -> None:
    content, expected = BAD_ROWS[kind]
    (work / "rows.jsonl").write_bytes(content)
    assert_told(refused(work, "datasets", "add", "rows.jsonl"), expected)


def test_check_of_a_bad_file_reports_all_and_fails(work: Path) -> None:
    (work / "rows.jsonl").write_bytes(TWO_ROWS + b'{"prompt": "x"}\n{"prompt": 5, "completion": "x"}\n')
    done = tuneline("datasets", "check", "rows.jsonl", home=work / "home", cwd=work)
    assert done.returncode == 1
    assert_told(done.stdout, ["2 kept, 2 refused", "line 3, field completion", "line 4, field prompt"])


@pytest.mark.parametrize("kind", BAD_TRAINS)
def test_bad_train_file_is_refused(work: Path, kind: str) -> None:
    content, expected = BAD_TRAINS[kind]
    (work / "train.yaml").write_text(content)
    assert_told(refused(work, "train", "train.yaml"), expected)


@pytest.mark.parametrize("kind", BAD_COMMANDS)
def test_bad_command_is_refused(work: Path, kind: str) -> None:
    arguments, expected = BAD_COMMANDS[kind]
    assert_told(refused(work, *arguments), expected)


def test_all_mistakes_of_a_file_are_told_at_once(work: Path) -> None:
    (work / "train.yaml").write_text(TRAIN + "lora_rank: 0\nepoch: 0\nbatch_sise: 4\n")
    message = refused(work, "train", "train.yaml")
    assert_told(message, ["3 problems", "lora_rank = 0", "train.yaml:5", "did you mean batch_size?"])


def test_completed_train_is_not_resumed(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNELINE_HOME", str(work / "home"))
    config = resolve_train(work / "train.yaml").config
    save_record(TrainRecord(id="lights_20260101_ab12", config=config, status="completed", run_id="0" * 32))
    assert_told(refused(work, "trains", "resume", "lights"), ["this train is completed", "lights_20260101_ab12"])
    assert_told(refused(work, "trains", "cancel", "lights"), ["running", "lights_20260101_ab12"])


def test_home_that_cannot_be_written_is_told(work: Path) -> None:
    (work / "file").touch()
    home = str(work / "file" / "home")
    for arguments in (["train", "train.yaml"], ["datasets", "add", "rows.jsonl"], ["infer", "base", "hello"]):
        assert_told(refused(work, *arguments, TUNELINE_HOME=home), [home, "Not a directory", "to mend"])


def test_impossible_setting_is_told(work: Path) -> None:
    assert_told(refused(work, "status", TUNELINE_PREFECT_PORT="many"), ["TUNELINE_PREFECT_PORT = 'many'"])


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"needs to mount a small file system: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_full_disk_is_told_and_nothing_is_stored(work: Path, small_disk: Path) -> None:
    (work / "many.jsonl").write_bytes(TWO_ROWS * 20_000)
    home = str(small_disk / "home")
    for arguments in (["train", "train.yaml"], ["datasets", "add", "many.jsonl"]):
        message = refused(work, *arguments, TUNELINE_HOME=home)
        assert_told(message, [home, "the disk is full", "TUNELINE_HOME to a folder on a larger disk"])
