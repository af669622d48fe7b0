"""`tuneline infer`: one question to a model, whatever it answers with: a text, scores, embeddings or a picture."""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from configs.errors import UserError
from flows.printing import print_json, print_table
from methods.toolkit.tool_parsing import as_text

if TYPE_CHECKING:
    from configs.records import ModelRecord
    from tasks.inference import Generation

MethodOption = Annotated[
    str | None, typer.Option("--method", help="Method that asks a base model; by default the one of its type.")
]
_VALUES_SHOWN = 8
Thinking = Annotated[
    Literal["auto", "on", "off"], typer.Option(help="Whether answers begin with a thought; auto: as the template does.")
]


def infer(
    model: Annotated[str, typer.Argument(help="A base, customized or complete model, LINE@ALIAS, or a train.")],
    prompt: Annotated[
        str, typer.Argument(help="What to ask: a question, a text to go on from or to embed, what a picture shows.")
    ],
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    answer: Annotated[
        list[str], typer.Option("--answer", help="An answer that a reward model is to score; repeatable.")
    ] = [],  # noqa: B006 - typer reads the default, nobody changes it
    text: Annotated[
        list[str], typer.Option("--text", help="A further text to embed and compare with the first; repeatable.")
    ] = [],  # noqa: B006
    image: Annotated[
        list[Path],
        typer.Option("--image", help="A picture that the question is about; repeatable.", exists=True, dir_okay=False),
    ] = [],  # noqa: B006
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="File of a picture; by default MODEL_SEED.png here.")
    ] = None,
    tools: Annotated[
        Path | None,
        typer.Option("--tools", help="JSON file of the tools that it may call.", exists=True, dir_okay=False),
    ] = None,
    method: MethodOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.", min=1)] = 128,
    temperature: Annotated[float, typer.Option(help="0 always gives the likeliest answer.", min=0)] = 0.0,
    seed: Annotated[int, typer.Option(help="Start of the random choices.", min=0)] = 42,
    thinking: Thinking = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Ask a model one question, without deploying it."""
    from flows import cli_models, cli_trains
    from methods.registry import find_method

    found = with_method(cli_models.find(model), method)
    asked_of = find_method(found.method)
    kind: str = asked_of.types[0] if asked_of.types[0] in _ASKING else "chat"
    if kind == "chat" and "chat" not in asked_of.evaluated_kinds:
        kind = "reward"
    if "text" in asked_of.kinds:
        kind = "text"
    given: dict[str, Any] = {"--answer": answer, "--text": text, "--image": image, "--output": output}
    given |= {"--system": system, "--tools": tools}
    _refuse_other_options(kind, given)
    cli_trains.embedded()
    from tasks.inference import Generation

    generation = Generation(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, thinking=thinking)
    messages = [*([{"role": "system", "content": system}] if system else []), {"role": "user", "content": prompt}]
    requests: dict[str, dict[str, Any]] = {
        "chat": {"messages": messages, **({"tools": _read_tools(tools)} if tools else {})},
        "vision-language": {"messages": _about(messages, image)},
        "reward": {"prompt": messages, "answers": answer},
        "embedding": {"texts": [prompt, *text]},
        "image-generation": {"caption": prompt, "seed": seed},
        "text": {"text": prompt},
    }
    if kind == "reward" and not answer:
        raise UserError("a reward model scores answers", field="--answer", expected="one or more answers to score")
    _ASKING[kind](found, requests[kind], generation, output or Path(f"{found.name}_{seed}.png"), json_)


def _about(messages: list[dict[str, Any]], images: list[Path]) -> list[dict[str, Any]]:
    """The messages with the images before the last one's question."""
    from tasks.vision_messages import with_images

    *before, last = messages
    seen = [{"type": "image"} for _ in images]
    question = {**last, "content": [*seen, {"type": "text", "text": last["content"]}]}
    row = {"messages": [*before, question], "images": [str(path.absolute()) for path in images]}
    return list(with_images(row, Path())["messages"])


def with_method(model: ModelRecord, method: str | None) -> ModelRecord:
    """The model as this method asks it. Raises UserError for a model that another method has made."""
    from methods.registry import find_method

    if method is None:
        return model
    if model.stage != "base":
        raise UserError(f"this model is one of the method {model.method}", field="--method", value=method)
    return model.model_copy(update={"method": find_method(method).name})


