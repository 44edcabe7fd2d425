"""Who a process is, whatever launched it, and what ranks agree on."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import ranks
import torch

from halfseen import distributed
from halfseen.config import ConfigError
from halfseen.distributed import Place, World, first_host, place, port_of

SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[007-010]",
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "0",
}


def test_a_plain_process_is_alone():
    assert place({}) is None


def test_torchrun():
    variables = ranks.environment(1, 2, 29511) | {"LOCAL_RANK": "0"}
    assert place(variables) == Place(1, 2, 0, "127.0.0.1", 29511)


def test_slurm_tasks_find_the_first_node_and_one_port():
    found = place(SLURM)
    assert found == Place(5, 8, 1, "gpu007", port_of("slurm 4711.0"))
    assert place(SLURM | {"SLURM_PROCID": "0"}).port == found.port
    assert place(SLURM | {"SLURM_JOB_ID": "4712"}).port != found.port
    assert place(SLURM | {"MASTER_ADDR": "head", "MASTER_PORT": "5000"}) == Place(5, 8, 1, "head", 5000)


def test_a_batch_script_without_srun_is_alone():
    assert place({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "1"}) is None


def test_torchrun_inside_slurm_wins():
    assert place(SLURM | ranks.environment(0, 2, 29511)).world == 2


def test_submitit_on_this_machine():
    variables = {
        "SUBMITIT_LOCAL_GLOBALID": "1",
        "SUBMITIT_LOCAL_LOCALID": "1",
        "SUBMITIT_LOCAL_NTASKS": "2",
        "SUBMITIT_LOCAL_JOB_ID": "88",
    }
    assert place(variables) == Place(1, 2, 1, "127.0.0.1", port_of("submitit 88"))


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node1", "node1"),
        ("gpu[007-012,40],login", "gpu007"),
        ("a,b", "a"),
        ("rack[3]-n", "rack3-n"),
        ("127.0.1.[1-2]", "127.0.1.1"),
        ("n-[12,14]x,y", "n-12x"),
    ],
)
def test_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


@pytest.mark.parametrize(
    ("variables", "key"),
    [
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK"),
        ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, "RANK"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT"),
    ],
)
def test_impossible_places_are_refused(variables, key):
    with pytest.raises(ConfigError) as error:
        place(variables)
    assert error.value.key == key


def test_ports_stay_below_those_the_system_hands_out():
    ports = {port_of(f"slurm {job}.0") for job in range(2000)}
    assert len(ports) > 1800
    assert min(ports) > 1024
    assert max(ports) < 32768


def test_cuda_without_cuda_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_device("auto", 0) == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"engine\.device"):
        distributed.choose_device("cuda", 0)


def test_one_process_needs_no_group():
    world = World()
    tensor = torch.ones(2)
    assert (world.main, world.any(False), world.any(True), world.largest(7)) == (True, False, True, 7)
    assert world.gather_object("x") == ["x"]
    assert torch.equal(world.sum(tensor), tensor)
    assert world.sum(tensor) is not tensor
    world.barrier()
    world.stop()


def agree(world):
    total = world.sum(torch.tensor([1.0, world.rank]))
    return world.main, world.any(world.rank == 2), world.largest(-world.rank), world.gather_object(world.rank), total


def test_three_ranks_agree():
    results = ranks.run(agree, 3)
    assert [result[0] for result in results] == [True, False, False]
    for _, any_rank, largest, gathered, total in results:
        assert any_rank is True
        assert largest == 0
        assert gathered == [0, 1, 2]
        assert total.tolist() == [3.0, 3.0]


def test_a_rank_that_raises_is_reported_with_its_traceback():
    with pytest.raises(AssertionError, match="only rank 1"):
        ranks.run(fails, 2)


def fails(world):
    if world.rank == 1:
        raise ValueError("only rank 1")


def test_torchrun_starts_it(tmp_path):
    """The real launcher, once. Each rank answers in its own file: two ranks' lines on one stream may interleave."""
    script = (
        "import pathlib, sys\n"
        "from halfseen import distributed as d\n"
        "with d.started('cpu') as w:\n"
        "    pathlib.Path(sys.argv[1], str(w.rank)).write_text(f'{w.gather_object(w.rank)} {w.main}')\n"
    )
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
    result = subprocess.run(
        [*launcher, sys.executable, "-c", script, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    answers = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert answers == {"0": "[0, 1] True", "1": "[0, 1] False"}


def gathered(world):
    return world.gather_object(world.rank)


def joined(world, folder):
    """Leave the test's group and meet again through a folder, as a launched job does, and again, as after a requeue."""
    seen = []
    for attempt in ("7.0.0", "7.0.1"):
        world.stop()
        for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
            os.environ.pop(name, None)
        job, step, restart = attempt.split(".")
        os.environ |= {
            "SLURM_PROCID": str(world.rank),
            "SLURM_STEP_NUM_TASKS": str(world.world),
            "SLURM_STEP_NODELIST": "127.0.0.1",
            "SLURM_JOB_ID": job,
            "SLURM_STEP_ID": step,
            "SLURM_RESTART_COUNT": restart,
            distributed.MEETING: str(folder),
        }
        world = distributed.start("cpu")
        seen.append(gathered(world))
        world.barrier()
    world.stop()
    return seen


def test_launched_ranks_meet_on_a_port_the_system_chose(tmp_path):
    assert ranks.run(joined, 2, tmp_path) == [[[0, 1], [0, 1]]] * 2
    assert not list(tmp_path.iterdir())


def test_a_rank_that_hears_nothing_of_rank_0_says_so(tmp_path):
    with pytest.raises(ConfigError, match="did not say its port"):
        distributed.meet(tmp_path / "meeting-1", Place(1, 2, 0, "127.0.0.1", 0), timedelta(seconds=0.2))
