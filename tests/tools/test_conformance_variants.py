"""Cases of other sizes and flags than the stored ones; here timm, or a line of arithmetic, is the original."""

import argparse
import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models.beit import Beit
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer
from timm.optim._param_groups import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler, create_scheduler, create_scheduler_v2
from torch import nn
from torch.nn import functional as F

from halfseen.tools import conformance, golden_beit, golden_distill, golden_finetune, golden_hdvw, golden_mae
from halfseen.tools.golden import Case, epsilon, refuse_unknown, trunk
from halfseen.tools.golden_mini_swin import swin_of
from halfseen.tools.golden_rates import layer_decay as timm_layer_decay
from halfseen.tools.golden_rates import timm_schedule
from halfseen.tools.golden_relative import interpolation, tables
from halfseen.tools.golden_vqkd import IMAGENET, processed

GOLDEN = Path(__file__).parents[1] / "golden"
NORM = "LayerNorm eps=1e-6"
WIDTHS = {"img_size": [16, 24], "patch_size": 8, "embed_dim": 44, "depth": 2, "num_heads": 4, "num_classes": 5}


def random_weights(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)
    return model.eval()


def case_of(model, config, inputs, outputs, losses, **meta):
    """A case as an original would have written it; losses: prefix of gradients -> the loss they are of."""
    for prefix, loss in losses.items():
        grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True, retain_graph=True)
        named = {name: grad for (name, _), grad in zip(model.named_parameters(), grads) if grad is not None}
        outputs |= {f"{prefix}/{name}": grad for name, grad in named.items()}
    meta = {"config": config, "meaning": {}} | meta
    state = {name: value.detach() for name, value in model.state_dict().items()}
    return Case("x", meta, state, inputs, {name: value.detach() for name, value in outputs.items()}, {})


def assert_passes(checks, case):
    assert not [check.name for check in checks if not check.passed]
    assert {check.name for check in checks} >= {f"out/{name}" for name in case.outputs}


def pictures(count=2):
    torch.manual_seed(1)
    return torch.randn(count, 3, 16, 24), torch.rand(count, 5).softmax(-1), torch.arange(count)


def soft_loss(logits, target):
    return -(target * logits.log_softmax(-1)).sum(-1).mean()


@pytest.mark.parametrize(
    "flags",
    [
        {"use_rel_pos_bias": True, "use_shared_rel_pos_bias": True, "init_values": 0.1},
        {"use_rel_pos_bias": False, "use_abs_pos_emb": True, "qkv_bias": False, "use_mean_pooling": False},
        {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True, "mlp_ratio": 2.7},  # cuts 118.8, does not round
    ],
)
def test_beits_flags(flags):
    config = WIDTHS | {"use_abs_pos_emb": False, "use_mean_pooling": True, "init_values": None} | flags
    named = {key: value for key, value in config.items() if key != "use_mean_pooling"}
    model = random_weights(Beit(**named, global_pool="avg" if config["use_mean_pooling"] else "token"))
    image, soft, _ = pictures()
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    logits = model.head(features)
    outputs = {"features": features, "logits": logits, "loss": soft_loss(logits, soft)}
    inputs = {"images": image, "soft_labels": soft}
    case = case_of(model, config | {"norm_layer": NORM}, inputs, outputs, {"grad": outputs["loss"]})
    assert_passes(golden_finetune.classify(case), case)


def test_masks_of_uneven_counts_and_both_tables():
    """BEiT's first generator hides at most so many patches; its loss is the mean over all that are hidden."""
    config = WIDTHS | {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "use_shared_rel_pos_bias": True}
    model = random_weights(Beit(**config, init_values=0.1, global_pool="token"))
    mask_token, head = nn.Parameter(torch.randn(1, 1, 44)), nn.Linear(44, 11)
    image, _, _ = pictures()
    mask = torch.tensor([[[1, 0, 1], [0, 0, 1]], [[0, 0, 0], [1, 0, 0]]])
    x = torch.where(mask.flatten(1)[..., None].bool(), mask_token, model.patch_embed(image))
    x = torch.cat([model.cls_token.expand(2, -1, -1), x], 1)
    for block in model.blocks:
        x = block(x, shared_rel_pos_bias=model.rel_pos_bias())
    logits, ids = head(model.norm(x)[:, 1:]), torch.arange(12).view(2, 6) % 11
    loss = F.cross_entropy(logits[mask.flatten(1).bool()], ids[mask.flatten(1).bool()])
    case = case_of(model, {}, {"images": image, "mask": mask.byte(), "token_ids": ids}, {"loss": loss}, {"grad": loss})
    case.meta["config"] = {key: value for key, value in config.items() if key != "num_classes"}
    case.meta["config"] |= {"vocab_size": 11, "init_values": 0.1, "norm_layer": NORM}
    for name in ("head.weight", "head.bias"):
        del case.state[name]
    case.state.update(
        {"mask_token": mask_token.data, "lm_head.weight": head.weight.data, "lm_head.bias": head.bias.data}
    )
    assert_passes(golden_beit.pretrain(case), case)


