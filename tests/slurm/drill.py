"""What the drills do with a cluster: launch, wait for something, interrupt, compare."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from halfseen.launch import records

RECORDING = Path(__file__).with_name("recording.py")
CLUSTER = Path(__file__).with_name("cluster")
PATIENCE = int(
    os.environ.get("DRILL_PATIENCE", "600")
)  # seconds; the machine may be busy, and a drill that works does not wait for it

BATCH = 16
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


def halfseen(*arguments, code=0, cwd=None, env=None):
    """Run a command of halfseen; its output, stderr at the end."""
    program = [sys.executable, "-m", "halfseen", *map(str, arguments)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=PATIENCE, cwd=cwd, env=env)
    assert done.returncode == code, f"{done.returncode} instead of {code}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def resources(folder, *, nodes=2, tasks=2, pace=0.0, **more):
    """A --launch file whose ranks record their keys to FOLDER/keys.*."""
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "cluster": "slurm",
        "nodes": nodes,
        "tasks_per_node": tasks,
        "python": f"{sys.executable} {RECORDING}",
        "setup": [f"export DRILL_KEYS={folder}/keys", f"export DRILL_PACE={pace}"],
        **more,
    }
    path = folder / "launch.yaml"
    path.write_text(json.dumps(values))
    return path


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
        env=os.environ | {"DRILL_KEYS": f"{folder}-keys", "OMP_NUM_THREADS": "1"},
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


def stepping(run, start):
    """Wait until the run is in its so-many-th start and has taken two steps in it."""
    until(f"start {start} of {run.name}", lambda: starts(run) >= start, run)
    begun = records.story(run).starts[start - 1]["time"]
    until(f"steps in start {start}", lambda: sum(row["time"] > begun for row in rows(run)) >= 2, run)


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
        if environment.get("SLURM_JOB_ID") == job and "SLURM_PROCID" in environment and state != "Z":
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
