"""The vision-language method on a tiny model: it learns to see, and every parameter does what it says."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from methods import contract
from methods.registry import find_method
from methods.toolkit import images, vision_models, vision_rows
from methods.toolkit.chat import IGNORED
from methods.vision_language import check, training
from tests.methods import parameter_effects as effects
from tests.methods.stage_jobs import curve
from tests.methods.vision_bench import OWN, VisionBench, ids_of, stored_rows
from tests.tiny_vision_models import FAMILIES, make_tiny_vision_model

training_test = pytest.mark.methods  # what trains is too slow for make test
FEW: dict[str, Any] = {"max_steps": 2, "batch_size": 4, "max_samples": 8}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the method's own check makes; read only."""
    folder = tmp_path_factory.mktemp("vision")
    check.main(folder)
    return folder


@pytest.fixture
def bench(data: Path, tmp_path: Path) -> VisionBench:
    return VisionBench(data, tmp_path)


@pytest.fixture(params=[name for name in FAMILIES if name != "qwen2_vl" or find_spec("torchvision")])
def family(request: pytest.FixtureRequest, data: Path, tmp_path: Path) -> VisionBench:
    """A bench with another family of models."""
    folder = tmp_path / "data"
    shutil.copytree(data, folder, ignore=shutil.ignore_patterns("base_model"))
    make_tiny_vision_model(folder / "base_model", request.param)
    return VisionBench(folder, tmp_path)


