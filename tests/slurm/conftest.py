"""A real Slurm of four virtual nodes for the drills, one for the session."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

CLUSTER = Path(__file__).with_name("cluster")
NODES = 4

sys.path.append(str(Path(__file__).parent))


def missing():
    """Why there can be no cluster here, empty if there can."""
    if sys.platform != "linux":
        return "Slurm needs Linux"
    found = os.environ["PATH"] + os.pathsep + "/usr/sbin:/usr/local/sbin:/sbin"
    absent = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if not shutil.which(name, path=found)]
    if absent:
        return f"no {', '.join(absent)} on this machine; as root: tests/slurm/cluster install"
    if os.getuid():
        return "virtual nodes of their own need root (unshare, veth)"
    return ""


@pytest.fixture(scope="session")
def cluster():
    """Starts it, puts its variables into the environment, stops it. Named node1..node4, 8 claimed CPUs each."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = tempfile.mkdtemp(prefix="halfseen-slurm-")  # not pytest's: munge wants folders that all may enter
    settings = {
        "LOCAL_SLURM_DIR": folder,
        "LOCAL_SLURM_CPUS": "8",
        "LOCAL_SLURM_NODE_TIMEOUT": "10",
        "LOCAL_SLURM_KILLWAIT": "20",
        "LOCAL_SLURM_GRACE": "60",
        "LOCAL_SLURM_REQUEUE": "5",
    }
    before = dict(os.environ)
    os.environ |= settings | {"OMP_NUM_THREADS": "1"}
    started = subprocess.run(["bash", CLUSTER, "start", str(NODES)], capture_output=True, text=True, check=False)
    # Stops it even if this process is killed, as pytest-xdist does with its workers on Ctrl-C.
    watch = f"tail --pid={os.getpid()} -f /dev/null; exec bash '{CLUSTER}' stop"
    guard = subprocess.Popen(["bash", "-c", watch], start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        if started.returncode:
            pytest.fail(f"the cluster did not start:\n{started.stderr}")
        if "MODE=plain" in Path(folder, ".local-slurm").read_text():
            pytest.skip("this machine gives no namespaces, so nodes cannot be told apart or lost")
        os.environ |= {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": f"{folder}/bin{os.pathsep}{os.environ['PATH']}"}
        yield Path(folder)
    finally:
        os.killpg(guard.pid, signal.SIGTERM)
        guard.wait()
        subprocess.run(["bash", CLUSTER, "stop"], check=False)
        os.environ.clear()
        os.environ.update(before)
