"""The monitor: nothing touches the host between flushes, and a resume leaves no trace of what it undoes."""

import json
import math
import os
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from halfseen import monitor as module
from halfseen.config import ConfigError
from halfseen.config import Monitor as Options
from halfseen.monitor import Monitor, clock_time, keep_rows, peak_tflops

WORLD = SimpleNamespace(rank=0, world=1, local_rank=0, device=torch.device("cpu"), main=True)
OTHER = SimpleNamespace(rank=1, world=2, local_rank=1, device=torch.device("cpu"), main=False)


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(module.time, "perf_counter", lambda: now.seconds)
    return now


def create(folder, start=0, world=WORLD, total=1000, flops=0.0, **options):
    return Monitor(folder, Options(**options), total=total, start=start, world=world, flops_per_image=flops)


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def run(folder, first, last, start=0, mark=0.0):
    """Steps of 10 images, a flush every 20; the loss is the position plus a mark of the attempt."""
    monitor = create(folder, start)
    for position in range(first, last + 1, 10):
        monitor.step(position, {"loss": torch.tensor(position + mark), "lr": 0.5}, images=10, waited=0.0)
        if position % 20 == 0:
            monitor.flush(position)
    return monitor


def next_second():
    """TensorBoard orders a run's files by the second they were made in; attempts of a real run are further apart."""
    time.sleep(1 - time.time() % 1)


class Counted(Tensor):
    """A tensor that counts whatever brings its values to the host."""

    transfers: list[str] = []

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if name in ("item", "tolist", "cpu", "numpy", "__float__", "__bool__", "__int__", "__repr__", "to"):
            cls.transfers.append(name)
        return super().__torch_function__(function, types, args, kwargs or {})


def test_between_flushes_nothing_is_transferred_and_a_flush_transfers_once(tmp_path):
    Counted.transfers = []
    monitor = create(tmp_path)
    for step in range(1, 6):
        values = {name: torch.tensor(float(step)).as_subclass(Counted) for name in ("loss", "grad_norm")}
        monitor.step(step * 10, values, images=10, waited=0.0)
    assert Counted.transfers == []
    monitor.flush(50)
    assert [name for name in Counted.transfers if name != "tolist"] == ["cpu"]
    assert rows(tmp_path)[0]["loss"] == 3.0


def test_tensors_are_averaged_and_numbers_are_the_last(tmp_path):
    monitor = create(tmp_path)
    for position, loss, rate in ((10, 1.0, 0.1), (20, 2.0, 0.2), (30, math.nan, 0.3)):
        monitor.step(position, {"loss": torch.tensor(loss), "lr": rate}, images=10, waited=0.0)
    monitor.flush(30)
    row = rows(tmp_path)[0]
    assert (row["loss"], row["lr"], row["nonfinite_steps"], row["position"]) == (1.5, 0.3, 1.0, 30)


def test_values_are_taken_when_given_and_graphs_are_let_go(tmp_path):
    monitor = create(tmp_path)
    buffer = torch.zeros((), requires_grad=True) * 1.0
    monitor.step(10, {"loss": buffer}, images=10, waited=0.0)
    buffer.detach().fill_(7.0)
    assert not monitor.pending[0][1].requires_grad
    monitor.flush(10)
    assert rows(tmp_path)[0]["loss"] == 0.0


def test_a_loss_that_was_never_finite_is_null_in_valid_json(tmp_path):
    monitor = create(tmp_path)
    monitor.step(10, {"loss": torch.tensor(math.inf)}, images=10, waited=0.0)
    monitor.flush(10)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert rows(tmp_path)[0]["loss"] is None


def test_a_resume_drops_rows_beyond_its_position(tmp_path):
    run(tmp_path, 10, 100).close()
    run(tmp_path, 50, 80, start=40, mark=0.5).close()
    assert [(row["position"], row["loss"]) for row in rows(tmp_path)] == [
        (20, 15.0),
        (40, 35.0),
        (60, 55.5),
        (80, 75.5),
    ]


def test_a_resume_purges_tensorboard_beyond_its_position(tmp_path):
    first = run(tmp_path, 10, 100)
    first.picture(100, "late", torch.zeros(3, 4, 4, dtype=torch.uint8))
    first.histogram(100, "late_weights", torch.randn(10))
    first.close()
    next_second()
    second = run(tmp_path, 50, 80, start=40, mark=0.5)
    second.picture(80, "early", torch.zeros(3, 4, 4, dtype=torch.uint8))
    second.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [
        (20, 15.0),
        (40, 35.0),
        (60, 55.5),
        (80, 75.5),
    ]
    assert not events.Images("late")
    assert [event.step for event in events.Images("early")] == [80]
    assert not events.Histograms("late_weights")