# --- learning ------------------------------------------------------------------------------------------------------
@training_test
def test_it_reads_images_that_it_was_not_trained_on_and_the_base_reads_wrong(bench: VisionBench) -> None:
    learnt = json.loads((bench.data / "parameters.json").read_text())
    trained = bench.train(validation=True, evaluation_steps=80, **learnt)
    saved = bench.save(trained)
    expected = [row["messages"][-1]["content"][0]["text"] for row in stored_rows(bench.data, "validation_rows.jsonl")]
    requests = bench.data / "requests.jsonl"

    def right(model: str) -> int:
        answers = [each["answer"] for each in bench.answer(requests, model=model)]
        return sum(answer == truth for answer, truth in zip(answers, expected, strict=True))

    before, after = right(str(bench.data / "base_model")), right(saved["model"])
    print(f"images read right: base {before} of 8, trained {after} of 8")
    assert before == 0
    assert after >= 7
    assert sorted(curve(trained, "eval_loss")) == [80, 160]
    samples = [json.loads(line) for line in (trained / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [80, 80, 160, 160]
    assert samples[0]["prompt"].startswith("What colour is the ")


@training_test
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_a_resumed_train_ends_as_an_uninterrupted_one(bench: VisionBench, tuning: str) -> None:
    given: dict[str, Any] = {"tuning": tuning, "max_steps": 8, "batch_size": 4, "checkpoint_steps": 3}
    given |= {"learning_rate": 3e-3, "lora_dropout": 0.2 if tuning == "lora" else 0.0, "keep_checkpoints": 9}
    whole = bench.train(**given)
    again = bench.folder()
    shutil.copytree(whole / "checkpoints" / "checkpoint-3", again / "checkpoints" / "checkpoint-3")
    bench.train(folder=again, resume=again / "checkpoints" / "checkpoint-3", **given)
    for name in ("loss", "learning_rate", "grad_norm", "token_accuracy", "tokens"):
        expected = {step: values for step, values in curve(whole, name).items() if step > 3}
        assert curve(again, name) == expected, name
    expected_weights, found = weights(whole), weights(again)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected_weights.items())


@training_test
def test_a_cancelled_train_leaves_a_checkpoint_to_go_on_from(bench: VisionBench) -> None:
    given: dict[str, Any] = {"max_steps": 6, "batch_size": 4, "checkpoint_steps": 100}
    whole = bench.train(**given)
    job = bench.job(**given)
    told = job.progress

    def cancel_at_two(step: int, total: int) -> None:
        job.cancelled = job.cancelled or step == 2
        told(step, total)

    job.progress = cancel_at_two  # type: ignore[method-assign]
    with pytest.raises(contract.Cancelled):
        training.main(job)
    (newest,) = contract.complete_checkpoints(job.checkpoints)
    assert newest.name in ("checkpoint-2", "checkpoint-3")
    bench.train(folder=job.folder, resume=newest, **given)
    assert {step: values[-1] for step, values in curve(job.folder, "loss").items()} == {
        step: values[0] for step, values in curve(whole, "loss").items()
    }


def weights(folder: Path) -> dict[str, torch.Tensor]:
    (file,) = (folder / "output").glob("*.safetensors")
    return dict(load_file(file))


# --- what is trained on, what is trained ---------------------------------------------------------------------------


def _talk(*turns: tuple[str, str]) -> list[dict[str, Any]]:
    """Messages; `<image>` in a text is the place of an image."""

    def parts(text: str) -> list[dict[str, str]]:
        pieces = text.split("<image>")
        found: list[dict[str, str]] = [{"type": "text", "text": pieces[0]}] if pieces[0] else []
        for piece in pieces[1:]:
            found += [{"type": "image"}, {"type": "text", "text": piece}]
        return found

    return [{"role": role, "content": parts(text)} for role, text in turns]


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "picture.png"
    Image.new("RGB", (50, 40), (10, 200, 30)).save(path)
    return str(path)


def trained_text(renderer: vision_rows.Renderer, messages: list[dict[str, Any]], files: list[str]) -> str:
    labels = renderer.render(renderer.conversation(messages, files)).labels
    return str(renderer.processor.tokenizer.decode([label for label in labels if label != IGNORED]))


def test_the_loss_is_taken_on_all_answers_and_nothing_else(data: Path, picture: str) -> None:
    renderer, added = vision_rows.training_renderer(str(data / "base_model"))
    assert added == []
    one = [("user", "<image>What colour?"), ("assistant", "red"), ("user", "And now?"), ("assistant", "blue")]
    assert trained_text(renderer, _talk(*one), [picture]) == "red<|im_end|>blue<|im_end|>"
    # An image in a later turn: what stands before it is counted with its own image.
    two = [("user", "<image>What colour?"), ("assistant", "red"), ("user", "<image>And now?"), ("assistant", "blue")]
    assert trained_text(renderer, _talk(*two), [picture, picture]) == "red<|im_end|>blue<|im_end|>"
    rendered = renderer.render(renderer.conversation(_talk(*two), [picture, picture]))
    assert rendered.input_ids == ids_of(renderer, renderer.conversation(_talk(*two), [picture, picture]))
    assert rendered.prompt_length == len(
        renderer.encode([renderer.conversation(_talk(*two[:3]), [picture, picture])], prompt=True)["input_ids"][0]
    )


def test_a_template_without_an_end_token_gets_one_after_each_answer(data: Path, picture: str, tmp_path: Path) -> None:
    shutil.copytree(data / "base_model", tmp_path / "model")
    template = check.TEMPLATE.replace("{{ '<|im_end|>\n' }}", "{{ '\n' }}")
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    renderer, added = vision_rows.training_renderer(str(tmp_path / "model"))
    assert len(added) == 1
    assert "'<|im_end|>' is added" in added[0]
    talk = _talk(("user", "<image>What colour?"), ("assistant", "red"))
    assert trained_text(renderer, talk, [picture]) == "red<|im_end|>"


def test_a_template_that_rewrites_earlier_turns_is_told_and_not_trained_on(data: Path, picture: str) -> None:
    renderer, _ = vision_rows.training_renderer(str(data / "base_model"))
    renderer.processor.chat_template = check.TEMPLATE.replace(
        "message['role'] + '", "message['role'] ~ loop.length + '"
    )
    talk = _talk(("user", "<image>What?"), ("assistant", "red"), ("user", "And?"), ("assistant", "blue"))
    with pytest.raises(ValueError, match="rewrites the turns before message 2"):
        renderer.render(renderer.conversation(talk, [picture]))


def test_a_batch_holds_images_and_labels_of_its_rows(bench: VisionBench) -> None:
    trainer = bench.build(batch_size=3)
    rows = [trainer.train_dataset[place] for place in (0, 1, 2)]
    batch = trainer.data_collator(rows)
    assert batch["pixel_values"].shape[0] == 3
    for place, row in enumerate(rows):
        trained = batch["labels"][place][batch["labels"][place] != IGNORED]
        answer = json.loads(row["messages"])[-1]["content"][0]["text"]
        assert trainer.processing_class.tokenizer.decode(trained) == answer + "<|im_end|>"
    rows[0] = {**rows[0], "labels": [5] * len(rows[0]["labels"])}
    with pytest.raises(RuntimeError, match="has changed"):
        trainer.data_collator(rows)


def test_the_tokens_of_an_image_count_towards_the_length(bench: VisionBench) -> None:
    trainer = bench.build()
    longest = max(trainer.lengths)
    text = max(len(trainer.processing_class.tokenizer(row["messages"])["input_ids"]) for row in trainer.train_dataset)
    assert 0 < longest - 6 < text  # 4 tokens of the image, one before and one after
    report = json.loads((trainer.job.folder / "rows.json").read_text())["train"]
    assert report["longest"] == longest
    first = trainer.lengths[0]
    with pytest.raises(contract.Refused, match=rf"line 1: {first} tokens, max_seq_length is {first - 6}"):
        bench.build(max_seq_length=first - 6, over_length="error")


@training_test
def test_another_family_trains_merges_and_answers_the_same_merged_or_not(family: VisionBench) -> None:
    before = load_file(family.data / "base_model" / "model.safetensors")
    trained = family.train(learning_rate=1e-2, max_seq_length=4096, **FEW)
    names = load_file(trained / "output" / "adapter_model.safetensors").keys()
    assert names
    assert not [name for name in names if "vision" in name or "visual" in name or "projector" in name]
    saved = family.save(trained)
    assert saved["verification"]["merged_to_reference"] <= saved["verification"]["tolerance"]
    assert saved["verification"]["reference_to_base"] > 10 * saved["verification"]["tolerance"]
    apart = family.answer(family.data / "requests.jsonl", adapter=trained / "output")
    merged = family.answer(family.data / "requests.jsonl", model=saved["model"])
    assert apart == merged
    untouched = load_file(family.data / "base_model" / "model.safetensors")
    assert all(torch.equal(before[name], tensor) for name, tensor in untouched.items())


@training_test
def test_weights_that_are_not_the_trained_ones_are_refused(bench: VisionBench, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = bench.train(tuning="lora", learning_rate=1e-2, **FEW)
    merge = vision_models.load_with_adapter

    def damaged(base: str, adapter: str | None, dtype: str) -> Any:
        if "output" in base:  # the saved model is loaded to be verified
            file = Path(base) / "model.safetensors"
            tensors = load_file(file)
            name = next(name for name in tensors if "vision" in name and "patch_embedding.weight" in name)
            tensors[name] = -tensors[name]
            save_file(tensors, file, metadata={"format": "pt"})
        return merge(base, adapter, dtype)

    monkeypatch.setattr(vision_models, "load_with_adapter", damaged)
    # What reads the images is damaged: prompts without images would not show it.
    with pytest.raises(contract.Refused, match="not the trained ones"):
        bench.save(trained)


# --- asking --------------------------------------------------------------------------------------------------------


def test_answers_are_the_same_in_any_batch_and_with_images_as_data_urls(bench: VisionBench) -> None:
    base = bench.data / "base_model"
    rows = stored_rows(bench.data, "validation_rows.jsonl")
    asked = [{"messages": row["messages"][:-1], "images": row["images"]} for row in rows]
    asked[1]["messages"] = [*asked[1]["messages"], *_talk(("assistant", "red"), ("user", "Is it?"))]
    one = bench.answer(asked, model=base, batch_size=1)
    assert bench.answer(asked, model=base, batch_size=8) == one
    assert len(one[1]["prompt_token_ids"]) > len(one[0]["prompt_token_ids"])
    url = "data:image/png;base64," + base64.b64encode(Path(rows[0]["images"][0]).read_bytes()).decode()
    question = asked[0]["messages"][0]["content"][1]
    inline = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, question]}]
    assert bench.answer([{"messages": inline}], model=base) == one[:1]
    assert bench.answer([{"messages": [{"role": "user", "content": "hello"}]}], model=base)[0]["tokens"] > 0


