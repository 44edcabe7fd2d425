"""Reference cases: what the tolerance of a comparison is, and weights in double."""

import torch
from torch import nn

from halfseen.layouts import Layout
from halfseen.tools.golden import Case, gradients, in_double, outputs


def case(**given):
    return Case("x_a", {"config": {}}, {"w": torch.ones(2)}, {"mask": torch.ones(2, dtype=torch.uint8)}, given, {})


def test_a_large_gradient_widens_no_tolerance_of_its_small_entries():
    expected = {"grad/w": torch.tensor([100.0, 0.0]), "features": torch.tensor([100.0, 0.0])}
    for apart, passed in ((1e-5, True), (1e-4, False)):
        for check in outputs(case(**expected), {name: torch.tensor([100.0, apart]) for name in expected}):
            assert check.passed is passed


def test_a_sum_of_terms_of_either_sign_is_judged_by_their_size_not_by_its_own():
    """A loss of random weights may come out near 0."""
    results = torch.tensor([100.0, -100.0])
    weighted = case(loss=torch.tensor(1e-3))
    weighted.inputs["loss_weight"] = torch.ones(2)
    for loss, passed in ((2e-3, True), (4e-3, False)):  # 1e-5 of the root of two squares of 100
        (check,) = outputs(weighted, {"loss": torch.tensor(loss), "output": results})
        assert check.passed is passed
    (check,) = outputs(case(loss=torch.tensor(1e-3)), {"loss": torch.tensor(2e-3), "output": results})
    assert not check.passed


def test_a_parameter_that_took_no_part_has_gradient_0_and_a_frozen_one_none():
    student = nn.Linear(2, 2)
    student.bias.requires_grad_(False)
    identity = Layout("x", "", lambda names: True, *[lambda names: {name: name for name in names}] * 2)
    found = gradients(student, identity)
    assert set(found) == {"grad/weight"}
    assert not found["grad/weight"].any()


def test_in_double_leaves_masks_and_outputs_as_they_are():
    doubled = in_double(case(features=torch.ones(1)))
    assert doubled.state["w"].dtype == torch.float64
    assert doubled.inputs["mask"].dtype == torch.uint8
    assert doubled.outputs["features"].dtype == torch.float32
