"""What every engine promises beside the curve, for those that shard in their own way: one run of ranks for each."""

import functools

import pytest
import ranks
import torch
from toys import NAMED, TOTAL, Student, Traffic, make, steps, stream

from halfseen import config, engine_config, engines, optim
from halfseen.derived import Batches
from halfseen.distributed import World
from halfseen.engines.parts import local_part

PLACES = [("zero0", 2), ("zero1", 2), ("zero2", 2), ("zero3", 2), ("zero3-kept", 2), ("oss", 2), ("sharded", 2)]


def snapshot(engine):
    return {key: local_part(value).clone() for key, value in engine.state().items()}


def differing(one, other):
    return [key for key in one if not torch.equal(one[key], other[key])]


def promises(world, name):
    """Averages, predictions, a skipped step, and what each left behind."""
    engine = make(world, name, ema=0.5)
    batch = next(stream(Batches(TOTAL, 1, TOTAL, 1), 0))
    found = {"rates": engine.hyperparameters(), "files": engine.files, "aliases": engine.aliases}
    steps(engine, world, 3)
    found["plain"], found["mean"] = engine.weights(), engine.weights(ema=True)
    found["logits"] = [engine.predict(batch)["logits"]]
    with engine.averaged():
        found["inside"] = engine.weights()
        found["logits"].append(engine.predict(batch)["logits"])
        with pytest.raises(RuntimeError, match="averaged"):
            engine.state()
    found["after"] = engine.weights()
    found["logits"].append(engine.predict(batch)["logits"])
    before = snapshot(engine)
    found["keys"] = sorted(before)
    with Traffic() as traffic:
        engine.state()
    found["messages"] = sum(traffic.count.values())
    bad = steps(engine, world, 1, start=3 * TOTAL, poison=(4 * TOTAL - 1,))[0]  # owned by the last rank
    found["bad"], found["left"] = bad["loss"], differing(before, snapshot(engine))
    found["skipped"] = engine.skipped(), engine.first_skipped, engine.skipped()
    found["gradients"] = sum(float(p.grad.abs().sum()) for p in engine.parameters.values() if p.grad is not None)
    found["history"] = steps(engine, world, 2, start=4 * TOTAL)
    found["moved"] = differing(before, snapshot(engine))
    found["logits"].append(engine.predict(batch)["logits"])
    engine.parameters["embed.weight"].requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"embed\.weight changed"):
        steps(engine, world, 1)
    return found


@pytest.fixture(scope="module")
def expected():
    return promises(World(), "single")


@functools.cache
def every_rank(place):
    return ranks.run(promises, place[1], place[0])


@pytest.fixture(params=PLACES, ids=lambda place: f"{place[0]}-{place[1]}")
def found(request):
    return every_rank(request.param)


def test_a_nan_on_one_rank_changes_nothing_on_any(found):
    for rank in found:
        assert rank["bad"] != rank["bad"]
        assert rank["left"] == []
        assert rank["skipped"] == (1, 3 * TOTAL, 0)
        assert rank["gradients"] == 0
    moved = {key.partition(".")[0] for rank in found for key in rank["moved"]}
    assert {"model", "optim", "ema"} <= moved


