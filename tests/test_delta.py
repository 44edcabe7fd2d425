"""Base + delta is the fine-tuned student to the bit, whatever the base's names and types; anything else is refused."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from halfseen import delta
from halfseen.config import ConfigError
from halfseen.tools.delta import main

TYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool]


def tensor(rng, dtype, shape):
    bits = torch.randint(0, 256, (*shape, dtype.itemsize), generator=rng, dtype=torch.uint8)
    return bits.view(dtype).view(shape) if dtype != torch.bool else (bits[..., 0] > 99)


@st.composite
def pairs(draw):
    """A base and a result with equal, rounded, changed, resized, new, lost and tied tensors of any bits (NaN too)."""
    rng = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    base, result = {}, {}
    for number in range(draw(st.integers(1, 6))):
        name, dtype = f"encoder.blocks.{number}.w", draw(st.sampled_from(TYPES))
        shape = tuple(draw(st.lists(st.integers(0, 4), min_size=0, max_size=3)))
        base[name] = tensor(rng, dtype, shape)
        change = draw(st.sampled_from(["same", "rounded", "changed", "resized", "retyped", "lost", "tied"]))
        if change == "same":
            result[name] = base[name].clone()
        elif change == "rounded":
            result[name] = base[name].bfloat16().to(dtype) if base[name].is_floating_point() else base[name].clone()
        elif change == "resized":
            result[name] = tensor(rng, dtype, (*shape, 2))
        elif change == "retyped":
            result[name] = tensor(rng, draw(st.sampled_from(TYPES)), shape)
        elif change == "tied" and result:
            result[name] = next(iter(result.values()))
        elif change != "lost":
            result[name] = tensor(rng, dtype, shape)
    result["encoder.cls_token"] = tensor(rng, torch.float32, (2, 3))
    return base, result


@settings(max_examples=60, deadline=None)
@given(pair=pairs(), compress=st.booleans())
def test_base_and_delta_are_the_result_to_the_bit(pair, compress, tmp_path_factory):
    base, result = pair
    path = tmp_path_factory.mktemp("delta") / "d.safetensors"
    tensors, header = delta.make(base, result, compress=compress)
    delta.write(path, tensors, header)
    back = delta.apply(base, path)
    assert back.keys() == result.keys()
    assert all(delta.equal(back[name], result[name]) for name in result)


@pytest.fixture
def folder(tmp_path):
    """A base in MAE's names, and a result in ours in which attention moved a little."""
    rng = torch.Generator().manual_seed(0)
    base = {
        "cls_token": torch.randn(1, 1, 8, generator=rng),
        "blocks.0.attn.qkv.weight": torch.randn(24, 8, generator=rng),
        "blocks.0.mlp.fc1.weight": torch.randn(320, 80, generator=rng),
        "decoder_embed.weight": torch.randn(4, 8, generator=rng),
    }
    save_file(base, tmp_path / "base.safetensors")
    result = {f"encoder.{name}": value.clone() for name, value in base.items() if "decoder" not in name}
    result["encoder.blocks.0.attn.qkv.weight"] *= 1.001
    result["head.weight"] = torch.zeros(2, 8)
    save_file(result, tmp_path / "result.safetensors")
    return tmp_path


def test_only_what_changed_is_in_the_file_and_applying_it_gives_everything(folder, capsys):
    base, result, out = (str(folder / name) for name in ("base.safetensors", "result.safetensors", "d.safetensors"))
    assert main(["make", base, result, out]) == 0
    assert load_file(out).keys() == {"encoder.blocks.0.attn.qkv.weight", "head.weight"}
    assert main(["apply", base, out, str(folder / "whole.safetensors")]) == 0
    whole, expected = load_file(folder / "whole.safetensors"), load_file(result)
    assert whole.keys() == expected.keys()
    assert all(torch.equal(whole[name], expected[name]) for name in expected)
    assert main(["info", out]) == 0
    said = capsys.readouterr().out
    assert "2 of 4 tensors changed" in said
    assert "encoder.blocks.attn.qkv x1" in said


def test_another_base_and_a_damaged_delta_are_refused(folder):
    base, result, out = (folder / name for name in ("base.safetensors", "result.safetensors", "d.safetensors"))
    main(["make", str(base), str(result), str(out)])
    other = load_file(base)
    other["cls_token"][0, 0, 0] += 1e-6
    save_file(other, folder / "other.safetensors")
    with pytest.raises(ConfigError, match=r"made from other weights(.|\n)*base\.safetensors"):
        main(["apply", str(folder / "other.safetensors"), str(out), str(folder / "w.safetensors")])
    content = bytearray(out.read_bytes())
    content[-3] ^= 1
    out.write_bytes(bytes(content))
    with pytest.raises(ConfigError, match="is damaged"):
        main(["apply", str(base), str(out), str(folder / "w.safetensors")])
    assert not (folder / "w.safetensors").exists()
    with pytest.raises(ConfigError, match="is no delta file"):
        main(["info", str(base)])


def test_a_chain_of_deltas_and_several_on_one_base(folder, capsys):
    names = ("base.safetensors", "result.safetensors", "later.safetensors")
    base, result, later = (str(folder / name) for name in names)
    weights = load_file(result)
    weights["head.weight"] += 1
    save_file(weights, later)
    one, two = str(folder / "one.safetensors"), str(folder / "two.safetensors")
    main(["make", base, result, one])
    main(["make", result, later, two])
    main(["apply", base, one, two, str(folder / "end.safetensors")])
    assert torch.equal(load_file(folder / "end.safetensors")["head.weight"], weights["head.weight"])
    direct = str(folder / "direct.safetensors")
    main(["make", base, later, direct])
    capsys.readouterr()
    assert main(["stack", base, one, direct]) == 0
    assert "2 students on one base" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="made from other weights"):
        main(["stack", base, two])


def test_unchanged_tensors_share_the_memory_of_the_base(folder):
    base, result = load_file(folder / "base.safetensors"), load_file(folder / "result.safetensors")
    delta.write(folder / "d.safetensors", *delta.make(base, result))
    back = delta.apply(base, folder / "d.safetensors")
    assert back["encoder.blocks.0.mlp.fc1.weight"].data_ptr() == base["blocks.0.mlp.fc1.weight"].data_ptr()


def test_compression_takes_off_what_the_base_knows(folder):
    """A weight that moved by a thousandth keeps sign, exponent and leading digits."""
    base = {"encoder.blocks.0.w": torch.randn(300, 300, generator=torch.Generator().manual_seed(0))}
    result = {"encoder.blocks.0.w": base["encoder.blocks.0.w"] * 1.001}
    sizes = []
    for compress in (False, True):
        delta.write(folder / "d.safetensors", *delta.make(base, result, compress=compress))
        sizes.append((folder / "d.safetensors").stat().st_size)
    assert sizes[1] < 0.75 * sizes[0]
