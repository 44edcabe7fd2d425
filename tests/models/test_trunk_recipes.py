"""Every hierarchical trunk as a user has it: pretrained by SimMIM, fine-tuned from that, distilled; then sent away."""

import json

import pytest
import timm
import torch
from safetensors.torch import load_file
from small_trunks import FAMILIES

from halfseen.checkpoint import read_weights
from halfseen.config import ConfigError
from halfseen.finetune import evaluate
from halfseen.finetune import train as finetuning
from halfseen.pretrain import train as pretraining
from halfseen.pretrain.distill import train as distillation
from halfseen.tools import convert

SMALL = [
    *("data.train=embedded:emoji/train", "data.image_size=64", "data.workers=0", "data.repeats=1"),
    *(
        "run.images=8",
        "run.evaluate_every=8",
        "run.global_batch=4",
        "run.checkpoint_every=8",
        "run.log_every=4",
        "optim.warmup=4",
    ),
    *("engine.name=single", "engine.device=cpu", "monitor.tensorboard=false"),
]
LABELS = ["data.val=embedded:emoji/val", "data.label=folder", "data.classes=12", "data.limit=24", "engine.ema=0"]
ALTERNET = ["trunk=alternet", "alternet.depth=18", "alternet.width=8", "alternet.window=2", "alternet.head_width=4"]
# A window is not taken over from run.init: another size of image may want another.
WINDOW = {"alternet": ["alternet.window=2"], "swin of ours": ["swin.window=4"]}
SWIN = ["trunk=swin", "swin.width=8", "swin.depths=[1,1]", "swin.heads=[1,2]", "swin.window=4"]
PYRAMID = ["trunk=pyramid", "pyramid.depths=[1,1]", "pyramid.widths=[8,16]", "pyramid.heads=[1,2]"]
PYRAMID += ["pyramid.mlp_ratios=[2,2]", "pyramid.reductions=[2,1]"]
OURS = {"alternet": ALTERNET, "pyramid": PYRAMID, "swin of ours": SWIN}
TEACHER = ["teacher.source=timm:test_vit", "teacher.weights=random", "teacher.classes=12", "teacher.precision=fp32"]


def trunk(name):
    """The overrides that choose a trunk."""
    if name in OURS:
        return OURS[name]
    model, _, options = FAMILIES[name]
    return ["trunk=timm", f"timm.name={model}", f"timm.options={json.dumps(options)}"]


def losses(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize("name", ["swin", "nest", "pvt_v2", "twins_pcpvt", "tnt", *OURS])
def test_a_trunk_is_pretrained_fine_tuned_and_distilled(name, tmp_path, capsys):
    cell = "mask.cell=8" if name in ("swin of ours", "pyramid") else "mask.cell=32"
    arguments = ["pretrain/simmim_swin_b", *SMALL, *trunk(name), cell, "data.val=null", "run.picture_every=8"]
    assert pretraining.main([*arguments, f"run.folder={tmp_path / 'simmim'}"]) == 0
    assert all(losses(tmp_path / "simmim"))
    recipe = "finetune/simmim_swin_b" if name == "swin of ours" else tmp_path / "mine.yaml"
    (tmp_path / "mine.yaml").write_text("stage: finetune\ntask: {pool: norm_mean}\noptim: {layer_decay: 0.9}\n")
    arguments = [
        str(recipe),
        *SMALL,
        *LABELS,
        *WINDOW.get(name, []),
        f"run.init={tmp_path / 'simmim'}",
        "run.init_coverage=1",
    ]
    assert finetuning.main([*arguments, f"run.folder={tmp_path / 'tuned'}"]) == 0
    assert "100.0% of the trunk filled" in capsys.readouterr().out
    assert evaluate.main([str(tmp_path / "tuned"), "--batch", "8"]) == 0
    arguments = ["distill/deit_s_distilled", *SMALL, *LABELS, *trunk(name), *TEACHER, "task.pool=norm_mean"]
    assert distillation.main([*arguments, f"run.folder={tmp_path / 'taught'}"]) == 0
    assert all(losses(tmp_path / "taught"))


@pytest.mark.parametrize("name", ["pvt_v2", "twins_pcpvt", "swin"])
def test_a_run_goes_to_timm_and_a_file_of_timm_into_a_run(name, tmp_path, capsys):
    model, size, options = FAMILIES[name]
    sized = {} if name == "pvt_v2" else {"img_size": size}
    given, back = tmp_path / "given.pth", tmp_path / "back.safetensors"
    theirs = timm.create_model(model, num_classes=12, **sized, **options)
    torch.save(theirs.state_dict(), given)
    tuned = ["finetune/simmim_vit_b", *SMALL, *LABELS, *trunk(name), "task.pool=norm_mean"]
    assert (
        finetuning.main(
            [*tuned, "optim.lr=1e-30", "optim.base_lr=null", f"run.folder={tmp_path / 'run'}", f"run.init={given}"]
        )
        == 0
    )
    assert "names read as timm_hierarchical" in capsys.readouterr().out
    arguments = [str(tmp_path / "run"), str(back), "--to", "timm_hierarchical"]
    assert convert.main(arguments) == 0
    assert "equal to timm" in capsys.readouterr().out
    theirs.load_state_dict(load_file(back))
    ours = read_weights(tmp_path / "run")
    assert torch.equal(ours["head.weight"], load_file(back)["head.fc.weight" if name == "swin" else "head.weight"])


def test_a_trunk_of_several_stages_is_refused_where_one_is_needed():
    with pytest.raises(ConfigError, match="needs a trunk of one resolution, and trunk=timm"):
        pretraining.main(["pretrain/mae_b16", "trunk=timm", *SMALL])
    with pytest.raises(ConfigError, match="has no class token"):
        finetuning.main(["finetune/simmim_vit_b", *SMALL, *LABELS, *trunk("pvt_v2"), "task.pool=class"])
