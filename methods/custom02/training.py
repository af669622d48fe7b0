"""A template of a training stage around an outside command: options from the job, curves from what it prints.

Run as: python training.py JOB_DIR
"""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from methods import contract
from methods.toolkit import chat, probing, tokenizing

_STEP = re.compile(r"step (\d+) loss (\S+)")
_SAVED = re.compile(r"saved (\d+)")
_LEFT_OUT = re.compile(r"left out: ")


def command(job: contract.Job) -> list[str]:
    """The command line of the outside program: the place where each parameter finds its option."""
    p = job.parameters
    options = {
        "--model": job.inputs["base_model"],
        "--rows": job.inputs["train_rows"],
        "--output": job.output,
        "--checkpoints": work_folder(job),
        "--steps": p["max_steps"],
        "--batch": p["batch_size"],
        "--rate": p["learning_rate"],
        "--rank": p["lora_rank"],
        "--alpha": p["lora_alpha"],
        "--length": p["max_seq_length"],
        "--most-rows": p["max_samples"],
        "--save-every": p["checkpoint_steps"],
        "--seed": job.seed,
    }
    program = Path(__file__).with_name("outside_trainer.py")
    return [sys.executable, str(program), *(str(word) for option in options.items() for word in option)]


def work_folder(job: contract.Job) -> Path:
    """Where the program keeps checkpoints in its own way; the newest is handed back to it on a resume."""
    return job.folder / "outside"


def follow(job: contract.Job, process: subprocess.Popen[str]) -> int:
    """Turn the program's lines into events until it ends; returns the last step."""
    last, left_out, asked = 0, 0, False
    for line in process.stdout or []:
        print(line, end="", flush=True)
        if job.cancelled and not asked:
            asked = True
            process.send_signal(signal.SIGINT)  # what this program takes for "save and stop"
        if step := _STEP.match(line):
            last = int(step[1])
            job.metrics(last, loss=float(step[2]), learning_rate=job.parameters["learning_rate"])
            job.progress(last, job.parameters["max_steps"])
        elif saved := _SAVED.match(line):
            keep(job, int(saved[1]))
        elif _LEFT_OUT.match(line):
            left_out += 1
    if left_out:
        job.warning(f"{left_out} rows longer than max_seq_length were left out")
    return last


def keep(job: contract.Job, step: int) -> None:
    """Make a checkpoint of ours from the program's own: a folder that is marked when it is whole."""
    folder = job.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(work_folder(job) / f"{step}.pt", folder / f"{step}.pt")
    contract.mark_complete(folder)
    contract.keep_newest(job.checkpoints, job.parameters["keep_checkpoints"])


def resume(job: contract.Job) -> None:
    """Give the program the checkpoint of the job, if it has one, and nothing newer."""
    shutil.rmtree(work_folder(job), ignore_errors=True)
    if job.resume_from is not None:
        shutil.copytree(job.resume_from, work_folder(job))


def main(job: contract.Job) -> dict[str, object]:
    """Run the command from the job folder; returns where the product lies and how it went."""
    started = time.monotonic()
    resume(job)
    job.phase("training")
    # In a session of its own: SIGTERM reaches the whole group of this stage, and would end the program unsaved.
    with subprocess.Popen(
        command(job), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        last = follow(job, process)
    if process.returncode != 0:
        raise contract.Refused(f"the training command ended with exit code {process.returncode}; its output is the log")
    if last < job.parameters["max_steps"] and job.cancelled:
        raise contract.Cancelled
    tokenizer, _ = chat.load_tokenizer(str(job.output))
    conversations = tokenizing.read_conversations(Path(job.inputs["train_rows"]), -1)
    probing.write_probes(job.output, tokenizer, conversations)
    return {"model": str(job.output), "adapter": True, "steps": last, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    contract.run(main)
