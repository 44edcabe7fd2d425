"""Reference cases: what the tolerance of a comparison is, and weights in double."""

import torch

from halfseen.tools.golden import Case, in_double, outputs


def case(**given):
    return Case("x_a", {"config": {}}, {"w": torch.ones(2)}, {"mask": torch.ones(2, dtype=torch.uint8)}, given, {})


def passes(name, actual, **options):
    expected = torch.tensor([100.0, 0.0])
    (check,) = outputs(case(**{name: expected}), {name: torch.tensor(actual)}, **options)
    return check.passed


def test_noise_of_the_original_is_tolerated_in_gradients_alone_and_by_their_size():
    near = [100.0, 1e-4]
    assert not passes("grad/w", near)
    assert passes("grad/w", near, noise=2e-6)
    assert not passes("grad/w", [100.0, 3e-4], noise=2e-6)
    assert not passes("features", near, noise=2e-6)


def test_in_double_leaves_masks_and_outputs_as_they_are():
    doubled = in_double(case(features=torch.ones(1)))
    assert doubled.state["w"].dtype == torch.float64
    assert doubled.inputs["mask"].dtype == torch.uint8
    assert doubled.outputs["features"].dtype == torch.float32
