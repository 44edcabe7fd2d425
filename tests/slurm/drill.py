"""What the drills do with a cluster: launch, wait for something, interrupt, compare."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from halfseen.launch import records

RECORDING = Path(__file__).with_name("recording.py")
CLUSTER = Path(__file__).with_name("cluster")
PATIENCE = int(
    os.environ.get("DRILL_PATIENCE", "600")
)  # seconds; the machine may be busy, and a drill that works does not wait for it

BATCH = 16
IMAGES = 640
TINY = [
    "pretrain/demo",
    "model.width=32",
    "model.depth=2",
    "model.heads=2",
    "objective.mae.decoder_width=32",
    "objective.mae.decoder_depth=1",
    "data.image_size=32",
    "data.workers=0",
    f"run.global_batch={BATCH}",
    "run.log_every=1 steps",
    "run.picture_every=0",
]

RUN = [*TINY, f"run.images={IMAGES}", "run.checkpoint_every=160"]
SHORT = [*TINY, "run.images=160", "run.checkpoint_every=80"]

# Two halves of the cluster: where nodes are occupied and lost, and where they are not.
HERE = {"sbatch": {"exclude": "node3,node4"}}
THERE = {"sbatch": {"exclude": "node1,node2"}}


def halfseen(*arguments, code=0, cwd=None, env=None):
    """Run a command of halfseen; its output, stderr at the end."""
    program = [sys.executable, "-m", "halfseen", *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=env)
    assert done.returncode == code, f"{done.returncode} instead of {code}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def resources(folder, *, nodes=2, tasks=2, held=None, **more):
    """A --launch file whose ranks record their keys to FOLDER/keys.*, and wait at position ``held``."""
    folder.mkdir(parents=True, exist_ok=True)
    hold(folder, held)
    values = {
        "cluster": "slurm",
        "nodes": nodes,
        "tasks_per_node": tasks,
        "python": f"{sys.executable} {RECORDING}",
        "setup": [f"export DRILL_KEYS={folder}/keys", f"export DRILL_HOLD={folder}/hold"],
        **more,
    }
    path = folder / "launch.yaml"
    path.write_text(json.dumps(values))
    return path


def hold(folder, position=None):
    """From now on the ranks wait at this position, a multiple of BATCH; None: nowhere."""
    if position is None:
        (folder / "hold").unlink(missing_ok=True)
        return
    (folder / "hold.partial").write_text(str(position))
    os.replace(folder / "hold.partial", folder / "hold")


def torchrun(folder, *arguments, ranks=4, engine="auto"):
    """Start the same run under torchrun, keys recorded."""
    port = ["--standalone", f"--nproc-per-node={ranks}", str(RECORDING), "-m", "halfseen.pretrain"]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            *port,
            *arguments,
            f"engine.name={engine}",
            f"run.folder={folder}",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"DRILL_KEYS": f"{folder}-keys", "DRILL_HOLD": f"{folder}-hold", "OMP_NUM_THREADS": "1"},
    )


def finish(process):
    """Wait for a process that must succeed."""
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output


def until(what, condition, run=None):
    """Wait for a condition; the log of the run's rank 0 if it does not come."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        value = condition()
        if value:
            return value
        if run is not None and (told := records.story(run)).ended and told.ended["verdict"] == "failed":
            break
        time.sleep(0.2)
    log = "".join(path.read_text()[-3000:] for path in run.glob("launch/*/*_0_log.out")) if run else ""
    events = (run / "launch/events.jsonl").read_text() if run else ""
    raise AssertionError(f"{what} did not happen\n{events}\n{log}\n{queue()}")


def queue():
    return subprocess.run(["squeue", "--all", "--states=all"], capture_output=True, text=True, check=False).stdout


def starts(run):
    return len(records.story(run).starts)


def waiting(run, start, position):
    """Until the run is in its so-many-th start and waits at the position at which it is held."""
    until(f"start {start} of {run.name}", lambda: starts(run) >= start, run)
    begun = records.story(run).starts[start - 1]["time"]

    def there():
        return any(row["time"] > begun and row["position"] >= position for row in rows(run))

    until(f"position {position} in start {start}", there, run)


def left(run, start):
    """Until the run's so-many-th start has said how it ended."""
    until(f"the end of start {start}", lambda: len(ends(run)) >= start, run)


def ends(run):
    """How each start ended that could say so."""
    return [event for event in records.events(run) if event["event"] == "ended"]


def ended(run, verdict):
    """Wait until the run's job has ended for good in this way; the event."""
    told = until(f"{run.name} {verdict}", lambda: final(run))
    assert told["verdict"] == verdict, f"{told}\n{(run / 'launch/events.jsonl').read_text()}"
    return told


def final(run):
    told = records.story(run).ended
    return told if told and told["verdict"] in ("complete", "failed", "stopped") else None


def rows(run):
    """What was logged; a row that is being written is left out."""
    path, found = run / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


def losses(run):
    """Position -> loss."""
    return {row["position"]: row["loss"] for row in rows(run) if "loss" in row}


def sequence(folder, name="keys"):
    """What every position held, from the files of all ranks and starts; a repeated step holds the same again."""
    found = {}
    for path in folder.glob(f"{name}.*"):
        for line in path.read_text().splitlines():
            position, key = line.split("\t")
            assert found.setdefault(int(position), key) == key, position
    return found


def processes(job):
    """Host process id -> rank, of what a job has left on any node."""
    found = {}
    for path in Path("/proc").iterdir():
        if not path.name.isdigit():
            continue
        try:
            environment = dict(item.split("=", 1) for item in (path / "environ").read_text().split("\0") if "=" in item)
            state = (path / "stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, UnicodeDecodeError):
            continue
        here = (
            environment.get("SLURM_CONF") == os.environ["SLURM_CONF"]
        )  # another cluster may have a job of that number
        if here and environment.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in environment and state != "Z":
            found[int(path.name)] = int(environment["SLURM_PROCID"])
    return found


def kill_rank(job, rank):
    """kill -9 the Python of one rank."""
    mine = [process for process, its in processes(job).items() if its == rank and python(process)]
    assert mine
    for process in mine:
        os.kill(process, signal.SIGKILL)


def python(process):
    """Whether a process is a rank, not the batch script or srun."""
    command = command_of(process)
    return "submitit.core._submit" in command and not command.startswith("srun")


def command_of(process):
    """A process's command line, empty if it has ended."""
    try:
        return (Path("/proc") / str(process) / "cmdline").read_bytes().replace(b"\0", b" ").decode()
    except OSError:
        return ""


def node(action, name):
    """crash or revive a node."""
    subprocess.run(["bash", CLUSTER, action, name], check=True, capture_output=True)


def occupy(nodes, seconds=1):
    """A job of the partition that preempts, on these nodes alone; its number."""
    command = ["sbatch", "--parsable", "--partition=high", "--exclusive", f"--nodelist={nodes}", "--output=/dev/null"]
    done = subprocess.run([*command, f"--wrap=sleep {seconds}"], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def show(job):
    """What Slurm says of a job."""
    return subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=False).stdout


def same_run(run, expected, keys, rel):
    """The curve and the images of an interrupted run are those of the uninterrupted one."""
    found = losses(run)
    assert sorted(found) == sorted(expected)
    for position, loss in expected.items():
        assert found[position] == pytest.approx(loss, rel=rel), position
    assert sequence(run.parent) == keys


def nothing_left(run):
    """No process of the run's job is alive, or none stays so."""
    job = records.story(run).job
    deadline = time.monotonic() + PATIENCE
    while processes(job) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not [command_of(process) for process in processes(job)]
