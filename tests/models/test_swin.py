"""Swin: equal to timm's, its sharing as published, and safe however it is run."""

import pytest
import timm
import torch
from torch.utils.checkpoint import checkpoint

from halfseen.classification import Classifier, Task
from halfseen.config import ConfigError
from halfseen.layouts import LAYOUTS, detect
from halfseen.models.swin import Swin, SwinConfig

TINY = {"width": 16, "depths": [2, 4], "heads": [2, 4], "window": 4}
MINI = TINY | {"share": [2, 2], "mix_heads": True, "local_conv": True}


def trunk(image_size=32, **options):
    torch.manual_seed(0)
    made = Swin(SwinConfig(**options), image_size)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.2)
    return made


def test_the_function_and_the_names_are_timms():
    theirs = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, num_classes=5, window_size=4, depths=(2, 2))
    theirs.eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, 0.5 * (parameter.ndim == 1), 0.05)
    ours = Classifier(Swin(SwinConfig(depths=[2, 2], heads=[3, 6], window=4), 64), Task(pool="norm_mean"), 5)
    layout = detect(theirs.state_dict())
    assert layout.name == "timm_swin"
    ours.load_state_dict(layout.take(theirs.state_dict()))
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours({"image": image, "task": "predict"})["logits"], theirs(image))
    assert set(layout.give(ours.state_dict())) == {name for name, _ in theirs.named_parameters()}


@pytest.mark.parametrize(
    ("size", "share", "count"),
    [("t", [2, 2, 6, 2], 12_001_765), ("s", [2] * 4, 26_463_205), ("b", [2] * 4, 46_444_852)],
)
def test_mini_swin_has_the_published_number_of_parameters(size, share, count):
    cfg = SwinConfig(size=size, share=share, mix_heads=True, local_conv=True)
    student = Classifier(Swin(cfg, 224), Task(pool="norm_mean"), 1000)
    assert sum(parameter.numel() for parameter in student.parameters()) == count


def untied(shared: Swin) -> Swin:
    """The same function with every repetition as a block of its own."""
    options = {**vars(shared.cfg), "share": []}
    apart = Swin(SwinConfig(**options), 32)
    weights = {}
    for name in apart.state_dict():
        parts = name.split(".")
        if "blocks" in parts:
            block, repetition = divmod(int(parts[3]), 2)
            single = [*parts[:3], str(block), *parts[4:]]
            listed = [*single[:-1], str(repetition), single[-1]]
            weights[name] = shared.state_dict().get(".".join(listed), shared.state_dict().get(".".join(single)))
        else:
            weights[name] = shared.state_dict()[name]
    apart.load_state_dict(weights)
    return apart


def test_a_shared_weights_gradient_is_the_sum_over_its_uses():
    shared, image = trunk(**MINI), torch.randn(2, 3, 32, 32)
    apart = untied(shared)
    tokens = shared(image)
    torch.testing.assert_close(tokens, apart(image))
    probe = torch.randn_like(tokens)
    (tokens * probe).sum().backward()
    (apart(image) * probe).sum().backward()
    gradients = {name: parameter.grad for name, parameter in apart.named_parameters()}
    for part in ("attn.qkv.weight", "attn.relative_position_bias_table", "mlp.fc2.bias"):
        summed = gradients[f"layers.1.blocks.2.{part}"] + gradients[f"layers.1.blocks.3.{part}"]
        found = shared.get_parameter(f"layers.1.blocks.1.{part}").grad
        torch.testing.assert_close(found, summed, rtol=1e-4, atol=1e-4)
    alone = shared.get_parameter("layers.1.blocks.1.local_conv.1.weight").grad
    torch.testing.assert_close(alone, gradients["layers.1.blocks.3.local_conv.weight"], rtol=1e-4, atol=1e-4)


def test_recomputing_and_calling_one_repetition_at_a_time_change_nothing():
    whole = trunk(**MINI)
    image = torch.randn(2, 3, 32, 32)
    whole(image).square().sum().backward()
    expected = whole.get_parameter("layers.0.blocks.0.attn.qkv.weight").grad.clone()
    whole.zero_grad()
    for block in whole.blocks:
        plain = block.forward

        def forward(x, plain=plain, block=block):
            for repetition in range(len(block.rates)):
                x = checkpoint(plain, x, repetition, use_reentrant=False)
            return x

        block.forward = forward
    whole(image).square().sum().backward()
    torch.testing.assert_close(whole.get_parameter("layers.0.blocks.0.attn.qkv.weight").grad, expected)