def test_a_run_that_goes_back_forgets_what_lay_beyond(tmp_path):
    monitor = run(tmp_path, 10, 70)
    next_second()
    monitor.rewind(40)
    monitor.step(50, {"loss": torch.tensor(7.0)}, images=10, waited=0.0)
    monitor.flush(50)
    monitor.close()
    expected = [(20, 15.0), (40, 35.0), (50, 7.0)]
    assert [(row["position"], row["loss"]) for row in rows(tmp_path)] == expected
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == expected


def test_a_row_cut_short_by_a_crash_is_dropped_and_a_broken_file_is_not_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"position": 10}\n{"position": 20}\n{"posi')
    keep_rows(path, 100)
    assert path.read_text() == '{"position": 10}\n{"position": 20}\n'
    path.write_text('{"position": 10}\nbroken\n{"position": 20}\n')
    with pytest.raises(ConfigError, match="line 2"):
        keep_rows(path, 100)
    assert "broken" in path.read_text()


def test_truncation_happens_in_one_move(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"position": 10}\n{"position": 20}\n')
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("power cut")))
    with pytest.raises(OSError, match="power cut"):
        keep_rows(path, 10)
    assert path.read_text() == '{"position": 10}\n{"position": 20}\n'


def test_a_plain_line_per_flush(tmp_path, clock, capsys):
    monitor = create(tmp_path, total=1000, flops=2e9, peak_tflops=0.001)
    for position in (10, 20, 30):
        scalars = {"loss": torch.tensor(0.25), "lr": 1e-3, "grad_norm": torch.tensor(2.0)}
        monitor.step(position, scalars, images=10, waited=0.5)
        clock.seconds += 10 if position == 10 else 5
    capsys.readouterr()
    monitor.flush(30)
    lines = capsys.readouterr().out.splitlines()
    # 20 images in 20 s (the first step only starts the clock), 1 s of it waiting.
    expected = "   30/1,000 images   3.0%  loss 0.2500  lr 1.00e-03  grad norm 2  1 img/s  data wait 5%  MFU 200.0%"
    assert lines[0].startswith(expected + "  memory ")
    assert lines[0].endswith("GiB  ETA 0:16:10")
    assert len(lines) == 1


def test_time_aside_does_not_count(tmp_path, clock):
    monitor = create(tmp_path)
    monitor.step(10, {"lr": 1.0}, images=10, waited=0.0)
    with monitor.aside():
        clock.seconds += 1000
    clock.seconds += 2
    monitor.step(20, {"lr": 1.0}, images=10, waited=0.0)
    monitor.flush(20)
    assert rows(tmp_path)[0]["images_per_second"] == pytest.approx(5)


class QueuedEvent:
    """A CUDA event of a device that is always three seconds behind the host, until the host waits for it."""

    clock: SimpleNamespace
    done = 0.0
    waits = 0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        self.at = max(self.clock.seconds, QueuedEvent.done)

    def synchronize(self):
        QueuedEvent.waits += 1
        self.clock.seconds = max(self.clock.seconds, self.at)

    def elapsed_time(self, end):
        return (end.at - self.at) * 1e3


