"""Groups, optimizers and schedules: against definitions written out, and against timm's and torch's own."""

import copy

import pytest
import torch
from timm.optim import Lamb
from torch import nn

from halfseen import config, optim


class Toy(nn.Module):
    """Names like a student's: a trunk under encoder., a head, one tied weight."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Module()
        self.encoder.cls_token = nn.Parameter(torch.randn(1, 1, 4))
        self.encoder.pos_embed = nn.Parameter(torch.randn(1, 5, 4), requires_grad=False)
        self.encoder.patch_embed = nn.Linear(6, 4)
        self.encoder.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])
        self.encoder.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x):
        x = self.encoder.patch_embed(x) + self.encoder.cls_token[0]
        for block in self.encoder.blocks:
            x = x + block(x)
        return (self.head(self.encoder.norm(x)) ** 2).mean() + self.tied(x).mean()


class PlainLARS(torch.optim.Optimizer):
    """LARS as MAE's linear probe defines it, one tensor at a time (timm's norms differ)."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                change = p.grad
                if p.ndim > 1:
                    change = change + group["weight_decay"] * p
                    change = change * (0.001 * p.norm() / change.norm())
                memory = self.state[p].setdefault("mu", torch.zeros_like(p))
                memory.copy_(0.9 * memory + change)
                p -= group["lr"] * memory


@pytest.fixture
def toy():
    torch.manual_seed(0)
    return Toy()


def settings(**values):
    return config.Optim(**values)


def by_name(found):
    return {name: group for group in found for name in group.names}


def optimizer_of(toy, cfg, found=None):
    found = optim.groups(toy, cfg) if found is None else found
    return optim.build(cfg, found, dict(toy.named_parameters()))


def test_every_trainable_parameter_is_in_one_group_and_tied_or_frozen_ones_are_not_repeated(toy):
    names = [name for group in optim.groups(toy, settings()) for name in group.names]
    assert sorted(names) == sorted(name for name, p in toy.named_parameters() if p.requires_grad)
    assert len(names) == len(set(names))
    assert "head.weight" in names
    assert "tied.weight" not in names
    assert "encoder.pos_embed" not in names


@pytest.mark.parametrize("decay_tokens", [True, False])
def test_vectors_and_biases_are_not_decayed_and_tokens_as_asked(toy, decay_tokens):
    found = by_name(optim.groups(toy, settings(decay_tokens=decay_tokens, weight_decay=0.3)))
    assert found["encoder.cls_token"].weight_decay == (0.3 if decay_tokens else 0.0)
    assert found["head.weight"].weight_decay == 0.3
    assert found["head.bias"].weight_decay == 0.0
    assert found["encoder.norm.weight"].weight_decay == 0.0


def test_tensors_named_in_no_decay_are_not_decayed_beside_the_tokens(toy):
    plain = optim.groups(toy, config.Optim(no_decay=["weight"]))
    assert {name for group in plain if group.weight_decay for name in group.names} == {"encoder.cls_token"}
    both = optim.groups(toy, config.Optim(no_decay=["weight"], decay_tokens=False))
    assert not any(group.weight_decay for group in both)


@pytest.mark.parametrize(("rule", "norm"), [("mae", 1.0), ("timm", 0.5)])
def test_layer_decay_scales_each_layer_and_the_rules_differ_in_the_final_norm_only(toy, rule, norm):
    found = by_name(optim.groups(toy, settings(layer_decay=0.5), optim.trunk_layers(2, rule), 3))
    scales = {name: group.lr_scale for name, group in found.items()}
    assert scales["encoder.cls_token"] == scales["encoder.patch_embed.weight"] == 0.125
    assert scales["encoder.blocks.0.weight"] == 0.25
    assert scales["encoder.blocks.1.bias"] == 0.5
    assert scales["encoder.norm.weight"] == norm
    assert scales["head.weight"] == 1.0


def test_all_branches_of_a_parallel_block_are_one_layer():
    layer_of = optim.trunk_layers(4)
    assert {layer_of(f"encoder.blocks.2.{name}") for name in ("attns.0.norm.weight", "attns.1.ls.gamma")} == {3}
    assert layer_of("decoder_blocks.2.norm1.weight") == 5


def test_a_layer_outside_the_range_is_refused(toy):
    with pytest.raises(ValueError, match="layer 7 of"):
        optim.groups(toy, settings(), lambda name: 7, 3)


def test_a_student_without_trainable_parameters_is_refused(toy):
    with pytest.raises(ValueError, match="no trainable"):
        optim.groups(toy.requires_grad_(False), settings())


