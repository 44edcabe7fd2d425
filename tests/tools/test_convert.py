"""The convert command: files in and out, in every layout."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from halfseen.config import ConfigError, Model
from halfseen.models import ViT
from halfseen.models.pyramid import Pyramid, PyramidConfig
from halfseen.models.swin import Swin, SwinConfig
from halfseen.pretrain import train as pretraining
from halfseen.tools import architecture, convert

GOLDEN = Path(__file__).parents[1] / "golden"


def official(case):
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    return {name.removeprefix("state/"): value for name, value in tensors.items() if name.startswith("state/")}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("case", "layout"),
    [("mae_pretrain_a", "mae"), ("deit_v2_b_parallel_ls_hmlp", "deit"), ("mae_finetune_b_gap", "timm")],
)
@pytest.mark.parametrize("ending", ["safetensors", "pth"])
def test_a_published_file_comes_back_bit_for_bit(tmp_path, capsys, case, layout, ending):
    published, ours, back = tmp_path / "published.pth", tmp_path / f"ours.{ending}", tmp_path / "back.pth"
    torch.save({"model": official(case), "epoch": 3}, published)
    assert convert.main([str(published), str(ours), "--to", "halfseen"]) == 0
    assert f"{layout} -> halfseen" in capsys.readouterr().out
    assert convert.main([str(ours), str(back), "--from", "halfseen", "--to", layout]) == 0
    assert same(torch.load(back, weights_only=True)["model"], official(case))
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["published.pth", ours.name, "back.pth"])


def test_what_has_no_place_in_the_destination_is_named(tmp_path, capsys):
    source, timm = tmp_path / "mae.safetensors", tmp_path / "timm.safetensors"
    save_file(official("mae_pretrain_a"), source)
    convert.main([str(source), str(timm), "--to", "timm"])
    printed = capsys.readouterr().out
    unused = next(line for line in printed.splitlines() if "unused" in line)
    assert "decoder.pred" in unused
    assert not [name for name in load_file(timm) if "decoder" in name or "mask_token" in name]


@pytest.mark.parametrize("name", ["timm", "beit", "transformers_vit"])
def test_what_a_pretraining_predicts_is_no_classifier(name):
    """A student that hides nothing (Feature Distillation) has no mask token to tell its head by."""
    trunk = ViT(Model(width=32, depth=1, heads=2, patch=8), 32)
    ours = {f"encoder.{key}": value for key, value in trunk.state_dict().items()}
    ours |= {"head.weight": torch.randn(7, 32), "head.bias": torch.randn(7)}
    source, destination = convert.LAYOUTS["halfseen"], convert.LAYOUTS[name]
    made = convert.place(ours, source, destination, "pretrain")
    assert set(made.unused) == {"head.weight", "head.bias"}
    assert not [key for key in made.weights if "head" in key or "classifier" in key]
    tuned = convert.place(ours, source, destination, "finetune")
    assert not tuned.unused
    assert len(tuned.weights) == len(made.weights) + 2


@pytest.mark.parametrize("name", ["mae", "transformers_vit", "transformers_beit", "irpe", "swin", "timm_swin", "pvt"])
def test_nor_is_it_beside_a_mask_token(name):
    trunk = ViT(Model(width=32, depth=1, heads=2, patch=8), 32)
    if "swin" in name:
        trunk = Swin(SwinConfig(width=8, depths=[1, 1], heads=[1, 1], window=4), 32)
    elif name == "pvt":
        trunk = Pyramid(PyramidConfig(depths=[1], widths=[8], heads=[1], mlp_ratios=[1], reductions=[1]), 32)
    ours = {f"encoder.{key}": value for key, value in trunk.state_dict().items()}
    ours |= {"head.weight": torch.randn(12, 32), "head.bias": torch.randn(12), "mask_token": torch.randn(1, 1, 32)}
    source, destination = convert.LAYOUTS["halfseen"], convert.LAYOUTS[name]
    made = convert.place(ours, source, destination, "pretrain")
    assert set(made.unused) == {"head.weight", "head.bias", "mask_token"}
    for kept in ("halfseen", "simmim"):
        if name != "pvt":
            assert not convert.place(ours, source, convert.LAYOUTS[kept], "pretrain").unused


def test_a_head_over_codes_is_no_head_of_simmim():
    ours = {"encoder.norm.weight": torch.ones(4), "mask_token": torch.ones(1, 1, 4), "head.weight": torch.ones(7, 4)}
    with pytest.raises(ConfigError, match="7 numbers a place"):
        convert.place(ours, convert.LAYOUTS["halfseen"], convert.LAYOUTS["simmim"])


def test_names_that_contradict_from_are_refused(tmp_path):
    source = tmp_path / "mae.safetensors"
    save_file(official("mae_pretrain_a"), source)
    with pytest.raises(ConfigError, match="--from='halfseen'"):
        convert.main([str(source), str(tmp_path / "x.pth"), "--from", "halfseen", "--to", "timm"])


def test_an_unknown_kind_of_file_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(ConfigError, match="no kind of file"):
        convert.main([str(tmp_path / "missing.pth"), str(tmp_path / "x.onnx"), "--to", "timm"])


def test_tied_weights_are_written_under_both_names(tmp_path):
    weight = torch.randn(3, 3)
    convert.write({"a": weight, "b": weight, "c": weight[:1]}, tmp_path / "tied.safetensors")
    assert same(load_file(tmp_path / "tied.safetensors"), {"a": weight, "b": weight, "c": weight[:1]})


def randomised(model):
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def timm_file(path, name, **options):
    torch.save(randomised(timm.create_model(name, **options)).state_dict(), path)
    return str(path)


SMALL = {"img_size": 64, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
TIMM = {
    "plain": ("vit_tiny_patch16_224", SMALL),
    "parallel": ("vit_small_patch16_18x2_224", SMALL),
    "scaled": ("deit3_small_patch16_224", SMALL),
    "registers, pooled before the norm": ("vit_base_patch16_reg4_gap_256", SMALL),
    "distilled": ("deit_tiny_distilled_patch16_224", SMALL),
    "beit": ("beit_base_patch16_224", SMALL),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "window_size": 4, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4)},
    ),
}


@pytest.mark.parametrize("kind", TIMM)
def test_a_timm_model_computes_the_same_here_and_the_file_says_so(tmp_path, capsys, kind):
    name, options = TIMM[kind]
    given, ours, back = (tmp_path / f"{part}.safetensors" for part in ("given", "ours", "back"))
    model = randomised(timm.create_model(name, **options))
    save_file(model.state_dict(), given)
    heads = ["--heads", "3"] if kind not in ("beit", "swin") else []
    size = ["--image-size", "64"] if kind == "swin" else []
    assert convert.main([str(given), str(ours), "--to", "halfseen", *heads, *size]) == 0
    assert "proof     equal to timm" in capsys.readouterr().out
    told = metadata(ours)
    proof, model_told = json.loads(told["proof"]), json.loads(told["architecture"])
    assert proof["equal"] is True
    assert proof["largest_difference"] < 1e-3
    assert model_told["image_size"] == 64
    assert model_told["trunk"] == ("swin" if kind == "swin" else "vit")
    assert told["converted_from"].startswith("timm")
    assert told["source_sha256"] == hashlib.sha256(given.read_bytes()).hexdigest()
    assert json.loads(told["coverage"])["new"]["tensors"] == 0
    assert convert.main([str(ours), str(back), "--to", told["converted_from"], "--no-proof", *heads]) == 0
    assert same(load_file(back), load_file(given))


def test_wrong_weights_are_not_proven(tmp_path, capsys, monkeypatch):
    """A layout that mixed two weights up would still load; the forward pass tells."""
    given = timm_file(tmp_path / "given.pth", "vit_tiny_patch16_224", **SMALL)
    layout = convert.LAYOUTS["timm"]

    def swapped(names):
        table = layout.to_ours(names)
        one, two = "blocks.0.attn.proj.bias", "blocks.1.attn.proj.bias"
        return table | {one: table[two], two: table[one]}

    monkeypatch.setitem(convert.LAYOUTS, "timm", replace(layout, to_ours=swapped))
    out = tmp_path / "out.safetensors"
    assert convert.main([given, str(out), "--from", "timm", "--to", "halfseen", "--heads", "3"]) == 1
    assert "NOT EQUAL" in capsys.readouterr().out
    assert not out.exists()


def test_a_model_with_unknown_parts_is_not_proven(tmp_path, capsys):
    given = timm_file(tmp_path / "given.pth", "vit_base_patch16_clip_224", **SMALL)
    convert.main([given, str(tmp_path / "out.safetensors"), "--to", "halfseen", "--heads", "3", "--coverage", "0.9"])
    assert "norm_pre" in capsys.readouterr().out
    assert json.loads(metadata(tmp_path / "out.safetensors")["proof"])["witness"] is None


def test_positions_move_to_another_size_and_are_counted(tmp_path, capsys):
    given, out = timm_file(tmp_path / "given.pth", "beit_base_patch16_224", **SMALL), tmp_path / "out.safetensors"
    assert convert.main([given, str(out), "--to", "halfseen", "--image-size", "96"]) == 0
    counts = json.loads(metadata(out)["coverage"])
    assert counts["resized"]["tensors"] == 2
    assert json.loads(metadata(out)["architecture"])["image_size"] == 96
    assert load_file(out)["encoder.blocks.0.attn.relative_position_bias_table"].shape == (11 * 11 + 3, 3)


def test_missing_weights_are_refused_by_the_share_of_the_trunk(tmp_path):
    weights = randomised(timm.create_model("vit_tiny_patch16_224", **SMALL)).state_dict()
    torch.save({name: value for name, value in weights.items() if "mlp.fc2" not in name}, tmp_path / "given.pth")
    arguments = [str(tmp_path / "given.pth"), str(tmp_path / "out.pth"), "--to", "halfseen", "--heads", "3"]
    with pytest.raises(ConfigError, match=r"of the trunk is given; lacking: encoder\.blocks.*\(not given\)"):
        convert.main(arguments)
    assert convert.main([*arguments, "--coverage", "0.5"]) == 0
    told = torch.load(tmp_path / "out.pth", weights_only=True)["halfseen"]
    assert json.loads(told["coverage"])["new"]["tensors"] == 4
    assert "fc2" in json.loads(told["proof"])["reason"]


def spoilt(folder, **changed):
    """A file of a small ViT with some weights changed, or left out where None is given; the arguments to convert it."""
    weights = randomised(timm.create_model("vit_tiny_patch16_224", **SMALL)).state_dict() | changed
    torch.save({name: value for name, value in weights.items() if value is not None}, folder / "given.pth")
    return [str(folder / "given.pth"), str(folder / "out.safetensors"), "--to", "mae"]


@pytest.mark.parametrize("heads", [["--heads", "3"], []])
def test_weights_of_other_shapes_are_refused_by_name_whoever_tells_the_heads(tmp_path, capsys, heads):
    arguments = [*spoilt(tmp_path, **{"blocks.1.mlp.fc1.weight": torch.zeros(10, 10)}), *heads]
    with pytest.raises(
        ConfigError, match=r"blocks\.1\.mlp\.fc1\.weight \(given as \(10, 10\), needed as \(192, 48\)\)"
    ):
        convert.main(arguments)
    assert convert.main([*arguments, "--coverage", "0.5"]) == 0
    assert not heads or "have other shapes" in capsys.readouterr().out


def test_blocks_without_a_stem_are_a_part_and_refused(tmp_path):
    arguments = spoilt(tmp_path, **{"patch_embed.proj.weight": None, "patch_embed.proj.bias": None})
    with pytest.raises(ConfigError, match="no stem"):
        convert.main(arguments)
    assert convert.main([*arguments, "--coverage", "0"]) == 0


def test_a_mask_token_that_pretraining_left_keeps_nothing_from_being_proven(tmp_path, capsys):
    arguments = spoilt(tmp_path, mask_token=torch.ones(1, 1, 48))
    assert convert.main([*arguments, "--heads", "3"]) == 0
    assert "proof     equal to timm" in capsys.readouterr().out
    assert torch.equal(load_file(tmp_path / "out.safetensors")["mask_token"], torch.ones(1, 1, 48))


@pytest.mark.parametrize("layout", ["swin", "mini_deit", "vqkd", "peg", "cpvt", "hdvw", "timm_hierarchical"])
def test_a_plain_vit_is_not_written_as_another_model(tmp_path, layout):
    given = timm_file(tmp_path / "given.pth", "vit_tiny_patch16_224", **SMALL)
    with pytest.raises(ConfigError, match="has no place for encoder"):
        convert.main([given, str(tmp_path / "out.safetensors"), "--to", layout, "--heads", "3"])
    assert not (tmp_path / "out.safetensors").exists()


class Code:
    """Unpickling this would call a function."""

    def __reduce__(self):
        return (print, ("hello",))


def test_a_pickle_with_code_is_refused_with_a_safe_path(tmp_path, capsys):
    torch.save({"model": Code()}, tmp_path / "given.bin")
    with pytest.raises(ConfigError, match="is a pickle that runs code") as refused:
        convert.main([str(tmp_path / "given.bin"), str(tmp_path / "out.pth"), "--to", "halfseen"])
    assert "print" in refused.value.reason
    assert "state_dict()" in refused.value.fix
    assert "hello" not in capsys.readouterr().out


def test_heads_that_nobody_tells_are_asked_for(tmp_path, capsys):
    given, out = timm_file(tmp_path / "given.pth", "vit_tiny_patch16_224", **SMALL), tmp_path / "out.safetensors"
    assert convert.main([given, str(out), "--to", "halfseen"]) == 0
    assert "usually one per 64 channels" in capsys.readouterr().out
    assert "architecture" not in metadata(out)


def test_official_simmim_weights_are_proven_by_timm(tmp_path, capsys):
    for case, model in (("simmim_vit_a", "Beit"), ("simmim_swin_a", "SwinTransformer")):
        torch.save({"model": official(case)}, tmp_path / "given.pth")
        size = ["--image-size", "64"] if "swin" in case else []
        arguments = [str(tmp_path / "given.pth"), str(tmp_path / "ours.safetensors"), "--to", "halfseen", *size]
        assert convert.main(arguments) == 0
        printed = capsys.readouterr().out
        assert "simmim -> halfseen" in printed
        assert "equal to timm" in printed
        assert model in printed
        assert convert.main([str(tmp_path / "ours.safetensors"), str(tmp_path / "back.pth"), "--to", "simmim"]) == 0
        capsys.readouterr()
        back = torch.load(tmp_path / "back.pth", weights_only=True)["model"]
        expected = {name: value for name, value in official(case).items() if not name.endswith("attn_mask")}
        assert same(back, expected)


OFFICIAL = {
    "mae_pretrain_a": "mae",
    "beit_mim_a_shared_rel": "beit",
    "beit_finetune_a_mean": "beit",
    "beit2_clspt_a_sharedhead": "beit2",
    "deepvit_reattn_a": "deepvit",
    "deit_distilled_a": "timm",
    "deit_v2_a_layerscale": "deit",
    "deit_v2_b_parallel_ls_hmlp": "deit",
    "mini_deit_a": "mini_deit",
    "mini_deit_b_cls_qkv": "mini_deit",
    "mini_swin_a": "mini_swin",
    "simmim_vit_a": "simmim",
    "simmim_swin_a": "simmim",
}


@pytest.mark.parametrize("case", OFFICIAL)
def test_official_weights_of_every_family_say_what_they_are(tmp_path, capsys, case):
    """Detected, and described well enough to build the very trunk; heads are given where no weight tells."""
    config = json.loads((GOLDEN / f"{case}.json").read_text())["config"]
    given, ours = tmp_path / "given.pth", tmp_path / "ours.safetensors"
    torch.save({"model": official(case)}, given)
    arguments = [str(given), str(ours), "--to", "halfseen", "--image-size", str(side_of(config))]
    heads = ["--heads", str(config["num_heads"])] if isinstance(config.get("num_heads"), int) else []
    assert convert.main([*arguments, *heads]) == 0
    printed = capsys.readouterr().out
    assert f"{OFFICIAL[case]} -> halfseen" in printed
    assert "100.0% of the trunk was given" in printed
    told = architecture.of_file(ours)
    trunk = {name.removeprefix("encoder."): value for name, value in load_file(ours).items() if "encoder." in name}
    lacks = told.build().encoder.load_state_dict(trunk, strict=False)
    assert not lacks.unexpected_keys
    assert set(lacks.missing_keys) <= {"norm.weight", "norm.bias"}  # which a mean over tokens may have behind it
    if "mini_deit" in case:
        assert (told.model.share, told.model.depth) == (2, config["depth"])
        assert told.model.irpe_shared == config["rpe_config"]["shared_head"]
        assert told.model.irpe_on == config["rpe_config"]["rpe_on"]


def side_of(config):
    """Pixels on the side of a case's images."""
    nested = [part for part in config.values() if isinstance(part, dict)]
    return next(part["img_size"] for part in (config, *nested) if "img_size" in part)