def test_steps_still_queued_on_the_device_count_as_training_and_nothing_waits(tmp_path, clock, monkeypatch):
    """The host enters aside while the device still works on steps: aside begins when the device has come so far."""
    monitor = create(tmp_path)
    monitor.world = SimpleNamespace(world=1, device=torch.device("cuda:0"), main=True)
    monkeypatch.setattr(QueuedEvent, "clock", clock, raising=False)
    monkeypatch.setattr(QueuedEvent, "done", clock.seconds + 3)
    monkeypatch.setattr(QueuedEvent, "waits", 0)
    monkeypatch.setattr(module.torch.cuda, "Event", QueuedEvent)
    monkeypatch.setattr(module.torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr(module, "memory_gib", lambda device: 0.0)
    monitor.step(10, {"lr": 1.0}, images=10, waited=0.0)
    monitor.step(20, {"lr": 1.0}, images=12, waited=0.0)
    with monitor.aside():
        clock.seconds += 1003  # three seconds until the queued steps are done, and a thousand of evaluation
    assert QueuedEvent.waits == 0
    clock.seconds += 1
    monitor.flush(20)
    assert rows(tmp_path)[0]["images_per_second"] == pytest.approx(3)


def test_a_flush_within_time_aside_leaves_out_what_came_before_it_and_counts_nothing_twice(tmp_path, clock):
    monitor = create(tmp_path)
    monitor.step(10, {"lr": 1.0}, images=10, waited=0.0)
    clock.seconds += 2
    monitor.step(20, {"lr": 1.0}, images=10, waited=0.0)
    with monitor.aside():
        clock.seconds += 1000
        monitor.flush(20)
        clock.seconds += 500
    clock.seconds += 5
    monitor.step(30, {"lr": 1.0}, images=10, waited=0.0)
    monitor.flush(30)
    assert [row["images_per_second"] for row in rows(tmp_path)] == pytest.approx([5, 2])


def test_a_loader_bound_run_says_so_once_with_the_fix(tmp_path, clock, capsys):
    monitor = create(tmp_path, wait_warning=0.1)
    for position in range(10, 60, 10):
        clock.seconds += 3
        monitor.step(position, {"lr": 1.0}, images=10, waited=0.9)
        monitor.flush(position)
    said = [line for line in capsys.readouterr().out.splitlines() if "loader-bound" in line]
    assert len(said) == 1
    assert "30%" in said[0]
    assert "data.workers" in said[0]


def test_a_run_that_waits_little_says_nothing(tmp_path, clock, capsys):
    monitor = create(tmp_path, wait_warning=0.5)
    for position in (10, 20):
        clock.seconds += 3
        monitor.step(position, {"lr": 1.0}, images=10, waited=0.9)
        monitor.flush(position)
    assert "loader-bound" not in capsys.readouterr().out


def test_a_terminal_gets_a_bar_and_notes_above_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module.sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    monitor = create(tmp_path, total=100)
    monitor.step(50, {"loss": torch.tensor(0.25)}, images=50, waited=0.0)
    monitor.step(100, {"loss": torch.tensor(0.25)}, images=50, waited=0.0)
    monitor.note("evaluated [100]")
    monitor.flush(100)
    monitor.close()
    printed = capsys.readouterr().out
    assert "loss 0.2500" in printed
    assert "100%" in printed
    assert "evaluated [100]" in printed
    assert "100/100 images" not in printed


def test_other_ranks_write_nothing(tmp_path, capsys):
    monitor = create(tmp_path / "run", world=OTHER)
    monitor.step(10, {"loss": torch.tensor(1.0)}, images=10, waited=0.0)
    monitor.flush(10)
    monitor.scalars(10, {"val/top1": 0.5})
    monitor.picture(10, "picture", torch.zeros(3, 4, 4, dtype=torch.uint8))
    monitor.note("hello")
    monitor.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""
    assert monitor.pending == [], "nothing piles up on ranks that never flush"


def test_a_flush_without_a_step_writes_nothing(tmp_path):
    monitor = run(tmp_path, 10, 20)
    monitor.flush(20)
    monitor.close()
    assert [row["position"] for row in rows(tmp_path)] == [20]


def test_closing_writes_what_is_left(tmp_path):
    monitor = create(tmp_path, tensorboard=False)
    monitor.step(10, {"loss": torch.tensor(1.0)}, images=10, waited=0.0)
    monitor.close()
    assert [row["position"] for row in rows(tmp_path)] == [10]
    assert not (tmp_path / "tensorboard").exists()


def test_immediate_scalars_stand_at_their_position_under_their_own_name(tmp_path):
    monitor = create(tmp_path)
    monitor.scalars(30, {"val/top1": 0.5})
    monitor.close()
    assert rows(tmp_path)[0]["val/top1"] == 0.5
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("val/top1")
    assert [(event.step, event.value) for event in events] == [(30, 0.5)]


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989.0),
        ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("Tesla V100-SXM2-16GB", 125.0),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA H20", 148.0),
        ("GeForce GTX 1080", None),
        ("NVIDIA RTX A4000", None),
    ],
)
def test_peaks(name, peak):
    assert peak_tflops(name) == peak


def test_times():
    assert [clock_time(seconds) for seconds in (5, 3723, 90_000)] == ["0:00:05", "1:02:03", "1d 1:00:00"]
