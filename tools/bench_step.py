"""``halfseen bench step``: time a recipe's training step, next to other implementations of the same job."""

import argparse
import contextlib
import importlib
import json
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from halfseen import receipt
from halfseen.config import ConfigError
from halfseen.models import ViT
from halfseen.monitor import peak_tflops
from halfseen.pretrain import masks, objectives, targets
from halfseen.pretrain.config import Pretrain
from halfseen.recipes import load

DTYPES = {"fp32": None, "bf16": torch.bfloat16}


@dataclass
class Job:
    """One implementation at one precision: a step to call, and what its calls took."""

    name: str
    precision: str
    step: Callable[[], Tensor]  # forward, backward and update of one batch; returns the loss
    seconds: list[float] = field(default_factory=list)  # wall clock; on CUDA between two events
    cpu_seconds: list[float] = field(default_factory=list)  # processor time of the whole process
    memory: int = 0  # CUDA: peak bytes allocated by one step

    @property
    def label(self) -> str:
        """Name and precision."""
        return f"{self.name} {self.precision}"


def main(argv: Sequence[str]) -> int:
    """``halfseen bench step [RECIPE] [key=value ...] [options]``; returns the exit code."""
    arguments = parse(argv)
    recipe = arguments.items[0] if arguments.items and "=" not in arguments.items[0] else None
    config = load(Pretrain, recipe, arguments.items[1:] if recipe else arguments.items)
    device = torch.device(device_of(config.engine.device))
    torch.set_num_threads(arguments.threads)
    jobs = [
        create(name, config, arguments.batch, precision, device, arguments.peer_adamw)
        for precision in arguments.precision
        for name in ("halfseen", *arguments.against)
    ]
    measure(jobs, device, arguments.repeats)
    result = report(config, jobs, arguments, device)
    print(table(result))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""

    def names(known: Sequence[str]) -> Callable[[str], list[str]]:
        def split(text: str) -> list[str]:
            chosen = [name for name in text.split(",") if name]
            for name in chosen:
                if name not in known:
                    raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
            return chosen

        return split

    parser = argparse.ArgumentParser(prog="halfseen bench step", description=__doc__)
    parser.add_argument("items", nargs="*", metavar="RECIPE | key=value", help="what to train (default: MAE-B)")
    parser.add_argument("--against", type=names(list(PEERS)), default=[], help="transformers,lightly")
    parser.add_argument("--precision", type=names(list(DTYPES)), default=["fp32"], help="fp32,bf16 (autocast)")
    parser.add_argument(
        "--peer-adamw",
        choices=["fused", "default"],
        default="fused",
        help="AdamW of peers: as ours (fused), or default",
    )
    parser.add_argument("--batch", type=int, default=8, help="images per step (8)")
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each, interleaved (5)")
    parser.add_argument("--threads", type=int, default=1, help="threads on the CPU (1)")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    return parser.parse_intermixed_args(list(argv))


def device_of(name: str) -> str:
    """The device a config names; auto takes a GPU if there is one."""
    if name != "auto":
        return name
    return "cuda" if torch.cuda.is_available() else "cpu"


# --------------------------------------------------------------------------------------------------- the jobs


def create(
    name: str, config: Pretrain, batch: int, precision: str, device: torch.device, peer_adamw: str = "fused"
) -> Job:
    """The job of one implementation: random weights, one resident batch of random images, AdamW (ours fused)."""
    torch.manual_seed(0)
    size = config.data.image_size
    image = torch.randn(batch, 3, size, size, device=device)
    module, loss_of = PEERS[name](config, image) if name in PEERS else halfseen(config, image)
    module.to(device).train()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # fused=None is PyTorch's own choice, what a training script gets that does not ask.
    fused = True if name not in PEERS or peer_adamw == "fused" else None
    decay = config.optim.weight_decay
    optimizer = torch.optim.AdamW(trained, lr=1e-4, betas=config.optim.betas, weight_decay=decay, fused=fused)
    dtype = DTYPES[precision]

    def step() -> Tensor:
        with torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext():
            loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return Job(name, precision, step)