@pytest.mark.parametrize("pooled", [True, False])
def test_maes_classifier_of_oblong_images_without_qkv_bias(pooled):
    config = WIDTHS | {"mlp_ratio": 2.7, "qkv_bias": False}
    made = VisionTransformer(**config, global_pool="avg" if pooled else "token", fc_norm=pooled)
    model = random_weights(made)
    image, soft, labels = pictures()
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    logits = model.head(features)
    outputs = {"features": features, "logits": logits, "loss_soft": soft_loss(logits, soft)}
    outputs["loss_smooth"] = F.cross_entropy(logits, labels, label_smoothing=0.2)
    inputs = {"images": image, "soft_labels": soft, "labels": labels}
    meaning = {"out/loss_smooth": "label smoothing 0.2"}
    config |= {"global_pool": pooled, "norm_layer": NORM}
    case = case_of(model, config, inputs, outputs, {"grad": outputs["loss_soft"]}, meaning=meaning)
    assert_passes(golden_mae.finetune(case), case)


def test_a_loss_of_weight_0_has_gradient_0():
    """With alpha 1 DeiT multiplies the labels' loss by 0; we leave it out."""
    config = WIDTHS | {"qkv_bias": True}
    model = random_weights(VisionTransformerDistilled(**config))
    model.set_distilled_training(True)
    image, soft, labels = pictures()
    taught = torch.randn(2, 5)
    own, distilled = model.train()(image)
    hard = 0.0 * soft_loss(own, soft) + F.cross_entropy(distilled, taught.argmax(1))
    inputs = {"images": image, "labels": labels, "soft_labels": soft, "teacher_logits": taught}
    outputs = {"logits_cls": own, "logits_dist": distilled, "loss_hard_softlabels": hard}
    case = case_of(
        model,
        config | {"alpha": 1.0, "tau": 2.0, "norm_layer": NORM},
        inputs,
        outputs,
        {"grad_hard": hard},
        meaning={"out/loss_<distill kind>_<base criterion>": "smoothing 0.1"},
    )
    assert case.outputs["grad_hard/head.weight"].abs().max() == 0
    assert_passes(golden_distill.deit(case), case)


