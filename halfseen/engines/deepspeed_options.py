"""DeepSpeed's options: the JSON it is given, and what it cannot do. Does not import DeepSpeed."""

import json
from pathlib import Path
from typing import Any

from halfseen import config, engine_config
from halfseen.config import ConfigError

# Sections of DeepSpeed's JSON that would do what halfseen already does, or change what its partitions mean.
OURS = (
    "optimizer",
    "scheduler",
    "fp16",
    "bf16",
    "amp",
    "torch_autocast",
    "communication_data_type",
    "data_types",
    "checkpoint",
    "compile",
    "zero_optimization.offload_optimizer",
    "zero_optimization.offload_param",
    "zero_optimization.zero_hpz_partition_size",
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
    "zero_optimization.mics_shard_size",
    "zero_optimization.zenflow",
)


def refuse(cfg: engine_config.Engine, optim_cfg: config.Optim) -> None:
    """Raise ConfigError for what ZeRO cannot do, and for an unusable file of extra options."""
    derive(cfg)
    if optim_cfg.name in ("lamb", "lars") and cfg.zero_stage:
        raise ConfigError(
            "optim.name",
            optim_cfg.name,
            f"needs each tensor's norm, and ZeRO stage {cfg.zero_stage} flattens tensors into one",
            "use engine.zero_stage=0, optim.name=adamw, or engine.name=fsdp",
        )
    if cfg.offload and not cfg.zero_stage:
        raise ConfigError(
            "engine.offload", True, "stage 0 has no partition to offload", "use engine.zero_stage=1, 2 or 3"
        )
    if cfg.compile and cfg.zero_stage == 3:
        raise ConfigError(
            "engine.compile",
            True,
            "ZeRO stage 3 gathers weights in hooks that are not tested with compiled blocks",
            "use engine.name=fsdp, engine.zero_stage=2 or engine.compile=false",
        )


def derive(cfg: engine_config.Engine) -> dict[str, Any]:
    """DeepSpeed's options: ours, and those of the file engine.extra beside them."""
    zero: dict[str, Any] = {"stage": cfg.zero_stage}
    if cfg.zero_stage == 3:
        zero["memory_efficient_linear"] = False  # it would replace torch's linear for the whole process
    if cfg.offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    ours: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # only its own reports use it
        "gradient_accumulation_steps": 1,  # halfseen names the last micro-batch instead
        "gradient_clipping": 0.0,  # halfseen clips, by the same norm under every engine
        "steps_per_print": None,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
    }
    return merge(ours, _extra(cfg.extra), cfg.extra) if cfg.extra else ours


def _extra(path: str) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ConfigError("engine.extra", path, f"cannot be read: {error}", "name a readable JSON file") from error
    if not isinstance(found, dict):
        raise ConfigError("engine.extra", path, "is not a JSON object", "write {...} around its options")
    return found


def merge(ours: dict[str, Any], theirs: dict[str, Any], path: str, prefix: str = "") -> dict[str, Any]:
    """Both, or ConfigError where theirs says otherwise or speaks of what is halfseen's. "auto" agrees with all."""
    merged = dict(ours)
    for key, value in theirs.items():
        full = f"{prefix}{key}"
        if isinstance(value, dict) and isinstance(ours.get(key), dict):
            merged[key] = merge(ours[key], value, path, f"{full}.")
        elif key in ours and value in ("auto", ours[key]):
            continue
        elif key in ours:
            raise ConfigError(
                "engine.extra", path, f"{full} is {value!r}, but halfseen sets {ours[key]!r}", f"remove {full} from it"
            )
        elif full in OURS:
            raise ConfigError("engine.extra", path, f"{full} is halfseen's to decide", f"remove {full} from it")
        else:
            merged[key] = value
    return merged
