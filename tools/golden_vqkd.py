"""BEiT v2's tokenizer, from official weights: codes, losses, gradients, the codebook after updates; and its k-means."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from halfseen.config import Model
from halfseen.layouts import LAYOUTS
from halfseen.models import ViT
from halfseen.pretrain.targets.features import Apart, Distance
from halfseen.pretrain.tokenizers.quantizer import QuantizerConfig, kmeans
from halfseen.pretrain.tokenizers.vqkd import VQKD, Decoder, VQKDConfig

from .golden import TRUNK, Case, Check, Family, exact, gradients, image_size, load, outputs, refuse_unknown, trunk
from .golden_beit import BEIT, UNILM, beit_model, beit_trunk

PARTS = (*BEIT, "num_classes", "use_mean_pooling")
TOKENIZER = (
    *("img_size", "patch_size", "encoder", "decoder", "teacher", "code_dim", "n_code", "ema_decay", "beta"),
    *("norm_layer", "process_type"),
)
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def student_of(case: Case, width: int) -> VQKD:
    """Our VQ-KD from the arguments of the original class, with the case's weights. width: the teacher's channels."""
    config = case.config
    encoder, decoder = ({"norm_layer": config["norm_layer"]} | config[part] for part in ("encoder", "decoder"))
    for part in (encoder, decoder):
        refuse_unknown(part, PARTS)
    cfg = VQKDConfig(
        decoder_width=decoder["embed_dim"],
        decoder_depth=decoder["depth"],
        decoder_heads=decoder["num_heads"],
        quantizer=QuantizerConfig(
            codes=config["n_code"],
            width=config["code_dim"],
            decay=config.get("ema_decay", 0.99),
            commitment=config.get("beta", 1.0),
        ),
    )
    target: Any = Apart(Distance("cosine"), width, encoder["patch_size"])
    student = VQKD(beit_trunk(encoder), cfg, target)
    # Ours is of the encoder's kind, the original's has arguments of its own.
    model = beit_model(decoder | {"in_chans": 3})
    student.decoder = Decoder(model, student.encoder.grid, config["code_dim"])
    load(student, case, LAYOUTS["vqkd"])
    return student


def teacher_of(case: Case) -> ViT:
    """The case's small DINO teacher: a plain ViT, named as timm's."""
    config: Mapping[str, Any] = case.config["teacher"]
    refuse_unknown(config, TRUNK)
    settings = {"norm_layer": case.config["norm_layer"], "img_size": case.config["img_size"]} | dict(config)
    model: Model = trunk(settings)
    teacher = ViT(model, image_size(settings))
    prefix = "teacher_model."
    weights = {name.removeprefix(prefix): value for name, value in case.state.items() if name.startswith(prefix)}
    ours = LAYOUTS["timm"].take(weights)
    teacher.load_state_dict({name.removeprefix("encoder."): value for name, value in ours.items()})
    return teacher.requires_grad_(False).eval()


def processed(pixels: Tensor, kind: str) -> Tensor:
    """What the trunk sees of pixels: by default -1 .. 1 of 0 .. 1 or 0 .. 255; imagenet_norm; else as they are."""
    if kind == "imagenet_norm":
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)
        return (pixels - mean) / std
    if kind != "default":
        return pixels
    return 2 * (pixels if pixels.max() <= 1 else pixels / 255) - 1


def tokenizer(case: Case) -> list[Check]:
    """Evaluation, a training step with its gradients, and the codebook after one and after two of them."""
    config = case.config
    refuse_unknown(config, TOKENIZER)
    teacher = teacher_of(case)
    student = student_of(case, teacher.width)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in IMAGENET)

    def batch_of(pixels: Tensor) -> dict[str, Tensor]:
        image = processed(pixels, config.get("process_type", "default"))
        seen = ((image + 1) / 2).clamp(0, 1)  # whatever was done to the pixels, the teacher's input undoes the default
        features = teacher((seen - mean) / std)[:, teacher.prefix :]
        return {"image": image, "target": features, "position": torch.arange(len(pixels))}

    first, second = batch_of(case.inputs["images"]), batch_of(case.inputs["images2"])
    actual = evaluated(student.eval(), first)
    student.train()
    scalars = student(first)
    scalars["loss"].backward()
    actual |= {
        "train/total_loss": scalars["loss"],
        "train/quant_loss": scalars["commitment"],
        "train/rec_loss": scalars["reconstruction"],
    }
    actual |= gradients(student, LAYOUTS["vqkd"])
    never = torch.zeros(())
    for count, batch in ((1, None), (2, second)):
        if batch is not None:
            student(batch)
        student.stepped(never)
        official = LAYOUTS["vqkd"].give(dict(student.named_buffers()))
        for name in ("quantize.embedding.weight", "quantize.cluster_size"):
            actual[f"train_after{count}/{name}"] = official[name].clone()
    return outputs(case, actual)


@torch.no_grad()
def evaluated(student: VQKD, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the evaluation of the original gives; it counts the use of codes there, too."""
    tokens = student.encoder(batch["image"])[:, student.encoder.prefix :]
    vectors = student.vectors(batch["image"])
    codewords, codes, _ = student.quantizer(vectors)
    scalars, predicted = student(batch), student(batch | {"task": "predict"})
    counts = torch.bincount(codes.flatten(), minlength=student.count).float()
    decay = student.quantizer.cfg.decay
    return {
        "eval/preprocessed_mean": batch["image"].mean(),
        "eval/target": batch["target"],
        "eval/encoder_features": tokens,
        "eval/pre_quant": vectors,
        "eval/quantized": codewords.transpose(1, 2).unflatten(2, student.encoder.grid),
        "eval/codes": predicted["codes"],
        "eval/get_codebook_indices": student.codes(batch["image"]),
        "eval/quant_loss": scalars["commitment"],
        "eval/rec": predicted["prediction"],
        "eval/rec_loss": scalars["reconstruction"],
        "eval/total_loss": scalars["loss"],
        "eval_after/quantize.cluster_size": decay * student.quantizer.usage + (1 - decay) * counts,
    }


def clusters(case: Case) -> list[Check]:
    """k-means by cosine after one round and after all."""
    config = case.config
    refuse_unknown(config, ("samples", "clusters", "dim", "iters", "use_cosine_sim"))
    if not config.get("use_cosine_sim", True):
        raise ValueError("use_cosine_sim=false: only by cosine, as the codebook starts")
    samples = case.inputs["samples"]
    means = samples[case.inputs["init_indices"]]
    checks = []
    for suffix, rounds in (("", config["iters"]), ("_1iter", 1)):
        found, counts = kmeans(samples, means, rounds)
        checks += [
            Check(f"out/means{suffix}", found, case.outputs[f"means{suffix}"]),
            exact(f"out/bins{suffix}", counts, case.outputs[f"bins{suffix}"]),
        ]
    return checks


CONSTANT = "the original never changes it, and nothing reads it"
FAMILIES = (
    Family(
        "beit2_vqkd",
        UNILM,
        "beit2/modeling_vqkd.py",
        tokenizer,
        {f"train_after{count}/quantize.embedding.cluster_size": CONSTANT for count in (1, 2)},
    ),
    Family("beit2_kmeans", UNILM, "beit2/norm_ema_quantizer.py", clusters),
)
