"""What a job asks of the cluster."""

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from halfseen.config import ConfigError, at_least, positive

# Left out, these are what the environment has for sbatch (SBATCH_ACCOUNT, ...), where sites have users put them.
OF_THE_USER = ("partition", "account", "qos", "constraint")

# Fixed by how a launched run stops and continues; setting them by hand would break that.
OURS = {
    "signal": "save_seconds",
    "requeue": "requeue",
    "no-requeue": "requeue",
    "dependency": "a chain, or --after JOB",
    "array": "--sweep FILE",
    "output": "nothing: logs go to RUN/launch",
    "error": "nothing: logs go to RUN/launch",
    "nodes": "nodes and min_nodes",
    "time": "minutes",
}


@dataclass
class Launch:
    """Resources and habits of one cluster. Nothing about a site is built in."""

    stage: ClassVar[str] = "launch"

    cluster: Literal["slurm", "local", "debug"] = "slurm"  # slurm: sbatch; local: processes here; debug: this process
    nodes: int = 1  # machines
    min_nodes: int | None = None  # the job may start, or start again, on as few as these; None: on nodes only
    gpus_per_node: int = 0  # 0: on the CPU; of one type: besides this, sbatch={gres: 'gpu:h100:8'}
    tasks_per_node: int | None = None  # ranks on a node; None: one per GPU, or one
    cpus_per_task: int | None = None  # cores per rank, loader workers included; None: the partition's default
    memory_gib: float | None = None  # memory of a node; None: the partition's default
    gpu_memory_gib: float | None = None  # of one GPU; what cannot fit is refused, what may not is warned of; None: off
    minutes: int = 60  # time limit of one start; a longer run continues in the next one
    save_seconds: int = 120  # the job is asked to save so long before the time limit
    partition: str = ""  # empty: $SBATCH_PARTITION, or the cluster's default
    account: str = ""  # who pays; empty: $SBATCH_ACCOUNT, or your default
    qos: str = ""  # quality of service; empty: $SBATCH_QOS, or your default
    constraint: str = ""  # node features; empty: $SBATCH_CONSTRAINT, or any
    exclusive: bool = False  # no other job on its nodes
    parallel: int = 0  # members of a sweep that run at once; 0: all
    sbatch: dict[str, str] = field(default_factory=dict)  # more options of sbatch by long name; true: a bare flag
    setup: list[str] = field(default_factory=list)  # shell lines before the ranks start: modules, environment
    srun_args: list[str] = field(default_factory=list)  # more arguments of srun: containers, binding
    python: str = ""  # what starts Python on the nodes, e.g. a container's; empty: the Python that submits
    interface: str = ""  # network interface of gloo and nccl, e.g. ib0; empty: they choose
    requeue: Literal["auto", "resubmit", "never"] = "auto"  # auto: requeue, a new job where that is not allowed
    fruitless: int = 3  # starts in a row without a newer checkpoint after which it is not started again
    name: str = ""  # the job's name; empty: that of the run folder
    snapshot: bool = True  # run the code as it is now, however long the job waits
    snapshots: str = ""  # folder of code snapshots, on a shared path; empty: .code beside the run folder

    def check(self, key: str) -> None:
        """Ranges, and what one cluster cannot do."""
        dot = f"{key}." if key else ""
        for name in ("nodes", "minutes", "fruitless"):
            positive(f"{dot}{name}", getattr(self, name))
        for name in ("gpus_per_node", "save_seconds", "parallel"):
            at_least(f"{dot}{name}", getattr(self, name), 0)
        for name in ("min_nodes", "tasks_per_node", "cpus_per_task", "memory_gib", "gpu_memory_gib"):
            if getattr(self, name) is not None:
                positive(f"{dot}{name}", getattr(self, name))
        if self.min_nodes is not None and self.min_nodes > self.nodes:
            raise ConfigError(f"{dot}min_nodes", self.min_nodes, f"is above nodes={self.nodes}", "lower it")
        if self.cluster != "slurm" and self.nodes > 1:
            raise ConfigError(f"{dot}nodes", self.nodes, f"cluster={self.cluster} is this machine", "use nodes=1")
        if self.cluster == "debug" and self.tasks > 1:
            raise ConfigError(f"{dot}tasks_per_node", self.tasks, "debug is one process", "use cluster=local")
        if self.cluster == "slurm" and self.save_seconds >= 60 * self.minutes:
            raise ConfigError(
                f"{dot}save_seconds", self.save_seconds, f"is the whole limit of {self.minutes} minutes", "shorten it"
            )
        for name, value in self.sbatch.items():
            if name.lstrip("-").replace("_", "-") in OURS:
                fix = f"use {OURS[name.lstrip('-').replace('_', '-')]}"
                raise ConfigError(f"{dot}sbatch.{name}", value, "is set by halfseen itself", fix)
            if not re.fullmatch(r"[a-z][a-z0-9_-]*", name):
                raise ConfigError(
                    f"{dot}sbatch.{name}", value, "is no long option", "write it without dashes: mail-type"
                )

    @property
    def tasks(self) -> int:
        """Ranks on one node."""
        return self.tasks_per_node or self.gpus_per_node or 1

    @property
    def worlds(self) -> list[int]:
        """Every number of ranks the job may start with, largest first."""
        return [nodes * self.tasks for nodes in range(self.nodes, (self.min_nodes or self.nodes) - 1, -1)]
