"""The documented spellings of every parameter and of its values, and the one name Tuneline uses.

Latin spellings are compared without case, blanks, `_` and `-`, so `LORA_RANK`, `loraRank`, `LoRA rank` and
`lora-rank` are one, and every canonical name has its camelCase and UPPER_CASE form without being listed here.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Mapping

SPELLINGS: dict[str, tuple[str, ...]] = {
    "name": ("TRAIN_NAME", "训练名称", "名称"),
    "description": ("描述",),
    "method": ("训练类型", "微调方法", "TRAINING_METHOD"),
    "preset": ("应用场景", "预设"),
    "base_model": ("Base Model", "MODEL_PATH", "训练模型", "基础模型"),
    "dataset": ("Dataset", "DATASET_PATH", "数据集", "训练数据集"),
    "prompt_column": ("PromptInputColumn", "输入列"),
    "completion_column": ("PromptOutputColumn", "输出列"),
    "validation_dataset": ("验证数据集", "验证数据"),
    "evaluation_dataset": ("评估数据集",),
    "stop_words": ("停用词", "基于规则的停用词表", "stopWordsPath"),
    "alerts": ("订阅提醒",),
    "hyperparameters": ("训练参数", "超参数", "参数配置"),
    "tuning": ("训练方式", "训练方法"),
    "load_in_4bit": ("LOAD_IN_4BIT",),
    "lora_rank": ("LORA_RANK", "loraRank", "LoRA轶值", "LoRA秩值", "LoRA秩"),
    "lora_alpha": ("loraAlpha",),
    "lora_dropout": ("loraDropout",),
    "max_seq_length": ("MAX_SEQ_LENGTH", "maxSeqLen", "序列长度"),
    "max_input_length": ("MAX_INPUT_LENGTH",),
    "max_content_length": ("MAX_CONTENT_LENGTH",),
    "max_samples": ("MAX_SAMPLES",),
    "num_generations": ("NUM_GENERATIONS",),
    "max_grad_norm": ("MAX_GRAD_NORM",),
    "epochs": ("EPOCHS", "Epoch", "迭代轮次", "训练轮数", "训练轮次"),
    "max_steps": ("MAX_STEPS",),
    "batch_size": ("BATCH_SIZE", "Batchsize", "批处理大小", "数据批量大小", "数据批大小", "数据批"),
    "grad_accum_steps": ("GRAD_ACCUM_STEPS",),
    "learning_rate": ("LEARNING_RATE", "LR", "学习率"),
    "lr_scheduler": ("学习率调整计划",),
    "lr_decay_ratio": ("学习率衰减比率",),
    "warmup_steps": ("WARMUP_STEPS",),
    "warmup_ratio": ("WARMUP_RATIO", "学习率预热步数占比", "热身比例", "预热比例"),
    "weight_decay": ("权重衰减数值", "正则化系数"),
    "optimizer": ("优化器",),
    "checkpoint_steps": ("模型保存步数",),
    "seed": ("随机种子",),
}

# Accepted, so that a documented file runs unmodified, and told to have no effect.
IGNORED: dict[str, str] = {
    "OUTPUT_DIR": "the system decides where a train is written (`tuneline trains show` names the folder)",
    "模型类型": "the training method decides the model's type",
}

_TUNING = {
    "full": ("全量微调", "全量更新", "全参数微调"),
    "lora": ("局部微调", "局部微调(LoRA)"),
}
_SCHEDULERS = dict.fromkeys(("linear", "cosine", "polynomial", "constant", "constant_with_warmup"), ())
VALUE_SPELLINGS: dict[str, Mapping[str, tuple[str, ...]]] = {
    "method": {
        "sft": ("有监督微调", "有监督训练"),
        "pretrain": ("Post-pretrain", "增量预训练", "继续预训练", "预训练"),
    },
    "tuning": _TUNING,
    "optimizer": dict.fromkeys(("adamw", "adamw_8bit", "adafactor", "sgd"), ()),
    "lr_scheduler": _SCHEDULERS,
    "dtype": {"auto": (), "float32": ("fp32",), "bfloat16": ("bf16",), "float16": ("fp16",)},
    "over_length": {"drop": (), "truncate": (), "error": ()},
    "train_on": {"all": (), "last": ()},
    "turns": {"all": (), "last": ()},
    "thinking": {"auto": (), "on": ("yes", "true"), "off": ("no", "false")},
}
_SWITCHES = {"true": ("yes", "on", "是", "开启"), "false": ("no", "off", "否", "关闭")}


def spelling_key(spelling: str) -> str:
    """What two spellings of one name have in common: no case, no blanks, `_` or `-`, no full-width forms."""
    return re.sub(r"[\s_-]+", "", unicodedata.normalize("NFKC", spelling)).casefold()


def canonical_name(spelling: str, known: Mapping[str, str]) -> str | None:
    """The canonical name of a spelling; `known` comes from `spelling_table`."""
    return known.get(spelling_key(spelling))


def spelling_table(names: list[str]) -> dict[str, str]:
    """Spelling key → canonical name, for these canonical names with all their spellings."""
    table: dict[str, str] = {}
    for name in names:
        for spelling in (name, *SPELLINGS.get(name, ())):
            table[spelling_key(spelling)] = name
    return table


def ignored_reason(spelling: str) -> str | None:
    """Why a documented parameter has no effect here, or None if it is not one of those."""
    reasons = {spelling_key(name): reason for name, reason in IGNORED.items()}
    return reasons.get(spelling_key(spelling))


def nearest(wanted: str, candidates: list[str]) -> list[str]:
    """Up to three candidates that look most like what was written, the best first."""
    keys: dict[str, str] = {}
    for candidate in candidates:
        keys.setdefault(spelling_key(candidate), candidate)
    found = difflib.get_close_matches(spelling_key(wanted), list(keys), n=3, cutoff=0.6)
    return [keys[key] for key in found]


def canonical_value(name: str, value: object) -> object:
    """The value with documented spellings replaced: `全量微调` → `full`, `MAX_STEPS: -1` → not set."""
    if name == "max_steps" and value in (-1, "-1"):
        return None
    if not isinstance(value, str):
        return value
    return _from_table(VALUE_SPELLINGS.get(name, {}), value)


def canonical_switch(value: object) -> object:
    """`yes`, `on`, `是`, … as true, their opposites as false; anything else as it is."""
    if not isinstance(value, str):
        return value
    found = _from_table(_SWITCHES, value)
    return {"true": True, "false": False}.get(found, value)


def _from_table(table: Mapping[str, tuple[str, ...]], value: str) -> str:
    wanted = spelling_key(value)
    for canonical, spellings in table.items():
        if wanted in {spelling_key(item) for item in (canonical, *spellings)}:
            return canonical
    return value