def test_a_trace_returns_what_was_asked_and_changes_nothing():
    made, image = trunk(**MINI), torch.randn(2, 3, 32, 32)
    trace = made.trace(image, layers=[1, 4], qkv=[0, 5])
    torch.testing.assert_close(trace.tokens, made(image))
    assert {n: tuple(t.shape) for n, t in trace.layers.items()} == {1: (2, 64, 16), 4: (2, 16, 32)}
    assert {n: tuple(t.shape) for n, t in trace.qkv.items()} == {0: (2 * 4, 16, 48), 5: (2, 16, 96)}
    assert [made.stage_of(n) for n in range(6)] == [0, 0, 1, 1, 1, 1]
    assert (made.width_of(1), made.width_of(2)) == (16, 32)
    with pytest.raises(ValueError, match=r"\[6\]"):
        made.trace(image, layers=[6])


def moved_by(change, **options):
    """Places whose tokens change with one pixel, after the first block of a stage of four windows."""
    made = trunk(**{**TINY, "depths": [2], "heads": [2], **options}).eval()
    image = torch.zeros(1, 3, 32, 32)
    other = image.clone()
    other[..., change[0] * 4, change[1] * 4] = 1.0
    first, second = (made.trace(x, layers=[0, 1]).layers for x in (image, other))
    return [(first[n] != second[n]).any(-1).view(8, 8) for n in (0, 1)]


def test_blocks_look_in_windows_and_the_second_shifts_them():
    plain, shifted = moved_by((1, 1))
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[:4, :4] = True
    assert torch.equal(plain, expected)
    expected[:6, :6] = True  # windows of 4 moved by 2, and none across the border
    assert torch.equal(shifted, expected)


def test_the_released_mask_blocks_unshifted_windows_too():
    """In the last row of windows it parts places that no shift has brought together."""
    assert moved_by((7, 7))[0].sum() == 16
    assert moved_by((7, 7), mask_unshifted=True)[0].sum() == 4


def test_the_convolution_keeps_the_stream_unless_the_released_form_is_asked_for():
    options = {**TINY, "depths": [1], "heads": [2], "local_conv": True}
    ours, released = trunk(**options), trunk(**options, conv_on_norm=True)
    for made in (ours, released):
        made.get_parameter("layers.0.blocks.0.local_conv.weight").data.zero_()
        made.get_parameter("layers.0.blocks.0.local_conv.bias").data.zero_()
    image = torch.randn(1, 3, 32, 32)
    plain = trunk(**{**options, "local_conv": False})
    plain.load_state_dict({name: value for name, value in ours.state_dict().items() if "local" not in name})
    torch.testing.assert_close(ours(image), plain(image))
    assert not torch.allclose(released(image), plain(image), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "size", "key"),
    [
        ({"share": [3, 2]}, 32, "swin.share"),
        ({"heads": [3, 4]}, 32, "swin.heads"),
        ({"heads": [2]}, 32, "swin.heads"),
        ({}, 48, "data.image_size"),
    ],
)
def test_what_does_not_divide_is_refused(options, size, key):
    def make():
        cfg = SwinConfig(**{**TINY, **options})
        cfg.check("swin")
        Swin(cfg, size)

    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.key == key


def test_official_names_go_there_and_back():
    student = Classifier(trunk(**MINI), Task(pool="norm_mean"), 5)
    layout = LAYOUTS["mini_swin"]
    theirs = layout.give(student.state_dict())
    assert {"layers.0.blocks.0.norm1_list.1.weight", "layers.0.downsample.reduction.weight"} <= set(theirs)
    assert detect(theirs) is layout
    back = layout.take(theirs)
    assert back.keys() == student.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in student.state_dict().items())


def test_compiling_changes_nothing():
    one_stage = MINI | {"depths": [2], "heads": [2], "share": [2]}
    made, image = trunk(**one_stage).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        expected = made(image)
        for block in made.blocks:
            block.compile(backend="eager")
        torch.testing.assert_close(made(image), expected)
