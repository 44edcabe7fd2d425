"""Alarms: a scalar out of its bounds warns once, or ends the run on every rank."""

from types import SimpleNamespace

import pytest
import ranks
import torch
from toys import TOTAL
from trainee import Log, train

from halfseen import loop, recipes
from halfseen.config import Alarm, ConfigError
from halfseen.config import Monitor as Options
from halfseen.distributed import World
from halfseen.monitor import Monitor
from halfseen.pretrain.config import Pretrain

WORLD = SimpleNamespace(rank=0, world=1, local_rank=0, device=torch.device("cpu"), main=True)


def watch(folder, alarm, values):
    """Whether each flush asks for a stop; one value per 10 of 100 images."""
    monitor = Monitor(folder, Options(tensorboard=False, alarms=[alarm]), total=100, start=0, world=WORLD)
    answers = []
    for position, value in zip(range(10, 101, 10), values):
        monitor.step(position, {"dead_codes": torch.tensor(value)}, images=10, waited=0.0)
        answers.append(bool(monitor.flush(position)))
    monitor.close()
    return answers


def test_a_warning_comes_once_and_names_scalar_and_bound(tmp_path, capsys):
    assert watch(tmp_path, Alarm("dead_codes", above=0.5), [0.1, 0.6, 0.7]) == [False] * 3
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("alarm")]
    assert lines == ["alarm     dead_codes = 0.6 is above 0.5 at 20 images (monitor.alarms)"]


def test_a_stop_is_asked_for_below_and_above_and_not_before_its_time(tmp_path):
    low = Alarm("dead_codes", below=0.3, above=0.8, stop=True, after="25%")
    assert watch(tmp_path, low, [0.1, 0.9, 0.5, 0.2, 0.9]) == [False, False, False, True, True]


def test_a_scalar_that_is_not_there_alarms_nobody(tmp_path):
    assert watch(tmp_path, Alarm("other", below=1.0, stop=True), [0.1, 0.2]) == [False, False]


class Strict(Log):
    def flush(self, position):
        return self.file is not None and position >= 4 * TOTAL  # only rank 0 knows


def stopped(world, folder):
    with pytest.raises(loop.Alarmed, match=f"image {4 * TOTAL}"):
        train(folder, world, 8 * TOTAL, monitor=Strict(folder / "losses.jsonl" if world.main else None))
    return sorted(path.name for path in (folder / "checkpoints").glob("img_*"))


def test_an_alarm_ends_the_run(tmp_path):
    assert stopped(World(), tmp_path) == [f"img_{3 * TOTAL:012d}"]


def test_an_alarm_ends_the_run_on_every_rank(tmp_path):
    assert ranks.run(stopped, 2, tmp_path)[0] == [f"img_{3 * TOTAL:012d}"]


def test_alarms_are_written_in_recipes_and_checked():
    given = "monitor.alarms=[{scalar: feature_rank, below: 2, after: 10%, stop: true}]"
    config = recipes.load(Pretrain, None, [given])
    assert config.monitor.alarms == [Alarm("feature_rank", below=2.0, after="10%", stop=True)]
    for wrong in ("[{scalar: loss}]", "[{scalar: loss, above: 1, after: soon}]"):
        with pytest.raises(ConfigError, match=r"monitor\.alarms\[0\]"):
            recipes.load(Pretrain, None, [f"monitor.alarms={wrong}"])