def test_the_likelihood_of_a_reference_is_that_of_its_tokens_after_the_prompt(bench: VisionBench) -> None:
    base = bench.data / "base_model"
    (row,) = stored_rows(bench.data, "validation_rows.jsonl")[:1]
    asked = {"messages": row["messages"][:-1], "images": row["images"], "reference": "red"}
    (found,) = bench.answer([asked], model=base)
    renderer = vision_rows.load_renderer(str(base))
    model = vision_models.load_with_adapter(str(base), None, "float32")
    tokens = [*renderer.processor.tokenizer("red")["input_ids"], renderer.processor.tokenizer.eos_token_id]
    # One token after the other, each after a prompt that ends with those before it.
    talk = images.conversation(asked["messages"], row["images"])
    inputs = dict(renderer.encode([talk], prompt=True))
    expected = 0.0
    for token in tokens:
        with torch.inference_mode():
            expected += float(model(**inputs).logits[0, -1].log_softmax(0)[token])
        more = {"input_ids": token, "attention_mask": 1, "token_type_ids": 0}
        inputs |= {name: torch.cat([inputs[name], torch.tensor([[value]])], 1) for name, value in more.items()}
    assert found["reference_tokens"] == len(tokens)
    assert found["reference_logprob"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("content", "files", "said"),
    [
        ([{"type": "image"}], [], "more places for images"),
        ([{"type": "text", "text": "a"}], ["PICTURE"], "no place for 1 of 1"),
        ([{"type": "image_url", "image_url": {"url": "http://127.0.0.1/a.png"}}], [], "is a data URL"),
        ([{"type": "image_url", "image_url": {"url": "/etc/passwd"}}], [], "is a data URL"),
        ([{"type": "image"}], ["https://example.org/a.png"], "fetches nothing"),
        ([{"type": "image"}], ["/nowhere.png"], "cannot open the image"),
        ([{"type": "audio"}], [], "type 'audio'"),
    ],
)
def test_what_is_no_image_of_ours_is_refused(content: Any, files: list[str], said: str, picture: str) -> None:
    with pytest.raises(contract.Refused, match=said):
        images.conversation(
            [{"role": "user", "content": content}], [picture if name == "PICTURE" else name for name in files]
        )