def test_the_rate_of_a_group_is_the_schedules_times_its_scale_and_group_fields_are_kept(toy):
    cfg = settings(layer_decay=0.5)
    found = optim.groups(toy, cfg, optim.trunk_layers(2), 3)
    optimizer = optimizer_of(toy, cfg, found)
    optim.set_rate(optimizer, 2.0)
    for group, made in zip(found, optimizer.param_groups, strict=True):
        assert made["lr"] == 2.0 * group.lr_scale
        assert (made["name"], made["names"], made["weight_decay"]) == (
            group.name,
            group.names,
            group.weight_decay,
        )


def train(toy, optimizer, steps=5):
    inputs = torch.randn(steps, 8, 6, generator=torch.Generator().manual_seed(1))
    for batch in inputs:
        optimizer.zero_grad()
        toy(batch).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in toy.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_optimizers_equal_independent_implementations(toy, name):
    cfg = settings(name=name, weight_decay=0.1, betas=(0.9, 0.95), eps=1e-6)
    twin = copy.deepcopy(toy)
    twin.tied.weight = twin.head.weight
    found = optim.groups(toy, cfg)
    ours = optimizer_of(toy, cfg, found)
    optim.set_rate(ours, 0.02)
    parameters = dict(twin.named_parameters())
    listed = [
        {"params": [parameters[name] for name in group.names], "weight_decay": group.weight_decay} for group in found
    ]
    theirs = {
        "adamw": lambda: torch.optim.AdamW(listed, lr=0.02, betas=(0.9, 0.95), eps=1e-6, fused=False),
        "lamb": lambda: Lamb(listed, lr=0.02, betas=(0.9, 0.95), eps=1e-6),
        "lars": lambda: PlainLARS(listed, {"lr": 0.02, "momentum": 0.9}),
        "sgd": lambda: torch.optim.SGD(listed, lr=0.02, momentum=0.9),
    }[name]()
    for (key, ours_value), theirs_value in zip(train(toy, ours).items(), train(twin, theirs).values(), strict=True):
        torch.testing.assert_close(ours_value, theirs_value, rtol=1e-5, atol=1e-6, msg=lambda text, key=key: key + text)


def test_lars_neither_adapts_nor_decays_vectors_and_adapts_undecayed_matrices():
    vector, matrix = nn.Parameter(torch.ones(3)), nn.Parameter(torch.full((2, 2), 3.0))
    optimizer = optim.LARS([{"params": [vector, matrix], "weight_decay": 0.0}], lr=1.0, momentum=0.9)
    vector.grad, matrix.grad = torch.ones(3), torch.full((2, 2), 100.0)
    optimizer.step()
    torch.testing.assert_close(vector.detach(), torch.zeros(3))
    torch.testing.assert_close(matrix.detach(), torch.full((2, 2), 3.0 - 0.001 * 6 / 200 * 100))


@pytest.mark.parametrize("name", ["adamw", "lamb", "lars", "sgd"])
def test_an_update_marked_not_finite_changes_nothing_and_the_next_one_is_as_if_it_never_was(toy, name):
    cfg = settings(name=name, weight_decay=0.1)
    twin = copy.deepcopy(toy)
    twin.tied.weight = twin.head.weight
    optimizer, reference = optimizer_of(toy, cfg), optimizer_of(twin, cfg)
    for each in (optimizer, reference):
        optim.set_rate(each, 0.01)
        each.found_inf = torch.zeros(())
    before = train(toy, optimizer, steps=2)
    train(twin, reference, steps=2)
    for parameter in toy.parameters():
        parameter.grad = torch.full_like(parameter, float("nan")) if parameter.requires_grad else None
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    for key, parameter in toy.named_parameters():
        assert torch.equal(parameter, before[key]), key
    optimizer.found_inf = torch.zeros(())
    after, expected = train(toy, optimizer, steps=3), train(twin, reference, steps=3)
    for key in after:
        assert torch.equal(after[key], expected[key]), key


@pytest.mark.parametrize("name", ["lamb", "lars", "sgd"])
def test_a_skipped_first_update_leaves_finite_empty_state(toy, name):
    optimizer = optimizer_of(toy, settings(name=name))
    optim.set_rate(optimizer, 0.01)
    for parameter in toy.parameters():
        parameter.grad = torch.full_like(parameter, float("inf"))
    optimizer.found_inf = torch.ones(())
    before = [p.detach().clone() for p in toy.parameters()]
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, toy.parameters(), strict=True))
    assert all((value == 0).all() for state in optimizer.state.values() for value in state.values())


@pytest.mark.parametrize(
    ("name", "slots"),
    [
        ("adamw", {"step", "exp_avg", "exp_avg_sq"}),
        ("lamb", {"step", "exp_avg", "exp_avg_sq"}),
        ("lars", {"momentum_buffer"}),
        ("sgd", {"momentum_buffer"}),
    ],
)
def test_state_is_tensors_under_known_names(toy, name, slots):
    optimizer = optimizer_of(toy, settings(name=name))
    train(toy, optimizer, steps=1)
    for state in optimizer.state.values():
        assert set(state) == slots
        assert all(isinstance(value, torch.Tensor) for value in state.values())