def test_a_deit_with_irpe_comes_back_and_its_tables_tell_what_they_are(tmp_path, capsys):
    cfg = Model(width=48, depth=2, heads=3, patch=8, irpe="cross", irpe_on="kv", irpe_mode="contextual")
    given, ours, back = (tmp_path / f"{part}.safetensors" for part in ("given", "ours", "back"))
    trunk = randomised(ViT(cfg, 32))
    save_file({name: value.clone() for name, value in trunk.state_dict().items()}, given)
    assert convert.main([str(given), str(ours), "--to", "halfseen", "--heads", "3"]) == 0
    assert "irpe -> halfseen" in capsys.readouterr().out
    told = architecture.of_file(ours).model
    assert (told.irpe, told.irpe_on, told.irpe_mode, told.irpe_shared) == ("cross", "kv", "contextual", True)
    assert convert.main([str(ours), str(back), "--to", "irpe"]) == 0
    assert same(load_file(back), load_file(given))
    save_file({name: value.clone() for name, value in ViT(replace(cfg, irpe="quant"), 32).state_dict().items()}, given)
    assert convert.main([str(given), str(ours), "--to", "halfseen", "--heads", "3"]) == 0
    assert "do not tell their method" in capsys.readouterr().out


def test_a_transformers_file_is_proven_by_transformers(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 96}
    config = transformers.ViTConfig(**sizes, image_size=64, patch_size=16)
    randomised(transformers.ViTForImageClassification(config)).save_pretrained(tmp_path)
    given, ours, back = (tmp_path / name for name in ("model.safetensors", "ours.safetensors", "back.safetensors"))
    assert convert.main([str(given), str(ours), "--to", "halfseen"]) == 0
    assert "equal to transformers" in capsys.readouterr().out
    assert json.loads(metadata(ours)["architecture"])["model"]["norm_eps"] == 1e-12
    assert convert.main([str(ours), str(back), "--to", "transformers_vit", "--no-proof", "--heads", "3"]) == 0
    assert same(load_file(back), load_file(given))