def test_images_are_turned_upright_and_shrunk_in_their_aspect_ratio(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned by a quarter
    Image.new("RGBA", (40, 20), (1, 2, 3, 255)).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    opened = images.open_image(str(tmp_path / "turned.jpg"))
    assert (opened.size, opened.mode) == ((20, 40), "RGB")
    small = images.shrunk(Image.new("RGB", (400, 100)), 100 * 100)
    assert small.size == (200, 50)
    assert images.shrunk(small, 100 * 100) is small
    again = Image.open(BytesIO(base64.b64decode(images.data_url(small).partition(",")[2])))
    assert again.size == (200, 50)


def test_a_processor_that_needs_torchvision_is_refused_with_the_way_out(data: Path, tmp_path: Path) -> None:
    if find_spec("torchvision"):
        pytest.skip("torchvision is here")
    shutil.copytree(data / "base_model", tmp_path / "model")
    file = tmp_path / "model" / "processor_config.json"
    config = json.loads(file.read_text())
    kinds = {"processor_class": "Qwen2VLProcessor"}
    config |= kinds | {"video_processor": {"video_processor_type": "Qwen2VLVideoProcessor"}}
    config["image_processor"] = {"image_processor_type": "Qwen2VLImageProcessor"}
    file.write_text(json.dumps(config))
    with pytest.raises(contract.Refused, match=r"need torchvision.*pip install"):
        vision_models.load_processor(str(tmp_path / "model"))


def test_a_model_without_images_is_refused(tiny_model: Path) -> None:
    with pytest.raises(contract.Refused, match="no vision-language model"):
        vision_models.load_processor(str(tiny_model))


# --- every parameter reaches what it is for ------------------------------------------------------------------------

# What it does with the rest is the business of the trainer that all methods share (tests/methods/test_sft_training.py).
ARGUMENTS: dict[str, tuple[str, Any, Any]] = {
    "max_grad_norm": ("max_grad_norm", 0.7, 0.7),
    "epochs": ("num_train_epochs", 3.5, 3.5),
    "max_steps": ("max_steps", 5, 5),
    "batch_size": ("per_device_train_batch_size", 3, 3),
    "grad_accum_steps": ("gradient_accumulation_steps", 3, 3),
    "learning_rate": ("learning_rate", 3e-4, 3e-4),
    "lr_scheduler": ("lr_scheduler_type", "polynomial", "polynomial"),
    "weight_decay": ("weight_decay", 0.3, 0.3),
    "optimizer": ("optim", "adafactor", "adafactor"),
    "checkpoint_steps": ("save_steps", 7, 7),
    "logging_steps": ("logging_steps", 3, 3),
    "gradient_checkpointing": ("gradient_checkpointing", True, True),
    "seed": ("seed", 5, 5),
}
LORA: dict[str, Any] = {"lora_rank": 3, "lora_alpha": 5, "lora_dropout": 0.4}
LENGTHS = {"max_seq_length": 44, "max_input_length": 34, "max_content_length": 16}


def _trained(model: Any) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def _lora_field(bench: VisionBench, field: str) -> None:
    config = bench.build(**{field: LORA[field]}).model.peft_config["default"]
    assert getattr(config, {"lora_rank": "r"}.get(field, field)) == LORA[field]


def _lengths(bench: VisionBench, field: str) -> None:
    rows = _longer_rows(bench)
    assert len(rows.build(**{field: LENGTHS[field]}).train_dataset) == 4
    assert len(rows.build().train_dataset) == 8


def _longer_rows(bench: VisionBench) -> VisionBench:
    """The first 8 rows; every other one has a longer question and a longer answer."""
    folder = bench.root / "longer"
    if not folder.exists():
        shutil.copytree(bench.data, folder)
        rows = [json.loads(line) for line in (folder / "train_rows.jsonl").read_text().splitlines()[:8]]
        for row in rows[::2]:
            row["messages"][0]["content"][1]["text"] += " Please tell me."
            row["messages"][1]["content"][0]["text"] += " That is all."
        (folder / "train_rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return VisionBench(folder, folder / "work")


def _tuning(bench: VisionBench, _: str) -> None:
    assert all("lora_" in name for name in _trained(bench.build(tuning="lora").model))
    assert not any("lora_" in name for name in _trained(bench.build(tuning="full").model))


def _load_in_4bit(bench: VisionBench, _: str) -> None:
    assert "Linear4bit" in {type(part).__name__ for part in bench.build(load_in_4bit=True).model.modules()}


def _lora_targets(bench: VisionBench, _: str) -> None:
    adapted = {
        name.split(".lora_A")[0]
        for name, _ in bench.build(lora_targets="q_proj,v_proj").model.named_parameters()
        if "lora_A" in name
    }
    assert {name.split(".")[-1] for name in adapted} == {"q_proj", "v_proj"}
    assert all("language_model" in name for name in adapted)  # the vision part has modules of the same names
    with pytest.raises(contract.Refused, match="no modules of this language model"):
        bench.build(lora_targets="query")


def _freeze_vision(bench: VisionBench, _: str) -> None:
    for tuning in ("full", "lora"):
        frozen, free = (_trained(bench.build(tuning=tuning, freeze_vision=each).model) for each in (True, False))
        assert frozen < free
        assert any("vision_tower" in name for name in free)
        assert not any("vision_tower" in name or "projector" in name for name in frozen)
    assert any("embed_tokens" in name for name in _trained(bench.build(tuning="full").model))


def _image_pixels(bench: VisionBench, field: str) -> None:
    """Idefics 3 cuts an image into tiles; fewer pixels make fewer tokens, in training and afterwards."""
    with pytest.raises(contract.Refused, match=r"one size \(height 32, width 32\)"):
        bench.build(**{field: 4096})
    make_tiny_vision_model(bench.root / "tiles" / "base_model", "idefics3")
    shutil.copytree(bench.data, bench.root / "tiles", dirs_exist_ok=True, ignore=shutil.ignore_patterns("base_model"))
    tiles = VisionBench(bench.root / "tiles", bench.root / "work")
    if field == "image_min_pixels":
        with pytest.raises(contract.Refused, match="no smallest size"):
            tiles.build(image_min_pixels=4096)
        with pytest.raises(contract.Refused, match="is more than image_max_pixels"):
            tiles.build(image_min_pixels=4096, image_max_pixels=1024)
        return
    assert max(tiles.build(image_max_pixels=64 * 64).lengths) < min(tiles.build().lengths)
    trained = tiles.train(image_max_pixels=64 * 64, tuning="full", **FEW)
    asked = tiles.data / "requests.jsonl"
    small, large = (tiles.answer(asked, model=each)[0] for each in (trained / "output", tiles.data / "base_model"))
    assert len(small["prompt_token_ids"]) < len(large["prompt_token_ids"])


def _keep_checkpoints(bench: VisionBench, _: str) -> None:
    folder = bench.train(max_steps=4, checkpoint_steps=1, keep_checkpoints=3, batch_size=2)
    kept = [path.name for path in contract.complete_checkpoints(folder / "checkpoints")]
    assert kept == ["checkpoint-2", "checkpoint-3", "checkpoint-4"]


def _group_by_length(bench: VisionBench, _: str) -> None:
    def together(order: list[int], long: list[bool]) -> bool:
        return all(len({long[row] for row in order[start : start + 2]}) == 1 for start in range(0, 8, 2))

    rows = _longer_rows(bench)
    grouped, shuffled = (rows.build(group_by_length=each, batch_size=2) for each in (True, False))
    assert together(list(grouped._get_train_sampler()), [length > 55 for length in grouped.lengths])
    assert not together(list(shuffled._get_train_sampler()), [length > 55 for length in shuffled.lengths])


def _schedule(bench: VisionBench, field: str) -> None:
    given = {"warmup_steps": 4, "warmup_ratio": 0.5, "lr_decay_ratio": 0.5}[field]
    trainer = bench.build(**{"learning_rate": 1e-3, "warmup_ratio": 0.0, field: given})
    trainer.create_optimizer()
    trainer.create_scheduler(20)
    rates = []
    for _ in range(20):
        rates.append(trainer.lr_scheduler.get_last_lr()[0])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    if field == "lr_decay_ratio":
        assert rates[-1] == pytest.approx(0.5e-3, rel=0.02)
    else:
        assert rates.index(max(rates)) == {"warmup_steps": 4, "warmup_ratio": 10}[field]


def _validation(bench: VisionBench, _: str) -> None:
    folder = bench.train(validation=True, evaluation_steps=1, num_generations=3, max_new_tokens=2, **FEW)
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert sorted(curve(folder, "eval_loss")) == [1, 2]
    assert [sample["step"] for sample in samples] == [1, 1, 1, 2, 2, 2]
    tokenizer = vision_models.load_processor(str(bench.data / "base_model"))[0].tokenizer
    assert all(len(tokenizer(sample["answer"])["input_ids"]) <= 2 for sample in samples)


def _over_length(bench: VisionBench, _: str) -> None:
    with pytest.raises(contract.Refused, match="max_seq_length is 34"):
        bench.build(max_seq_length=34, over_length="error")


def _dtype(bench: VisionBench, _: str) -> None:
    for name in ("float32", "bfloat16"):
        assert next(bench.build(dtype=name, tuning="full").model.parameters()).dtype == getattr(torch, name)


KEPT: dict[str, Any] = {"batch_size": 2, "num_generations": 1, "max_new_tokens": 2}
EFFECTS: dict[str, Callable[[VisionBench, str], None]] = {
    **dict.fromkeys(LORA, _lora_field),
    **dict.fromkeys(LENGTHS, _lengths),
    **dict.fromkeys(("warmup_steps", "warmup_ratio", "lr_decay_ratio"), _schedule),
    **dict.fromkeys(("evaluation_steps", "num_generations", "max_new_tokens"), _validation),
    **dict.fromkeys(("image_max_pixels", "image_min_pixels"), _image_pixels),
    "tuning": _tuning,
    "load_in_4bit": _load_in_4bit,
    "lora_targets": _lora_targets,
    "freeze_vision": _freeze_vision,
    "over_length": _over_length,
    "max_samples": lambda bench, _: _equal(len(bench.build(max_samples=5).train_dataset), 5),
    "keep_checkpoints": _keep_checkpoints,
    "keep_best": lambda bench, _: effects.keep_best(bench, **KEPT),
    "early_stopping_patience": lambda bench, _: effects.early_stopping(bench, **KEPT),
    "early_stopping_threshold": lambda bench, _: effects.early_stopping(bench, **KEPT),
    "stop_after_nonfinite": lambda bench, _: effects.stop_after_nonfinite(bench, **KEPT),
    "group_by_length": _group_by_length,
    "dtype": _dtype,
}


def _equal(found: object, expected: object) -> None:
    assert found == expected


@training_test
@pytest.mark.parametrize("field", [*find_method("vision-language").hyperparameter_names, *OWN, "max_new_tokens"])
def test_every_parameter_reaches_what_it_is_for(bench: VisionBench, field: str) -> None:
    if field in ARGUMENTS:
        name, value, expected = ARGUMENTS[field]
        assert getattr(bench.build(**{field: value}).args, name) == expected
    else:
        EFFECTS[field](bench, field)