def test_the_curve_goes_on_after_a_skipped_step(found, expected):
    for ours, theirs in zip(found[0]["history"], expected["history"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def test_averages_swap_in_and_out(found, expected):
    ours = found[0]
    for name, value in ours["plain"].items():
        assert torch.equal(ours["after"][name], value), name
        assert torch.equal(ours["inside"][name], ours["mean"][name]), name
        torch.testing.assert_close(ours["mean"][name], expected["mean"][name], rtol=1e-5, atol=1e-6)
    assert not torch.equal(ours["plain"]["head.weight"], ours["mean"]["head.weight"])


def test_predictions_follow_the_weights(found, expected):
    plain, mean, _, later = expected["logits"]
    assert (plain - mean).abs().max() > 1e-3
    assert (plain - later).abs().max() > 1e-3
    for rank in found:
        for ours, theirs in zip(rank["logits"], expected["logits"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_names_are_those_of_the_plain_student(found, expected):
    for rank in found:
        assert rank["keys"] == expected["keys"]
        assert rank["aliases"] == expected["aliases"] == {"layers.2.grow.weight": "layers.0.grow.weight"}
        assert rank["rates"].keys() == expected["rates"].keys()


def test_a_state_takes_no_message(found):
    """A save would hold the run up that long."""
    for rank in found:
        assert rank["messages"] == 0


def test_deepspeed_says_what_it_was_told():
    for place in PLACES:
        assert list(every_rank(place)[0]["files"]) == (["deepspeed.json"] if place[0].startswith("zero") else [])


# --------------------------------------------------------------------------------------------------- ranks with nothing


def nearly_frozen(world, names):
    """One small weight trains: of more ranks than that has rows, some hold nothing that trains."""
    found = {}
    for name in names:
        torch.manual_seed(1)
        student = Student().requires_grad_(False)
        student.head.bias.requires_grad_(True)
        chosen = config.Optim(clip=0.05, eps=1e-4)
        settings = engine_config.Engine(**NAMED.get(name, {"name": name}), ema=0.5)
        engine = engines.create(settings, student, chosen, optim.groups(student, chosen), world, 5)
        held = sum(local_part(value).numel() for key, value in engine.state().items() if key.endswith("exp_avg"))
        history = steps(engine, world, 2)
        found[name] = held, history, engine.weights()
    return found


@pytest.mark.parametrize("names", [("fsdp", "oss", "sharded"), ("zero1", "zero2", "zero3")])
def test_a_rank_that_holds_nothing_that_trains_reaches_every_message(names):
    _, expected, weights = nearly_frozen(World(), ["single"])["single"]
    found = ranks.run(nearly_frozen, 3, names)
    for name in names:
        assert min(rank[name][0] for rank in found) < max(rank[name][0] for rank in found)
        for _, history, _ in (rank[name] for rank in found):
            for ours, theirs in zip(history, expected, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-6)
        torch.testing.assert_close(found[0][name][2]["head.bias"], weights["head.bias"])


# --------------------------------------------------------------------------------------------------- traps


def careful_and_forgetful(world):
    """Gradient norms under ShardedDDP, then with torch's own zero_grad, which is what ``clear`` guards against."""
    careful = steps(make(world, "sharded"), world, 4)
    engine = make(world, "sharded")
    engine.clear = lambda: engine.optimizer.zero_grad(set_to_none=True)
    return [[step["grad_norm"] for step in history] for history in (careful, steps(engine, world, 4))]


def test_stale_gradients_of_sharded_data_parallel():
    """Gradients set to None leave its buckets: the trap is still there, and this engine does not step into it."""
    reference = [step["grad_norm"] for step in steps(make(World(), "single"), World(), 4)]
    right, wrong = ranks.run(careful_and_forgetful, 2)[0]
    assert right == pytest.approx(reference, rel=1e-6)
    assert wrong[0] == pytest.approx(reference[0], rel=1e-6)
    assert max(abs(a - b) / b for a, b in zip(wrong[1:], reference[1:])) > 0.01


def tied(world, names):
    """First gradient norm, then after some steps the tied weight through both of its modules."""
    found = {}
    for name in names:
        engine = make(world, name)
        history = steps(engine, world, 4)
        one, other = engine.student.layers[0].grow, engine.student.layers[2].grow
        keys = [key for key in engine.state() if "layers.2.grow" in key]
        weight = engine.weights().get("layers.0.grow.weight")
        found[name] = history, one.weight is other.weight, keys, weight
    return found


ZERO = ("zero1", "zero2", "zero3")


@functools.cache
def tied_found():
    return ranks.run(tied, 2, ZERO)[0]


@pytest.mark.parametrize("name", ZERO)
def test_a_tied_weight_stays_one_weight_and_gets_the_sum_of_its_gradients(name):
    """DeepSpeed would untie it, or count one use, without a word; the untied run shows that this would be seen."""
    reference = make(World(), "single")
    expected = steps(reference, World(), 4)
    untied = steps(make(World(), "single", student={"tied": False}), World(), 4)
    history, same, keys, weight = tied_found()[name]
    assert same
    assert not [key for key in keys if "weight" in key]  # saved once, under its first name
    for ours, theirs, other in zip(history, expected, untied, strict=True):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-6)
        assert abs(ours["grad_norm"] - other["grad_norm"]) / other["grad_norm"] > 1e-3
    torch.testing.assert_close(weight, reference.weights()["layers.0.grow.weight"], rtol=1e-5, atol=1e-6)


def uneven(world):
    """A state whose parameters have taken different numbers of steps."""
    engine = make(world, "zero2")
    state = engine.state()
    state["optim.head.bias.step"] = state["optim.head.bias.step"] + 1
    with pytest.raises(ValueError, match=r"optim\.head\.bias\.step is 1: DeepSpeed keeps one count"):
        engine.load_state(state)
    return True


def test_one_count_of_steps_for_all_is_demanded():
    assert ranks.run(uneven, 1) == [True]
