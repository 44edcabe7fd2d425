"""MAE's cases: pretraining model, fine-tuning model, and real training steps, from official weights."""

import torch
from torch import Tensor

from halfseen import optim
from halfseen.classification import Task
from halfseen.classification.classifier import Classifier
from halfseen.classification.mixing import soft_targets
from halfseen.config import Optim
from halfseen.data.masks import mask_from_noise
from halfseen.layouts import LAYOUTS, rename
from halfseen.models import ViT
from halfseen.pretrain.config import Mask
from halfseen.pretrain.mae import MAE, MAEConfig
from halfseen.pretrain.patches import patchify
from halfseen.pretrain.targets import Pixels

from .golden import (
    TRUNK,
    Case,
    Check,
    Family,
    exact,
    gradients,
    image_size,
    load,
    names,
    number_in,
    numbers,
    outputs,
    refuse_unknown,
    trunk,
    whole_ratio,
)

REPO = "facebookresearch/mae"
LAYOUT = LAYOUTS["mae"]
DECODER = (
    *("decoder_embed_dim", "decoder_depth", "decoder_num_heads", "mask_ratio", "norm_pix_loss"),
    "len_keep",  # what the original derived; the mask comparison checks it
)
STEPS = (
    *("lr", "min_lr", "warmup_epochs", "epochs", "iters_per_epoch", "accum_iter", "steps"),
    *("betas", "eps", "weight_decay", "clip_grad", "decayed", "not_decayed"),
)


def student_of(case: Case) -> tuple[MAE, Pixels]:
    """Our MAE and its target from the arguments of the original class, with the case's weights."""
    config = case.config
    width = config.get("decoder_embed_dim", 512)
    cfg = MAEConfig(
        decoder_width=width,
        decoder_depth=config.get("decoder_depth", 8),
        decoder_heads=config.get("decoder_num_heads", 16),
        decoder_mlp_ratio=whole_ratio(width, config.get("mlp_ratio", 4.0)),
    )
    encoder = ViT(trunk(config, position="sincos"), image_size(config))
    target = Pixels(encoder.patch, config.get("norm_pix_loss", False))
    student = MAE(encoder, cfg, Mask(ratio=config.get("mask_ratio", 0.75)).hidden(encoder.tokens), target)
    load(student, case, LAYOUT)
    return student, target


def pretrain(case: Case) -> list[Check]:
    """Loss, prediction, mask, latent, target and gradients from given noise."""
    refuse_unknown(case.config, (*TRUNK, *DECODER))
    student, target = student_of(case)
    image, noise = case.inputs["images"], case.inputs["noise"]
    mask = mask_from_noise(noise, student.hidden)
    batch = {"image": image, "mask": mask}
    with torch.no_grad():
        predicted = student(batch | {"task": "predict"})
    loss = student(batch | {"target": target(batch)})["loss"]
    loss.backward()
    # The original keeps visible tokens in the order of their noise, we in the order of the image.
    kept = noise.argsort(dim=1)[:, : student.visible]
    place = kept.argsort(dim=1).argsort(dim=1)[..., None].expand(-1, -1, student.encoder.width)
    prefix = student.encoder.prefix
    latent = predicted["latent"]
    actual = {
        "loss": loss,
        "pred": predicted["prediction"],
        "latent": torch.cat([latent[:, :prefix], latent[:, prefix:].gather(1, place)], dim=1),
        "target": patchify(image, target.patch),
    }
    restore = case.outputs["ids_restore"]
    return [
        *outputs(case, actual | gradients(student, LAYOUT)),
        exact("out/mask", mask, case.outputs["mask"].bool()),
        # Visible patches are those that the inverse shuffle sends to the first places.
        exact("out/ids_restore", mask, restore >= student.visible),
    ]


def finetune(case: Case) -> list[Check]:
    """Features, scores, both losses and gradients of the fine-tuning ViT."""
    config = case.config
    refuse_unknown(config, (*TRUNK, "global_pool", "num_classes"))
    encoder = ViT(trunk(config), image_size(config))
    task = Task(pool="mean" if config.get("global_pool", False) else "class")
    student = Classifier(encoder, task, config["num_classes"]).eval()
    load(student, case, LAYOUT)
    image, labels = case.inputs["images"], case.inputs["labels"]
    smoothing = number_in(case.meta["meaning"]["out/loss_smooth"], r"smoothing ([0-9.]+)")
    smooth = soft_targets(labels, config["num_classes"], smoothing)
    with torch.no_grad():
        predicted = student({"image": image, "task": "predict"})
        loss_smooth = student({"image": image, "target": smooth})["loss"]
    loss_soft = student({"image": image, "target": case.inputs["soft_labels"]})["loss"]
    loss_soft.backward()
    losses = {"loss_soft": loss_soft, "loss_smooth": loss_smooth}
    return outputs(case, predicted | losses | gradients(student, LAYOUT))


def train_steps(case: Case) -> list[Check]:
    """The official loop on our student, groups, optimizer and schedule: losses, rates, final weights."""
    config = case.config
    refuse_unknown(config, (*TRUNK, *DECODER, *STEPS))
    student, target = student_of(case)
    cfg = Optim(
        base_lr=None,
        lr=config["lr"],
        min_lr=config.get("min_lr", 0.0),
        betas=tuple(config["betas"]),
        eps=config["eps"],
        weight_decay=config["weight_decay"],
        clip=config.get("clip_grad"),
    )
    parameters = {name: p for name, p in student.named_parameters() if p.requires_grad}
    groups = optim.groups(student, cfg)
    optimizer = optim.build(cfg, groups, parameters)
    images, noise = case.inputs["images"], case.inputs["noise"]
    epoch = config["iters_per_epoch"] * images.shape[1]  # images
    schedule = optim.Schedule(cfg, config["lr"], config["warmup_epochs"] * epoch, config["epochs"] * epoch)
    accumulate = config.get("accum_iter", 1)
    losses, rates, norms = [], [], []
    for step in range(len(images)):
        iteration = step % config["iters_per_epoch"]
        if iteration == 0:
            optimizer.zero_grad()  # the official loop drops what an epoch left accumulated
        if iteration % accumulate == 0:
            rates.append(schedule.rate(step * images.shape[1]))
            optim.set_rate(optimizer, rates[-1])
        batch = {"image": images[step], "mask": mask_from_noise(noise[step], student.hidden)}
        loss = student(batch | {"target": target(batch)})["loss"]
        losses.append(loss.detach())
        (loss / accumulate).backward()
        if (iteration + 1) % accumulate == 0:
            limit = float("inf") if cfg.clip is None else cfg.clip
            norms.append(torch.nn.utils.clip_grad_norm_(parameters.values(), limit))
            optimizer.step()
            optimizer.zero_grad()
    official = LAYOUT.from_ours(set(parameters))
    final = rename(parameters, official)
    actual: dict[str, Tensor] = {f"final/{name}": value for name, value in final.items()}
    actual |= {"losses": torch.stack(losses), "grad_norms": torch.stack(norms)}
    decayed = [official[name] for group in groups if group.weight_decay for name in group.names]
    return [
        *outputs(case, actual),
        numbers("out/lrs", rates, case.outputs["lrs"].tolist(), rtol=1e-6),  # stored in single precision
        names("config/decayed", decayed, config["decayed"]),
        names("config/not_decayed", set(final) - set(decayed), config["not_decayed"]),
    ]


FAMILIES = (
    Family("mae_pretrain", REPO, "models_mae.py", pretrain),
    Family("mae_finetune", REPO, "models_vit.py", finetune),
    Family("mae_train_steps", REPO, "main_pretrain.py", train_steps),
)