def halfseen(config: Pretrain, image: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """Our student; mask and target are made within the step, as in training."""
    target = targets.create(config, image.device)
    student = objectives.create(config, target)
    if config.engine.compile:
        for block in student.blocks():
            block.compile()
    draw = masks.create(config)
    position = torch.arange(len(image), device=image.device)

    def loss() -> Tensor:
        mask = draw(config.run.seed, position)
        batch = {"image": image, "mask": mask, "target": target({"image": image})}
        return student(batch)["loss"]

    return student, loss


def transformers(config: Pretrain, image: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """ViTMAEForPreTraining of the transformers library."""
    library = optional("transformers")
    trunk, objective = trunk_of(config), config.objective.mae
    settings = library.ViTMAEConfig(
        image_size=config.data.image_size,
        patch_size=trunk.patch,
        hidden_size=trunk.width,
        num_hidden_layers=trunk.depth,
        num_attention_heads=trunk.size.heads,
        intermediate_size=trunk.size.hidden,
        decoder_hidden_size=objective.decoder_width,
        decoder_num_hidden_layers=objective.decoder_depth,
        decoder_num_attention_heads=objective.decoder_heads,
        decoder_intermediate_size=4 * objective.decoder_width,
        mask_ratio=config.mask.ratio,
        norm_pix_loss=config.target.normalise,
        layer_norm_eps=config.model.norm_eps,
    )
    student = library.ViTMAEForPreTraining(settings)
    return student, lambda: student(pixel_values=image).loss


def lightly(config: Pretrain, image: Tensor) -> tuple[nn.Module, Callable[[], Tensor]]:
    """MAE assembled from lightly's modules over a timm ViT."""
    tools = optional("lightly.models.utils")
    modules = "lightly.models.modules.masked_"
    trunk, objective = trunk_of(config), config.objective.mae
    vit = importlib.import_module("timm.models.vision_transformer").VisionTransformer(
        img_size=config.data.image_size,
        patch_size=trunk.patch,
        embed_dim=trunk.width,
        depth=trunk.depth,
        num_heads=trunk.size.heads,
        mlp_ratio=trunk.size.mlp_ratio,
        num_classes=0,
    )
    encoder = optional(f"{modules}vision_transformer_timm").MaskedVisionTransformerTIMM(vit=vit)
    decoder = optional(f"{modules}autoencoder_timm").MAEDecoderTIMM(
        num_patches=trunk.tokens,
        patch_size=trunk.patch,
        embed_dim=trunk.width,
        decoder_embed_dim=objective.decoder_width,
        decoder_depth=objective.decoder_depth,
        decoder_num_heads=objective.decoder_heads,
    )
    shape = (len(image), encoder.sequence_length)

    def loss() -> Tensor:
        kept, hidden = tools.random_token_mask(shape, config.mask.ratio, device=image.device)
        seen = decoder.embed(encoder.encode(images=image, idx_keep=kept))
        tokens = tools.repeat_token(decoder.mask_token, shape)
        tokens = decoder.decode(tools.set_at_index(tokens, kept, seen.type_as(tokens)))
        prediction = decoder.predict(tools.get_at_index(tokens, hidden))
        # Its token numbers count the class token.
        target = tools.get_at_index(tools.patchify(image, trunk.patch), hidden - 1)
        if config.target.normalise:
            target = tools.normalize_mean_var(target)
        return nn.functional.mse_loss(prediction.float(), target)

    return nn.ModuleList([encoder, decoder]), loss


PEERS = {"transformers": transformers, "lightly": lightly}

# What halfseen must reach: its precision -> (peer, the peer's precision, how many times longer the peer's step takes).
BARS = {"fp32": ("transformers", "fp32", 1.10), "bf16": ("transformers", "fp32", 2.0)}


def optional(module: str) -> Any:
    """A peer's module. Raises ConfigError with the way to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ConfigError(
            "--against", name, f"cannot be imported ({error})", "pip install 'halfseen[bench]'"
        ) from error


def trunk_of(config: Pretrain) -> ViT:
    """The trunk without storage, for its sizes. Raises ConfigError for trunks that no peer has."""
    model = config.model
    parts = {
        "stem": "patch",
        "position": "sincos",
        "parallel": 1,
        "share": 1,
        "registers": 0,
        "class_token": True,
    }
    for name, value in parts.items():
        if getattr(model, name) != value:
            reason = "the peers only have MAE's own trunk"
            raise ConfigError(f"model.{name}", getattr(model, name), reason, f"model.{name}={value}, or no --against")
    with torch.device("meta"):
        return ViT(model, config.data.image_size)


# ------------------------------------------------------------------------------------------------ measurement


def measure(jobs: list[Job], device: torch.device, repeats: int) -> None:
    """Time every job once per round, in an order that turns with the round, so that all see the same machine."""
    for job in jobs:
        for _ in range(2):
            job.step()
    for number in range(repeats):
        turn = number % len(jobs)
        for job in jobs[turn:] + jobs[:turn]:
            (time_cuda if device.type == "cuda" else time_cpu)(job)


def time_cpu(job: Job) -> None:
    """One step, in wall-clock and processor seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    job.step()
    job.cpu_seconds.append(time.process_time() - processor)
    job.seconds.append(time.perf_counter() - wall)


def time_cuda(job: Job) -> None:
    """One step between two events, and its peak memory."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    processor = time.process_time()
    begin.record()
    job.step()
    end.record()
    torch.cuda.synchronize()
    job.cpu_seconds.append(time.process_time() - processor)
    job.seconds.append(begin.elapsed_time(end) / 1e3)
    job.memory = max(job.memory, torch.cuda.max_memory_allocated())


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least, and the quartiles."""
    low, _, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [values[0]] * 3
    return {"median": statistics.median(values), "min": min(values), "q1": low, "q3": high}


# ------------------------------------------------------------------------------------------------ the report


def report(config: Pretrain, jobs: list[Job], arguments: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Everything measured, and where: what --json writes."""
    ours = [job for job in jobs if job.name == "halfseen"]
    with torch.device("meta"):
        student = objectives.create(config, targets.create(config, torch.device("meta")))
    flops = student.train_flops_per_image() * arguments.batch
    on_gpu = device.type == "cuda"
    peak = config.monitor.peak_tflops or (peak_tflops(torch.cuda.get_device_name(device)) if on_gpu else None)
    # On a CPU with one thread processor time leaves out what other processes take.
    clock = "seconds" if on_gpu or arguments.threads > 1 else "cpu_seconds"
    rows = []
    for job in jobs:
        timing = spread(getattr(job, clock))
        tflops = flops / timing["median"] / 1e12
        row: dict[str, Any] = {"name": job.name, "precision": job.precision, "seconds": timing}
        row |= {"images_per_second": arguments.batch / timing["median"], "memory_bytes": job.memory or None}
        if job.name == "halfseen":
            row |= {"tflops": tflops, "mfu": tflops / peak if peak else None}
        else:
            row["ratio"] = {mine.precision: paired(getattr(job, clock), getattr(mine, clock)) for mine in ours}
        row["all_seconds"] = getattr(job, clock)
        rows.append(row)
    return {
        "clock": clock,
        "batch": arguments.batch,
        "threads": arguments.threads,
        "peer_adamw": arguments.peer_adamw,
        "train_flops_per_image": student.train_flops_per_image(),
        "parameters": sum(parameter.numel() for parameter in student.parameters()),
        "jobs": rows,
        "bars": verdicts(rows),
        "process_peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "device": torch.cuda.get_device_name(device) if on_gpu else receipt.processor(),
        "versions": receipt.versions() | {name: receipt.installed(name) for name in arguments.against},
        "source": receipt.source(),
    }


def verdicts(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each bar whose two sides were measured: the median ratio, and whether it is met."""
    found = []
    for mine, (peer, precision, least) in BARS.items():
        for row in rows:
            if (row["name"], row["precision"]) == (peer, precision) and mine in row["ratio"]:
                ratio = row["ratio"][mine]["median"]
                bar = {"halfseen": mine, "peer": f"{peer} {precision}", "least": least}
                found.append(bar | {"ratio": ratio, "met": ratio >= least})
    return found


def paired(theirs: Sequence[float], mine: Sequence[float]) -> dict[str, float]:
    """How many times longer they take: per round, and from each one's best step."""
    return spread([a / b for a, b in zip(theirs, mine)]) | {"of_mins": min(theirs) / min(mine)}


def table(result: dict[str, Any]) -> str:
    """The figures as text."""
    clock = {"seconds": "wall seconds", "cpu_seconds": "processor seconds"}[result["clock"]]
    lines = [
        f"{result['device']}, {result['threads']} threads, batch {result['batch']}, "
        f"{result['parameters'] / 1e6:.1f} M parameters, {result['train_flops_per_image'] / 1e9:.2f} GFLOP/image",
        f"one step in {clock}: forward, backward, AdamW (peers: {result['peer_adamw']}); median (least; quartiles)",
    ]
    for row in result["jobs"]:
        timing = row["seconds"]
        text = f"  {row['name'] + ' ' + row['precision']:<18} {timing['median']:.4f} ({timing['min']:.4f}; "
        text += f"{timing['q1']:.4f}-{timing['q3']:.4f})  {row['images_per_second']:9.1f} img/s"
        if row["memory_bytes"]:
            text += f"  {row['memory_bytes'] / 2**20:.0f} MiB"
        if "tflops" in row:
            text += f"  {row['tflops']:.3f} TFLOP/s" + (f"  MFU {row['mfu']:.1%}" if row["mfu"] else "")
        for precision, ratio in row.get("ratio", {}).items():
            text += f"\n      {ratio['median']:.2f}x halfseen {precision} (quartiles {ratio['q1']:.2f}-"
            text += f"{ratio['q3']:.2f}; of least times {ratio['of_mins']:.2f})"
        lines.append(text)
    for bar in result["bars"]:
        lines.append(
            f"bar {'met' if bar['met'] else 'NOT MET'}: halfseen {bar['halfseen']} is {bar['ratio']:.2f}x "
            f"{bar['peer']}, needed {bar['least']:.2f}x"
        )
    lines.append(f"process peak memory {result['process_peak_rss_bytes'] / 2**20:.0f} MiB")
    return "\n".join(lines)