def test_the_rate_rises_from_warmup_lr_and_ends_at_min_lr():
    schedule = optim.Schedule(settings(warmup_lr=1e-6, min_lr=1e-5), 1e-3, 100, 1100)
    assert schedule.rate(0) == 1e-6
    assert schedule.rate(100) == 1e-3
    assert schedule.rate(600) == pytest.approx((1e-3 + 1e-5) / 2)
    assert schedule.rate(1100) == schedule.rate(2000) == 1e-5
    rates = [schedule.rate(position) for position in range(100, 1101)]
    assert rates == sorted(rates, reverse=True)


def test_a_constant_schedule_warms_up_and_stays():
    schedule = optim.Schedule(settings(schedule="constant"), 1e-3, 100, 1100)
    assert [schedule.rate(position) for position in (0, 50, 100, 1100)] == [0.0, 5e-4, 1e-3, 1e-3]
    assert optim.Schedule(settings(schedule="constant"), 1e-3, 0, 1100).rate(0) == 1e-3


def test_a_schedule_in_steps_is_simmims():
    cfg = settings(schedule="steps", drops=["70%", "90%"], warmup_lr=2e-6)
    schedule = optim.Schedule(cfg, 1e-3, 100, 1000, drops=(700, 900))
    rates = [schedule.rate(position) for position in (0, 50, 100, 699, 700, 899, 900, 999)]
    assert rates == pytest.approx([2e-6, 5.01e-4, 1e-3, 1e-3, 1e-4, 1e-4, 1e-5, 1e-5])


def test_timms_schedule_drops_onto_its_cosine_after_the_warmup():
    cfg = settings(schedule="timm", warmup_lr=1e-6, min_lr=1e-5)
    schedule = optim.Schedule(cfg, 1e-3, 500, 3000)
    unwarmed = optim.Schedule(cfg, 1e-3, 0, 3000)
    assert schedule.rate(500 - 1e-9) == pytest.approx(1e-3)
    assert schedule.rate(500) == unwarmed.rate(500) < 0.95e-3


def test_beits_warmup_reaches_the_peak_in_its_last_step_and_the_floor_is_never_reached():
    cfg = settings(base_lr=None, lr=1.0, min_lr=0.1, schedule="beit")
    schedule = optim.Schedule(cfg, 1.0, 5 * 32, 20 * 32, 32)
    rates = [schedule.rate(step * 32) for step in range(20)]
    assert rates[:6] == pytest.approx([0, 0.25, 0.5, 0.75, 1, 1])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0.1 < rates[-1] < 0.12
    assert optim.beit_cosine(0, 1.0, total=4, warmup=1, start=0.3) == 0.3, "one step of warm-up has only its start"


def test_restarts_follow_timms_scheduler():
    from timm.scheduler import CosineLRScheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.5)
    options = {"cycle_mul": 2.0, "cycle_decay": 0.5, "cycle_limit": 3, "k_decay": 1.5, "warmup_prefix": True}
    theirs = CosineLRScheduler(optimizer, t_initial=10, lr_min=1e-3, warmup_t=4, warmup_lr_init=1e-4, **options)
    for time in range(80):
        theirs.step(time)
        ours = optim.timm_cosine(
            time,
            0.5,
            length=10,
            warmup=4,
            start=1e-4,
            floor=1e-3,
            prefix=True,
            cycles=3,
            cycle_decay=0.5,
            cycle_stretch=2.0,
            k_decay=1.5,
        )
        assert ours == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12), time


def test_sharded_parameters_follow_the_same_updates_as_whole_ones(toy, tmp_path):
    """One rank is enough to run the sharded path: a mesh of one shards every tensor onto itself."""
    from torch.distributed import destroy_process_group, init_process_group
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        for name in ("lamb", "lars"):
            cfg = settings(name=name, weight_decay=0.1)
            whole, sharded = copy.deepcopy(toy), copy.deepcopy(toy)
            for model in (whole, sharded):
                del model.tied
                model.forward = lambda x, m=model: (m.head(m.encoder.norm(m.encoder.patch_embed(x))) ** 2).mean()
            fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
            results = []
            for model in (whole, sharded):
                optimizer = optimizer_of(model, cfg)
                optim.set_rate(optimizer, 0.02)
                results.append(train(model, optimizer, steps=3))
            for key, value in results[0].items():
                torch.testing.assert_close(results[1][key].full_tensor(), value, msg=key)
    finally:
        destroy_process_group()