def test_transformers_reads_what_is_written_for_it(tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    given, folder = timm_file(tmp_path / "given.pth", "beit_base_patch16_224", **SMALL), tmp_path / "model"
    folder.mkdir()
    assert (
        convert.main([given, str(folder / "model.safetensors"), "--to", "transformers_beit", "--coverage", "0.9"]) == 0
    )
    capsys.readouterr()
    model, told = transformers.AutoModelForImageClassification.from_pretrained(folder, output_loading_info=True)
    assert type(model).__name__ == "BeitForImageClassification"
    assert not told["unexpected_keys"]
    assert not [name for name in told["missing_keys"] if not name.endswith("mask_token")]
    image = torch.randn(2, 3, 64, 64)
    theirs = timm.create_model("beit_base_patch16_224", **SMALL).eval()
    theirs.load_state_dict(torch.load(given, weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(image).logits, theirs(image), rtol=1e-4, atol=1e-4)


def test_parts_the_destination_lacks_are_refused(tmp_path):
    given = timm_file(tmp_path / "given.pth", "beit_base_patch16_224", **SMALL)
    with pytest.raises(ConfigError, match=r"has no place for encoder\.blocks"):
        convert.main([given, str(tmp_path / "out.safetensors"), "--to", "transformers_vit"])
    assert not (tmp_path / "out.safetensors").exists()


def test_a_run_tells_its_architecture_and_statistics(tmp_path, capsys):
    overrides = [
        *("model.width=32", "model.depth=2", "model.heads=2", "objective.mae.decoder_width=32", "data.workers=0"),
        *("run.images=96", "run.checkpoint_every=96", "optim.warmup=0", "monitor.tensorboard=false"),
        *(f"run.folder={tmp_path / 'run'}", "data.limit=48", "model.share=2"),
    ]
    assert pretraining.main(["pretrain/demo", *overrides]) == 0
    out = tmp_path / "out.safetensors"
    capsys.readouterr()
    assert convert.main([str(tmp_path / "run"), str(out), "--to", "halfseen"]) == 0
    told = metadata(out)
    assert json.loads(told["architecture"])["stem"] == "hmlp"
    assert json.loads(told["normalisation"])["mean"] == [0.485, 0.456, 0.406]
    assert told["stage"] == "pretrain"
    assert "has no such" in json.loads(told["proof"])["reason"]  # nobody else shares blocks behind an hMLP stem
