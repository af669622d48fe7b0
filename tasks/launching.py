"""How a training stage is started in several processes: by `accelerate launch`, with settings written for it alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from configs.errors import UserError
from configs.train import TrainConfig
from tasks.environments import packages_of
from tasks.files import write_text

CONFIG_FILE = "accelerate.yaml"
_PACKAGES = {"ddp": ("accelerate",), "fsdp": ("accelerate",), "deepspeed": ("accelerate", "deepspeed")}
# By the kind of distribution; on a CPU as well, where accelerate's own kind is made for MPI alone: the processes find
# out themselves that they have no GPU, and talk by gloo.
_KINDS = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "deepspeed": "DEEPSPEED"}
_FSDP = {
    "fsdp_version": 2,
    "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
    "fsdp_reshard_after_forward": True,
    "fsdp_offload_params": False,
    "fsdp_cpu_ram_efficient_loading": False,
    "fsdp_state_dict_type": "FULL_STATE_DICT",
    "fsdp_activation_checkpointing": False,
}
_DEEPSPEED = {
    "zero_stage": 2,
    "offload_optimizer_device": "none",
    "offload_param_device": "none",
    "zero3_init_flag": False,
}


def require_packages(config: TrainConfig, python: Path) -> None:
    """Refuse a distribution whose packages the environment of the training does not have. Raises UserError."""
    if config.distribution == "none":
        return
    there = packages_of(python)
    missing = [name for name in _PACKAGES[config.distribution] if name not in there]
    if missing:
        raise UserError(
            f"the environment of the training has no {missing[0]}, which {config.distribution} takes",
            file=python,
            field="distribution",
            value=config.distribution,
            mend=f"add {missing[0]} to its environment.yml, or take another distribution",
        )


def launcher(config: TrainConfig, folder: Path, *, on_gpus: bool) -> list[str]:
    """The arguments of Python that start the stage of a job folder in its processes; none where it is one."""
    if config.distribution == "none":
        return []
    file = folder / CONFIG_FILE
    write_text(file, yaml.safe_dump(settings(config, on_gpus=on_gpus), sort_keys=False))
    return ["-m", "accelerate.commands.launch", "--config_file", str(file)]


def settings(config: TrainConfig, *, on_gpus: bool) -> dict[str, Any]:
    """The settings of accelerate for this train on this host."""
    own = {"fsdp": {"fsdp_config": _FSDP}, "deepspeed": {"deepspeed_config": _deepspeed(config)}}
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": _KINDS[config.distribution],
        "num_machines": 1,
        "machine_rank": 0,
        "num_processes": config.processes,
        "main_process_port": 0,  # a free one: two trains may run on one host
        "gpu_ids": "all",  # those that the train holds
        "use_cpu": not on_gpus,
        "mixed_precision": "no",  # weights are loaded in the dtype of the train
        "downcast_bf16": "no",
        "enable_cpu_affinity": False,
        "debug": False,
        "rdzv_backend": "static",
        "same_network": True,
        "main_training_function": "main",
        **own.get(config.distribution, {}),
    }


def _deepspeed(config: TrainConfig) -> dict[str, Any]:
    hyper = config.hyperparameters
    return {
        **_DEEPSPEED,
        "gradient_accumulation_steps": hyper.grad_accum_steps,
        "gradient_clipping": hyper.max_grad_norm,
    }
