"""The loop: what is due when, signals, crashes, data that fails, and numbers that stay wrong."""

import json
import os
import signal

import pytest
import ranks
import torch
from toys import TOTAL, make, stream
from trainee import LONGEST, Log, train

from halfseen import capsule, loop
from halfseen.checkpoint import Checkpoints
from halfseen.config import ConfigError, Optim
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.loop import due
from halfseen.optim import Schedule
from halfseen.signals import Signals

# What autograd says while a replay looks for the culprit, with the whole stack.
pytestmark = pytest.mark.filterwarnings("ignore:Error detected in", "ignore:Anomaly Detection")


def losses(folder):
    rows = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    return dict(rows)  # a step that was run twice: the last one counts


def names(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


# ------------------------------------------------------------------------------------------ when


def test_due_is_when_a_multiple_is_passed_and_at_the_end():
    assert [p for p in range(10, 101, 10) if due(p, 10, 25, 100)] == [30, 50, 80, 100]
    assert [p for p in range(10, 101, 10) if due(p, 10, 25)] == [30, 50, 80, 100]
    assert [p for p in range(10, 101, 10) if due(p, 10, 0, 100)] == []


def test_not_just_before_the_end():
    assert [p for p in range(10, 101, 10) if due(p, 10, 45, 100)] == [50, 100]  # not at 90


def test_it_ends_at_the_last_image_with_a_checkpoint(tmp_path):
    outcome, engine, log = train(tmp_path, World(), 7 * TOTAL)
    assert outcome == loop.Outcome(7 * TOTAL, None)
    assert list(log.losses) == [TOTAL * step for step in range(1, 8)]
    assert log.images == 7 * TOTAL
    assert names(tmp_path) == [f"img_{6 * TOTAL:012d}", f"img_{7 * TOTAL:012d}"]  # two are kept
    manifest = json.loads((tmp_path / "checkpoints" / f"img_{7 * TOTAL:012d}" / "manifest.json").read_text())
    assert manifest["meta"]["aliases"] == engine.aliases
    assert manifest["meta"]["seed"] == 5
    assert set(log.shown) == {"loss", "largest", "grad_norm", "lr", "weight_decay"}


def test_a_finished_run_returns_at_once(tmp_path):
    train(tmp_path, World(), 4 * TOTAL)
    before = names(tmp_path)
    outcome, _, log = train(tmp_path, World(), 4 * TOTAL)
    assert outcome == loop.Outcome(4 * TOTAL, None)
    assert log.losses == {}
    assert names(tmp_path) == before


def test_evaluations_and_pictures_come_when_due(tmp_path):
    engine, log = make(World()), Log()
    seen = []
    loop.train(
        engine=engine,
        batches=lambda position: stream(Batches(TOTAL, 1, TOTAL, 1), 0, position),
        plan=Batches(TOTAL, 1, TOTAL, 1),
        prepare=dict,
        schedule=Schedule(Optim(), 0.01, 0, 5 * TOTAL),
        monitor=log,
        checkpoints=Checkpoints(tmp_path, 1, World()),
        world=World(),
        start=0,
        total=5 * TOTAL,
        checkpoint_every=TOTAL,
        log_every=TOTAL,
        evaluate_every=2 * TOTAL,
        evaluate=lambda position: {"val/top1": position},
        picture_every=3 * TOTAL,
        picture=seen.append,
        meta=lambda position: {"at": position},
    )
    assert [position for position, _ in log.scalar_rows] == [2 * TOTAL, 4 * TOTAL, 5 * TOTAL]
    assert seen == [3 * TOTAL, 5 * TOTAL]
    into = engine.state()
    assert Checkpoints(tmp_path, 1, World()).load(tmp_path / f"img_{5 * TOTAL:012d}", into)["at"] == 5 * TOTAL


# ------------------------------------------------------------------------------------------ stop and go on


def in_parts(world, folder, engine):
    for total in (3, 4, 9):  # the second start runs one step only
        train(folder, world, total * TOTAL, engine=engine, ema=0.5, student={"dropout": 0.3})


def at_once(world, folder, engine):
    train(folder, world, 9 * TOTAL, engine=engine, ema=0.5, student={"dropout": 0.3})


@pytest.mark.parametrize(("engine", "world"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_a_run_in_parts_has_the_bits_of_a_run_at_once(tmp_path, monkeypatch, engine, world):
    for name, function in (("parts", in_parts), ("once", at_once)):
        (tmp_path / name).mkdir()
        if world == 1:
            function(World(), tmp_path / name, engine)
        else:
            ranks.run(function, world, tmp_path / name, engine)
    ours, whole = losses(tmp_path / "parts"), losses(tmp_path / "once")
    assert len(whole) == 9
    assert ours == whole


def stops_together(world, folder):
    """Only rank 1 gets the signal, in the middle of its third step's data."""

    def data(plan, rank, start):
        for count, batch in enumerate(stream(plan, rank, start)):
            if rank == 1 and count == 5:
                os.kill(os.getpid(), signal.SIGUSR2)
            yield batch

    outcome, _, _ = train(folder, world, 9 * TOTAL, data=data)
    return outcome


def test_a_signal_to_one_rank_stops_all_at_the_same_step(tmp_path):
    assert ranks.run(stops_together, 2, tmp_path) == [loop.Outcome(2 * TOTAL, "SIGUSR2")] * 2
    assert names(tmp_path) == [f"img_{2 * TOTAL:012d}"]


def test_signals_are_given_back_and_a_second_interrupt_is_immediate(monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    with Signals() as asked:
        os.kill(os.getpid(), signal.SIGINT)
        assert asked.number == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)  # what torchrun repeats at once is not a second one
        asked.since -= 10
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == before


# ------------------------------------------------------------------------------------------ failing data


def breaks(world, folder):
    def data(plan, rank, start):
        for count, batch in enumerate(stream(plan, rank, start)):
            if rank == 1 and count == 3:
                raise OSError("shard 7 is gone")
            yield batch

    try:
        train(folder, world, 9 * TOTAL, data=data)
    except (OSError, RuntimeError) as error:
        return str(error)


def test_data_that_fails_on_one_rank_stops_all(tmp_path):
    first, second = ranks.run(breaks, 2, tmp_path)
    assert second == "shard 7 is gone"
    assert "another rank" in first


def test_data_that_ends_is_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="ended before"):
        train(tmp_path, World(), 9 * TOTAL, data=lambda plan, rank, start: iter([]))


# ------------------------------------------------------------------------------------------ numbers that are wrong


def poisoned(*positions):
    return lambda plan, rank, start: stream(plan, rank, start, positions)


def test_a_skip_within_the_budget_is_noted_and_the_run_goes_on(tmp_path):
    outcome, _, log = train(tmp_path, World(), 8 * TOTAL, data=poisoned(TOTAL + 3), skip_budget=1)
    assert outcome == loop.Outcome(8 * TOTAL, skipped=1)
    assert len(log.notes) == 2
    assert f"first at {TOTAL:,}" in log.notes[0]
    assert not (tmp_path / "capsules").exists()


def test_the_budget_is_counted_between_checkpoints(tmp_path):
    bad = [TOTAL, 4 * TOTAL, 7 * TOTAL]  # one in each interval of three steps
    outcome, _, log = train(tmp_path, World(), 9 * TOTAL, data=poisoned(*bad), skip_budget=1)
    assert outcome == loop.Outcome(9 * TOTAL, skipped=3)
    assert len(log.notes) == 4
    assert log.notes[-1] == "3 of the run's 9 updates were skipped"


def test_the_count_of_skipped_updates_outlives_a_restart(tmp_path):
    train(tmp_path, World(), 5 * TOTAL, data=poisoned(TOTAL))
    outcome, _, log = train(tmp_path, World(), 9 * TOTAL, data=poisoned(7 * TOTAL))
    assert outcome == loop.Outcome(9 * TOTAL, skipped=2)
    assert log.notes[-1] == "2 of the run's 9 updates were skipped"


def test_a_run_without_a_single_update_never_ends_as_complete(tmp_path):
    """Within the budget everywhere, started twice: still nothing was learned."""
    for _ in range(2):
        with pytest.raises(capsule.NotFinite, match="not one of the run's 7 updates was applied"):
            train(tmp_path, World(), 7 * TOTAL, data=poisoned(*range(0, 7 * TOTAL, TOTAL)), skip_budget=5)
        assert names(tmp_path)[-1] == f"img_{6 * TOTAL:012d}"  # the end was not saved
    assert list((tmp_path / "capsules").iterdir())


def test_a_passing_fault_is_healed_by_going_back(tmp_path):
    """A device that computes wrongly once: the second pass over the same images is the clean curve."""
    passes = []

    def data(plan, rank, start):
        passes.append(start)
        return stream(plan, rank, start, (4 * TOTAL,) if len(passes) == 1 else ())

    (tmp_path / "healed").mkdir()
    (tmp_path / "clean").mkdir()
    _, _, log = train(tmp_path / "healed", World(), 9 * TOTAL, data=data, skip_budget=0)
    train(tmp_path / "clean", World(), 9 * TOTAL)
    assert passes == [0, 3 * TOTAL]
    assert log.rewound == [3 * TOTAL]
    assert any("back from" in note for note in log.notes)
    assert losses(tmp_path / "healed") == losses(tmp_path / "clean")


def goes_back(world, folder, engine):
    """Losses of a run that goes back once over its healed data, under an engine that keeps masters of its own."""
    passes = []

    def data(plan, rank, start):
        passes.append(start)
        return stream(plan, rank, start, (5 * TOTAL,) if len(passes) == 1 else ())

    return train(folder, world, 9 * TOTAL, data=data, engine=engine, skip_budget=0)[2].losses, passes


def test_what_is_gone_back_to_is_what_the_student_computes_with(tmp_path):
    """With the weights of the second step after the checkpoint the first loss after it would be another."""
    (tmp_path / "clean").mkdir()
    clean = train(tmp_path / "clean", World(), 9 * TOTAL)[2].losses
    found, passes = ranks.run(goes_back, 1, tmp_path, "zero2")[0]
    assert passes == [0, 3 * TOTAL]
    assert found == pytest.approx(clean, rel=1e-6)


def stops(world, folder, engine):
    """Goes back once, meets the same numbers, stops; then replays what it met."""
    options = {"engine": engine, "skip_budget": 0, "rollback_budget": 1}
    log = Log()
    with pytest.raises(capsule.NotFinite) as error:
        train(folder, world, 9 * TOTAL, data=poisoned(4 * TOTAL + 1), monitor=log, **options)
    return str(error.value), [note.split(" ")[0] for note in log.notes]


@pytest.mark.parametrize(("engine", "world"), [("single", 1), ("ddp", 2), ("fsdp", 2)])
def test_numbers_that_stay_wrong_stop_the_run_with_a_capsule(tmp_path, engine, world):
    results = ranks.run(stops, world, tmp_path, engine) if world > 1 else [stops(World(), tmp_path, engine)]
    path = tmp_path / "capsules" / f"img_{4 * TOTAL:012d}.json"
    for message, notes in results:
        assert str(path) in message
        assert notes == ["1", "back", "1"]
    content = capsule.read(path)
    assert content["checkpoint"] == f"checkpoints/img_{3 * TOTAL:012d}"
    assert content["samples"] == [4 * TOTAL, 5 * TOTAL]
    assert content["world"] == world
    assert content["step"] == 4
    seen = [part for part in content["seen"] if part["inputs"]]
    assert [part["module"] for part in seen] == ["embed (Linear)"]  # on the rank that read it
    assert seen[0]["samples"] == {str(4 * TOTAL + 1): ""}
    assert names(tmp_path) == [f"img_{3 * TOTAL:012d}"]  # nothing was saved after it
    finding = replayed(path, poisoned(4 * TOTAL + 1))
    assert finding.reproduced
    assert finding.inputs == ["image"]
    assert finding.module == "embed (Linear)"
    assert finding.samples == {4 * TOTAL + 1: ""}
    assert "the batch brings image" in str(finding)


def replayed(path, data, **options):
    plan = Batches(TOTAL, 1, TOTAL // 2, 2)
    return capsule.replay(
        path,
        engine=make(World(), **options),
        batches=lambda position: data(plan, 0, position),
        plan=plan,
        prepare=dict,
        schedule=Schedule(Optim(), 0.01, 2 * TOTAL, LONGEST),
        checkpoints=Checkpoints(path.parents[1] / "checkpoints", 2, World()),
    )


@pytest.fixture
def stopped(tmp_path):
    stops(World(), tmp_path, "single")
    return tmp_path / "capsules" / f"img_{4 * TOTAL:012d}.json"


def test_a_replay_without_the_fault_says_so(stopped):
    finding = replayed(stopped, stream)
    assert not finding.reproduced
    assert "finite this time" in str(finding)


def test_a_replay_names_the_module_inside(stopped, monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: x / 0)
    plan = Batches(TOTAL, 1, TOTAL // 2, 2)
    data = stream(plan, 0, 4 * TOTAL)
    finding = capsule.examine(make(World()), [next(data), next(data)], 0.01, 4 * TOTAL)
    assert finding.module == "layers.0.shrink (Linear)"
    assert finding.inputs == []


def test_a_replay_names_the_operation_of_a_backward(monkeypatch):
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x: x + (x - x.detach()).square().sum().sqrt())
    plan = Batches(TOTAL, 1, TOTAL, 1)
    finding = capsule.examine(make(World()), [next(stream(plan, 0))], 0.01, 0)
    assert finding.reproduced
    assert finding.module is None
    assert finding.gradient == "layers.2.grow (Linear)"
    assert "PowBackward0" in finding.operation  # 0 * infinity, in the derivative of the square
    assert "between the loss and the output of layers.2.grow" in str(finding)


def test_a_replay_with_another_config_is_refused(stopped):
    with pytest.raises(ConfigError, match=r"run\.seed"):
        replayed(stopped, stream, seed=6)


def test_a_replay_from_a_damaged_checkpoint_is_refused(stopped):
    """It would take another step than the run did."""
    file = stopped.parents[1] / "checkpoints" / f"img_{3 * TOTAL:012d}" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is damaged: .*__0_0\.distcp: its content has changed"):
        replayed(stopped, poisoned(4 * TOTAL + 1))


def test_what_is_no_capsule_is_refused(tmp_path):
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match="capsule"):
        capsule.read(tmp_path / "x.json")


def test_without_a_checkpoint_the_run_stops_at_once(tmp_path):
    with pytest.raises(capsule.NotFinite):
        train(tmp_path, World(), 9 * TOTAL, data=poisoned(0), skip_budget=0)
    assert capsule.read(tmp_path / "capsules" / f"img_{0:012d}.json")["checkpoint"] is None
