"""Stands for a training program that knows nothing of Tuneline: options in, lines such as `step 3 loss 0.52` out.

It writes `STEP.pt` below --checkpoints every --save-every steps and when it gets SIGINT, goes on from the newest one,
and leaves an adapter of peft in --output.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

interrupted = False


def main() -> None:
    """Train from the command line."""
    parser = argparse.ArgumentParser()
    for name in ("--model", "--rows", "--output", "--checkpoints"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--steps", "--batch", "--rank", "--alpha", "--length", "--most-rows", "--save-every", "--seed"):
        parser.add_argument(name, type=int, required=True)
    parser.add_argument("--rate", type=float, required=True)
    given = parser.parse_args()
    signal.signal(signal.SIGINT, _note_interrupt)
    torch.manual_seed(given.seed)
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    config = LoraConfig(task_type="CAUSAL_LM", r=given.rank, lora_alpha=given.alpha, target_modules="all-linear")
    model: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(given.model), config)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=given.rate)
    rows = _read(tokenizer, given.rows, given.length, given.most_rows)
    first = _restore(model, optimizer, given.checkpoints)
    for step in range(first + 1, given.steps + 1):
        batch = random.Random(f"{given.seed} {step}").choices(rows, k=given.batch)  # noqa: S311 - no secret
        loss = sum(model(input_ids=ids, labels=labels).loss for ids, labels in batch) / given.batch
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step} loss {loss.item():.6f}", flush=True)
        if step % given.save_every == 0 or (interrupted and step < given.steps):
            _save(model, optimizer, given.checkpoints, step)
        if interrupted:
            break
    else:
        model.save_pretrained(given.output)
        tokenizer.save_pretrained(given.output)


def _note_interrupt(*_: object) -> None:
    global interrupted
    interrupted = True


def _read(tokenizer: Any, path: Path, length: int, most: int) -> list[tuple[Any, Any]]:
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n")[:-1][: most if most > 0 else None]:
        *asked, answer = json.loads(line)["messages"]
        prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=False)
        ids = [*prompt, *tokenizer(answer["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        if len(ids) <= length:
            labels = [-100] * len(prompt) + ids[len(prompt) :]
            rows.append((torch.tensor([ids]), torch.tensor([labels])))
        else:
            print(f"left out: a row of {len(ids)} tokens", flush=True)
    return rows


def _save(model: Any, optimizer: Any, folder: Path, step: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {"weights": get_peft_model_state_dict(model), "optimizer": optimizer.state_dict()}
    torch.save(state, folder / "writing")
    (folder / "writing").rename(folder / f"{step}.pt")
    print(f"saved {step}", flush=True)


def _restore(model: Any, optimizer: Any, folder: Path) -> int:
    saved = sorted((int(path.stem) for path in folder.glob("*.pt")), reverse=True)
    if not saved:
        return 0
    state = torch.load(folder / f"{saved[0]}.pt", weights_only=True)
    set_peft_model_state_dict(model, state["weights"])
    optimizer.load_state_dict(state["optimizer"])
    return saved[0]


if __name__ == "__main__":
    main()