class OfficialBlock(nn.Module):
    """AlterNet's block A in torch's own layers, channels-first, under the original's names."""

    def __init__(self, width, channels, expansion):
        super().__init__()
        out, inner = channels * expansion, width // expansion
        changed = [] if width == out else [nn.Conv2d(width, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.shortcut = nn.Sequential(*changed)
        self.conv = nn.Sequential(nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner), nn.GELU())
        self.attn, self.norm = nn.Module(), nn.BatchNorm2d(out)
        self.attn.pos_embedding = nn.Parameter(torch.zeros(3, 3))  # windows of 2 x 2
        self.attn.attn = nn.Module()
        self.attn.attn.to_q = nn.Conv2d(inner, 6, 1, bias=False)  # two heads of three channels
        self.attn.attn.to_kv = nn.Conv2d(inner, 12, 1, bias=False)
        self.attn.attn.to_out = nn.Sequential(nn.Conv2d(6, out, 1))

    def forward(self, x):
        plane, maps = self.conv(x), self.attn.attn
        mixed = torch.zeros_like(x[:, :1]).repeat(1, 6, 1, 1)
        for top, left in [(top, left) for top in range(0, x.shape[2], 2) for left in range(0, x.shape[3], 2)]:
            tile = plane[:, :, top : top + 2, left : left + 2]
            q, k, v = (
                part.flatten(2).unflatten(1, (2, 3)) for part in (maps.to_q(tile), *maps.to_kv(tile).chunk(2, 1))
            )
            scores = torch.einsum("bhdi,bhdj->bhij", q, k) / 3**0.5
            places = [(y, x) for y in range(2) for x in range(2)]
            bias = [[self.attn.pos_embedding[c - a + 1, d - b + 1] for c, d in places] for a, b in places]
            weights = (scores + torch.stack([torch.stack(row) for row in bias])).softmax(-1)
            found = torch.einsum("bhij,bhdj->bhdi", weights, v).flatten(1, 2).unflatten(2, (2, 2))
            mixed[:, :, top : top + 2, left : left + 2] = found
        return self.norm(maps.to_out(mixed)) + self.shortcut(x)


@pytest.mark.parametrize(("name", "expansion", "channels"), [("AttentionBlockA", 4, 3), ("AttentionBasicBlockA", 1, 8)])
def test_alternets_blocks_whose_norms_come_after(name, expansion, channels):
    config = {"cls": name, "dim_in": 8, "dim_out": channels, "heads": 2, "dim_head": 3, "window_size": 2}
    model = random_weights(OfficialBlock(8, channels, expansion).double())
    x, weight = torch.randn(3, 8, 4, 6).double(), torch.randn(3, channels * expansion, 4, 6).double()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    outputs = {"output_eval": model(x), "output_train": model.train()(x)}
    outputs["loss"] = (outputs["output_train"] * weight).sum()
    outputs |= {f"after_one_train_step/{name}": value.clone() for name, value in model.named_buffers()}
    case = case_of(model, config, {"x": x, "loss_weight": weight}, outputs, {"grad": outputs["loss"]})
    case.state.update(before)
    assert_passes(golden_hdvw.block(case), case)


def rows_of(make, rate, times):
    """The table of a timm scheduler over two groups, as a case has it."""
    parameters = [{"params": [nn.Parameter(torch.zeros(1))], "lr": rate / share} for share in (1, 2)]
    optimizer = torch.optim.SGD(parameters, lr=rate)
    made = make(optimizer)
    scheduler, epochs = made if isinstance(made, tuple) else (made, None)
    step = scheduler.step if scheduler.t_in_epochs else scheduler.step_update
    rows = [["init", [group["lr"] for group in optimizer.param_groups]]]
    for time in times:
        step(time)
        rows.append([time, [group["lr"] for group in optimizer.param_groups]])
    return {"rows": rows, "total_epochs_returned": epochs}


def test_timms_cosine_with_cycles_prefix_and_updates():
    cycles = {"t_initial": 10, "lr_min": 1e-5, "cycle_mul": 1.5, "cycle_decay": 0.7, "cycle_limit": 3, "warmup_t": 2}
    args = {"sched": "cosine", "epochs": 6, "min_lr": 1e-5, "warmup_lr": 1e-6, "warmup_epochs": 2, "cooldown_epochs": 1}
    args |= {"lr_cycle_mul": 2.0, "lr_cycle_limit": 2, "lr_cycle_decay": 0.5}
    v2 = {"num_epochs": 4, "warmup_epochs": 1, "updates_per_epoch": 5, "step_on_epochs": False, "warmup_prefix": True}
    tried = [
        ("CosineLRScheduler", cycles, lambda optimizer: CosineLRScheduler(optimizer, **cycles), range(50)),
        (
            "create_scheduler",
            args,
            lambda optimizer: create_scheduler(argparse.Namespace(**args), optimizer),
            range(24),
        ),
        ("create_scheduler_v2", v2, lambda optimizer: create_scheduler_v2(optimizer, **v2), range(30)),
    ]
    data = [
        {"constructor": name, "args": given | {"lr": 1e-3}} | rows_of(make, 1e-3, times)
        for name, given, make, times in tried
    ]
    checks = timm_schedule(Case("x", {"config": {}, "data": data, "timm": timm.__version__}, {}, {}, {}, {}))
    assert all(check.passed for check in checks)
    data[0]["args"]["cycle_limit"] = 2
    assert not timm_schedule(Case("x", {"config": {}, "data": data}, {}, {}, {}, {}))[0].passed


@pytest.mark.parametrize(("limit", "after"), [(2, [0.1, 0.1]), (0, [0.25, 0.125])])
def test_old_timm_lowers_the_floor_with_each_cycle_and_knows_cycles_without_end(limit, after):
    args = {"t_initial": 4, "t_mul": 2.0, "decay_rate": 0.5, "lr_min": 0.1, "cycle_limit": limit, "lr": 1.0}
    rows = [[0, [1.0, 0.5]], [2, [0.55, 0.3]], [4, [0.5, 0.25]], [8, [0.275, 0.15]], [12, after]]
    data = [{"constructor": "CosineLRScheduler", "args": args, "rows": rows, "total_epochs_returned": None}]
    (check,) = timm_schedule(Case("x", {"config": {}, "data": data, "timm": "0.4.12"}, {}, {}, {}, {}))
    assert check.passed


@pytest.mark.parametrize(
    "name",
    [
        *("deit3_small_patch16_224", "deit_tiny_distilled_patch16_224", "beit_base_patch16_224"),
        *("swin_tiny_patch4_window7_224", "pvt_v2_b0", "tnt_s_patch16_224"),
    ],
)
def test_timms_groups_of_other_models(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=5)
    names, kept = {id(p): own for own, p in model.named_parameters()}, sorted(model.no_weight_decay())

    def table(groups):
        return {
            names[id(p)]: [group.get("lr_scale", 1.0), group["weight_decay"]]
            for group in groups
            for p in group["params"]
        }

    plain = table(param_groups_weight_decay(model, 0.05, no_weight_decay_list=kept))
    layered = table(param_groups_layer_decay(model, 0.05, no_weight_decay_list=kept, layer_decay=0.7))
    data = {"layer_decay": layered, "plain": {own: decay for own, (_, decay) in plain.items()}}
    config = {"model": f"{name}, 5 classes", "layer_decay": 0.7, "weight_decay": 0.05, "no_weight_decay": kept}
    checks = timm_layer_decay(
        Case("x", {"config": config, "data": data, "repo": "huggingface/pytorch-image-models"}, {}, {}, {}, {})
    )
    assert all(check.passed for check in checks)


def test_swins_stem_flags_are_read():
    side = {"embed_dim": 8, "depths": [2], "num_heads": [2], "ape": True, "patch_norm": False}
    names = {name for name, _ in swin_of({"common": {"img_size": 28}, "teacher": side}, "teacher").named_parameters()}
    assert "absolute_pos_embed" in names
    assert not any(name.startswith("patch_embed.norm") for name in names)


def test_what_a_tokenizer_sees():
    pixels = torch.tensor([0.0, 0.5, 1.0]).view(1, 1, 1, 3).expand(1, 3, 1, 3)
    assert processed(pixels, "default")[0, 0, 0].tolist() == [-1, 0, 1]
    assert processed(255 * pixels, "default")[0, 0, 0].tolist() == [-1, 0, 1]
    mean, deviation = IMAGENET
    expected = torch.tensor([(0.5 - mean[1]) / deviation[1]])
    torch.testing.assert_close(processed(pixels, "imagenet_norm")[0, 1, 0, 1:2], expected)
    assert torch.equal(processed(pixels, "dall-e"), pixels)


def test_a_table_that_blocks_do_not_share_is_each_ones():
    name = "blocks.{}.attn.relative_position_bias_table"
    first, second = torch.randn(12, 2), torch.randn(12, 2)  # of a grid of 2 x 2, with the class token's rows

    def case(inputs, **outputs):
        return Case("x", {"config": {"src_grid": 2, "dst_grid": 2}}, {}, inputs, outputs, {})

    one = case({"table": first}, **{name.format(0): first, name.format(1): first})
    assert_passes(interpolation(one), one)
    two = case({"table0": first, "table1": second}, **{name.format(0): first, name.format(1): second})
    assert_passes(interpolation(two), two)
    assert len(tables(two)) == 2


def test_rates_that_draw_nothing_are_no_unknown_options():
    refuse_unknown({"drop_path_rate": 0.1, "use_checkpoint": True}, ())
    with pytest.raises(ValueError, match="qk_scale"):
        refuse_unknown({"qk_scale": 0.3}, ())


def test_the_epsilon_of_a_norm_however_it_is_printed():
    printed = "functools.partial(<class 'torch.nn.modules.normalization.LayerNorm'>, eps=1e-06)"
    assert [epsilon(text) for text in (NORM, printed, "LayerNorm")] == [1e-6, 1e-6, 1e-5]
    with pytest.raises(ValueError, match="BatchNorm2d"):
        epsilon("BatchNorm2d")


@pytest.mark.parametrize(("width", "ratio"), [(44, 2.7), (48, 3.3), (60, 4), (1408, 4.3637)])
def test_hidden_widths_are_cut_as_the_originals_do(width, ratio):
    model = trunk({"embed_dim": width, "depth": 1, "num_heads": 2, "patch_size": 8, "mlp_ratio": ratio})
    assert round(width * model.mlp_ratio) == int(width * ratio)


def stored(name, folder, renamed=None, **meta):
    """A copy of a stored case, under another name and with other metadata."""
    folder.mkdir(exist_ok=True)
    target = folder / (renamed or name)
    shutil.copy(GOLDEN / f"{name}.safetensors", f"{target}.safetensors")
    found = json.loads((GOLDEN / f"{name}.json").read_text()) | meta
    Path(f"{target}.json").write_text(json.dumps({key: value for key, value in found.items() if value is not None}))


def test_cases_of_folders_within_are_judged_too(tmp_path, capsys):
    stored("peg_a", tmp_path / "one")
    stored("peg_a", tmp_path / "two", "peg_of_my_own")
    assert conformance.main([str(tmp_path)]) == 0
    assert "2 of 2 cases passed" in capsys.readouterr().out


def test_other_json_files_are_named_and_passed_over_but_a_broken_case_fails(tmp_path, capsys):
    stored("peg_a", tmp_path)
    (tmp_path / "index.json").write_text(json.dumps(["peg_a"]))
    assert conformance.main([str(tmp_path)]) == 0
    assert "index.json: no case" in capsys.readouterr().out
    (tmp_path / "peg_b.json").write_text("{")
    assert conformance.main([str(tmp_path)]) == 1
    assert "failed: peg_b" in capsys.readouterr().out


@pytest.mark.parametrize("stated", ["peg_a", None])
def test_a_renamed_case_is_known_by_the_name_it_states_or_by_its_code(tmp_path, stated):
    stored("peg_a", tmp_path, "mine", case=stated, path="gvt.py (PosCNN)")
    known = [family for family in conformance.families() if family.prefix != "cpvt"]
    assert conformance.judge(tmp_path / "mine.json", known).passed


def test_code_that_several_families_are_from_tells_nothing(tmp_path):
    stored("peg_a", tmp_path, "mine", case=None)
    (error,) = conformance.judge(tmp_path / "mine.json", conformance.families()).errors
    assert "no family of cases is called like this, mine" in error


def test_tensors_that_are_missing_are_named(tmp_path):
    stored("peg_a", tmp_path)
    (tmp_path / "peg_a.safetensors").unlink()
    (error,) = conformance.judge(tmp_path / "peg_a.json", conformance.families()).errors
    assert "peg_a.safetensors" in error


def test_what_a_case_lacks_is_named(tmp_path):
    stored("peg_a", tmp_path, config={"in_chans": 24, "embed_dim": 24, "W": 7})
    (error,) = conformance.judge(tmp_path / "peg_a.json", conformance.families()).errors
    assert error.startswith("the case states no 'H'")


def test_weights_and_inputs_stored_in_double_are_run_in_single(tmp_path):
    stored("mae_finetune_a_cls", tmp_path)
    path = tmp_path / "mae_finetune_a_cls.safetensors"
    tensors = {name: value.double() if value.is_floating_point() else value for name, value in load_file(path).items()}
    save_file(tensors, path)
    verdict = conformance.judge(tmp_path / "mae_finetune_a_cls.json", conformance.families())
    assert verdict.passed, conformance.table(verdict)


def test_nothing_compared_is_a_failure_with_a_reason(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"repo": "r", "path": "p", "config": {}}))
    save_file({"in/a": torch.ones(1)}, tmp_path / "x.safetensors")
    nothing = conformance.Family("x", "r", "p", lambda case: [])
    assert "nothing was compared" in conformance.table(conformance.judge(tmp_path / "x.json", [nothing]))