def _refuse_other_options(kind: str, given: dict[str, Any]) -> None:
    known = {
        "chat": ["--system", "--tools"],
        "vision-language": ["--image", "--system"],
        "reward": ["--answer", "--system"],
        "embedding": ["--text"],
        "text": [],
    }
    taken = known.get(kind, ["--output"])
    for name, value in given.items():
        if value and name not in taken:
            raise UserError(
                "this option has no meaning for a model of this kind",
                field=name,
                value=value,
                expected=", ".join(taken) or "none of them",
            )


def _read_tools(file: Path) -> list[dict[str, Any]]:
    """The tools of a JSON file, as OpenAI's interface has them. Raises UserError."""
    from tasks.dataset_fields import RowRefusedError
    from tasks.dataset_tools import read_tools

    try:
        return read_tools(file.read_text(encoding="utf-8"), "tools")
    except RowRefusedError as refusal:
        problem = refusal.problem
        raise UserError(
            problem.message, file=file, field=problem.field, expected=problem.expected, mend=problem.mend
        ) from None


def _chat(found: ModelRecord, request: dict[str, Any], generation: Generation, _: Path, json_: bool) -> None:
    """Print what the model answers, or how it goes on after a text."""
    from flows import cli_trains
    from tasks.inference import Answer, measured_requests

    with cli_trains.terminal_line("answering") as follow:
        predictions, speed = measured_requests(found, [request], generation, follow)
    answer = Answer.model_validate(predictions[0])
    if json_:
        told = {"speed": speed.model_dump() if speed is not None else None}
        print_json({"model": found.name, **answer.model_dump(), **told})
        return
    if answer.thought:
        print(f"(thought: {answer.thought})", file=sys.stderr)
    parsed = answer.parsed(request.get("tools", []))
    calls = parsed.calls if "tools" in request else []
    print(as_text(parsed.content, calls) if calls else answer.answer)
    if speed is not None:
        print(f"({speed.in_words()})", file=sys.stderr)
    if answer.hit_limit:
        print(f"(cut at {generation.max_new_tokens} tokens; --max-new-tokens raises the limit)", file=sys.stderr)


def _reward(found: ModelRecord, request: dict[str, Any], generation: Generation, _: Path, json_: bool) -> None:
    from tasks.inference import answer_requests

    scores = [float(score) for score in answer_requests(found, [request], generation)[0]["scores"]]
    if json_:
        print_json({"model": found.name, "scores": scores})
        return
    best_first = sorted(zip(scores, request["answers"], strict=True), reverse=True)
    print_table(("Score", "Answer"), [(f"{score:.4f}", text) for score, text in best_first], "no answers")


def _embed(found: ModelRecord, request: dict[str, Any], generation: Generation, _: Path, json_: bool) -> None:
    from tasks.inference import answer_requests
    from tasks.serving_requests import cosine

    vectors = answer_requests(found, [request], generation)[0]["embeddings"]
    if json_:
        print_json({"model": found.name, "embeddings": vectors})
        return
    for text, vector in zip(request["texts"], vectors, strict=True):
        first = " ".join(f"{value:.4f}" for value in vector[:_VALUES_SHOWN])
        print(f"{text}\n  {len(vector)} numbers: {first} ...")
    pairs = combinations(range(len(vectors)), 2)
    rows = [(request["texts"][a], request["texts"][b], f"{cosine(vectors[a], vectors[b]):.4f}") for a, b in pairs]
    if rows:
        print_table(("Text", "Text", "Cosine"), rows, "")


def _draw(found: ModelRecord, request: dict[str, Any], generation: Generation, output: Path, json_: bool) -> None:
    import shutil
    import tempfile

    from tasks.inference import answer_requests

    with tempfile.TemporaryDirectory() as folder:
        made = Path(answer_requests(found, [request], generation, keep=Path(folder))[0]["image"])
        output.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(made, output)
    if json_:
        print_json({"model": found.name, "image": str(output.absolute()), "seed": request["seed"]})
        return
    print(output.absolute())


_ASKING = {
    "chat": _chat,
    "vision-language": _chat,
    "reward": _reward,
    "embedding": _embed,
    "image-generation": _draw,
    "text": _chat,
}
