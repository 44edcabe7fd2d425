"""PowerNorm: several training steps with its approximate backward and running statistics, then evaluation."""

import torch

from halfseen.models.powernorm import PowerNorm

from .golden import Case, Check, Family, exact, outputs, refuse_unknown

READ = ("num_features", "group_num", "warmup_iters", "alpha_fwd", "alpha_bkw", "eps", "affine")
STATED = ("T", "B", "steps", "start_iter")  # shapes, and what the stored state already holds


def steps(case: Case) -> list[Check]:
    """Output, gradients and statistics of every step; weights stay as they are."""
    config = case.config
    refuse_unknown(config, (*READ, *STATED))
    norm = PowerNorm(
        config["num_features"],
        config.get("eps", 1e-5),
        config.get("group_num", 1),
        config.get("warmup_iters", 10_000),
        (config.get("alpha_fwd", 0.9), config.get("alpha_bkw", 0.9)),
    )
    own = norm.state_dict()
    norm.load_state_dict({name: value.reshape(own[name].shape) for name, value in case.state.items()})
    padding = case.inputs.get("pad_mask")
    counted = None if padding is None else ~padding.bool().t()
    actual: dict[str, torch.Tensor] = {}
    for step in range(len(case.inputs["x"])):
        x = case.inputs["x"][step].clone().requires_grad_()
        norm.zero_grad()
        out = norm(x, counted)
        (out * case.inputs["loss_weight"][step]).sum().backward()
        grads = {"input": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
        found = {f"grad_{name}": grad for name, grad in grads.items() if grad is not None}
        buffers = {name: value.clone() for name, value in norm.named_buffers()}
        actual |= {f"step{step}/{name}": value.clone() for name, value in (found | buffers | {"output": out}).items()}
    with torch.no_grad():
        actual["eval_output"] = norm.eval()(case.inputs["x"][0], counted)
    shaped = {name: value.reshape(case.outputs[name].shape) for name, value in actual.items() if name in case.outputs}
    checks = outputs(case, shaped)
    if "start_iter" in config:
        checks.append(
            exact("config/start_iter", case.state["iters"], torch.full_like(case.state["iters"], config["start_iter"]))
        )
    return checks


FAMILIES = (Family("powernorm", "sIncerass/powernorm", "mask_powernorm.py", steps),)
