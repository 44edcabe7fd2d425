"""The engine's section of a config: options of every engine, and those of some alone, which the others refuse.

Beside the package halfseen/engines, this is the only file that knows engines by name.
"""

from dataclasses import dataclass
from typing import Literal

from halfseen.config import ConfigError, at_least, between, duration

# Options of some engines alone; under another they must keep their defaults.
OWN = {
    "shard_size": ("fsdp",),
    "reshard": ("fsdp", "fairscale"),
    "gather": ("fsdp",),
    "offload": ("fsdp", "deepspeed"),
    "zero_stage": ("deepspeed",),
    "extra": ("deepspeed",),
    "fairscale": ("fairscale",),
    "recompute_by": ("fairscale",),
}


@dataclass
class Engine:
    """How the student is sharded, run and updated (see halfseen/engines)."""

    name: Literal["auto", "single", "ddp", "fsdp", "deepspeed", "fairscale"] = "auto"  # auto: single or ddp
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # autocast type of the forward; weights stay fp32
    device: Literal["auto", "cpu", "cuda"] = "auto"
    recompute: bool = False  # recompute each block in the backward instead of keeping its activations
    offload_activations: bool = False  # with recompute: each block's input waits in host memory for the backward
    recompute_by: Literal["torch", "fairscale"] = "torch"  # fairscale: its checkpoint_wrapper; no shared weights
    compile: bool = False  # torch.compile each block
    shard_size: int = 0  # fsdp: ranks a shard group spans (HSDP); 0: all of them
    reshard: bool = True  # fsdp: free gathered weights between forward and backward
    gather: Literal["fp32", "bf16"] = "fp32"  # fsdp: type in which blocks' weights travel; bf16: half the traffic
    zero_stage: Literal[0, 1, 2, 3] = 2  # deepspeed: shard nothing, moments, and gradients, and weights
    offload: bool = False  # fsdp, deepspeed: masters and moments in host memory, updated there
    extra: str = ""  # deepspeed: a JSON file with more of its options; those halfseen sets are refused there
    fairscale: Literal["oss", "sharded", "full"] = "oss"  # sharded: moments; and gradients; and weights (CUDA only)
    ema: float = 0.0  # decay of the averaged weights; 0: none
    ema_start: float = 0.0  # their decay at the first image
    ema_ramp: str = "0"  # images (500k, 10M) over which the decay goes from ema_start to ema, linearly; 0: ema at once
    skip_budget: int = 10  # non-finite updates that may be skipped between two checkpoints
    rollback_budget: int = 2  # returns to the last checkpoint before the run stops with a capsule

    def check(self, key: str) -> None:
        """Ranges, and no option of one engine under another that would ignore it."""
        between(f"{key}.ema", self.ema, 0.0, 0.9999999)
        between(f"{key}.ema_start", self.ema_start, 0.0, 0.9999999)
        duration(f"{key}.ema_ramp", self.ema_ramp)
        if not self.ema and (self.ema_start or duration(f"{key}.ema_ramp", self.ema_ramp)):
            reason = f"says how {key}.ema begins, and there is none"
            raise ConfigError(f"{key}.ema_start", self.ema_start, reason, f"set {key}.ema too, e.g. {key}.ema=0.9999")
        for name in ("shard_size", "skip_budget", "rollback_budget"):
            at_least(f"{key}.{name}", getattr(self, name), 0)
        for name, engines in OWN.items():
            value, default = getattr(self, name), type(self).__dataclass_fields__[name].default
            if value != default and self.name not in engines:
                reason = f"is an option of {' and '.join(engines)}, and would be ignored by {self.name}"
                fix = f"use {key}.name={engines[0]}, or {key}.{name}={str(default).lower() or chr(39) * 2}"
                raise ConfigError(f"{key}.{name}", value, reason, fix)
        self._check_recompute(key)
        if self.gather == "bf16" and self.precision != "bf16":
            reason = f"weights in bf16 under {key}.precision={self.precision} would only lose digits"
            raise ConfigError(f"{key}.gather", self.gather, reason, f"use {key}.precision=bf16, or {key}.gather=fp32")

    def _check_recompute(self, key: str) -> None:
        """What recomputation goes with."""
        if self.offload_activations and (self.compile or not self.recompute):
            reason = "is about recomputed blocks, and not tested with compiled ones"
            fix = f"use {key}.recompute=true {key}.compile=false"
            raise ConfigError(f"{key}.offload_activations", True, reason, fix)
        if self.recompute_by != "torch" and (self.compile or not self.recompute):
            reason = "says how blocks are recomputed, and cannot be compiled"
            fix = f"use {key}.recompute=true {key}.compile=false, or {key}.recompute_by=torch"
            raise ConfigError(f"{key}.recompute_by", self.recompute_by, reason, fix)

    def ema_decay(self, position: int) -> float:
        """The averages' decay in the update that starts at a position."""
        ramp = duration("engine.ema_ramp", self.ema_ramp)
        share = min(position / ramp, 1.0) if ramp else 1.0
        return self.ema_start + (self.ema - self.ema_start) * share


def left_behind(name: str) -> tuple[str, ...]:
    """Overrides that give the options of other engines than this one their defaults, for a run that changes to it."""
    plain = Engine()
    others = (option for option, engines in OWN.items() if name not in engines)
    return tuple(f"engine.{option}={str(getattr(plain, option)).lower()}" for option in others)


# What makes of a stored config one that runs on any machine: its engine may not be at hand, or not fit so few devices.
ANYWHERE = ("engine.name=auto", "engine.compile=false", *left_behind("auto"))
