"""What a run reports: console, TensorBoard and metrics.jsonl, written by rank 0 at log time only."""

import json
import math
import re
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from halfseen.config import ConfigError, duration
from halfseen.config import Monitor as Options
from halfseen.distributed import World
from halfseen.writing import write_whole

# Dense bf16 peak (fp16 where a GPU has no bf16) in TFLOP/s by a part of the device's name, from the makers'
# data sheets. The first match counts, so variants stand before the plain name.
PEAKS = (
    ("B200", 2250.0),
    ("H200 NVL", 835.0),
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H20", 148.0),
    ("A100", 312.0),
    ("A30", 165.0),
    ("A40", 150.0),
    ("A10G", 70.0),
    ("A10", 125.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L4", 121.0),
    ("V100", 125.0),
    ("T4", 65.0),
    ("RTX 4090", 165.0),
    ("MI300X", 1307.0),
)

# The order and wording of a console line; what is not listed here goes to TensorBoard and metrics.jsonl only.
CONSOLE = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.1%}",
    "lr": "lr {:.2e}",
    "grad_norm": "grad norm {:.3g}",
    "images_per_second": "{:,.0f} img/s",
    "data_wait": "data wait {:.0%}",
    "mfu": "MFU {:.1%}",
    "memory_gib": "memory {:.1f} GiB",
}

# A folder of TensorBoard charts for a name that does not say one itself.
CHARTS = {"images_per_second": "speed", "data_wait": "speed", "mfu": "speed", "memory_gib": "speed"}


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of one device, None if it is not in the table."""
    # Not within a longer number: an RTX A4000 is no A40.
    return next((peak for part, peak in PEAKS if re.search(rf"{part}(?!\d)", device_name, re.IGNORECASE)), None)


def keep_rows(path: Path, start: int) -> None:
    """Drop the rows of a metrics.jsonl beyond position start, and a last line cut short by a crash.

    Raises ConfigError for any other line that is no row of metrics.
    """
    if not path.exists():
        return
    lines = path.read_text().splitlines()
    kept = []
    for number, line in enumerate(lines):
        try:
            position = json.loads(line)["position"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) - 1:
                break
            reason = f"line {number + 1} of {path.name} is not a row of metrics: {error}"
            raise ConfigError("run.folder", str(path.parent), reason, "repair that line, or move the file") from error
        if position <= start:
            kept.append(line + "\n")
    write_whole(path, "".join(kept))


class Monitor:
    """Collects what a run measures and writes it where people look.

    Tensors stay on their device between flushes; a flush copies all of them to the host at once. Tensors are
    averaged over the interval (over its finite values), numbers such as the rate are taken from its last
    step. A resume at ``start`` drops what an earlier attempt wrote beyond it.
    """

    def __init__(
        self, folder: Path, cfg: Options, *, total: int, start: int, world: World, flops_per_image: float = 0
    ) -> None:
        self.cfg, self.folder, self.total, self.world = cfg, folder, total, world
        self.flops_per_image = flops_per_image
        self.position = start
        self.pending: list[tuple[tuple[str, ...], Tensor]] = []  # per step: names, and float32 [names]
        self.last: dict[str, float] = {}
        self.clock: float | None = None  # start of the interval; None until the first step has ended
        self.images, self.waited = 0, 0.0
        self.asides: list[tuple[Any, Any]] = []  # begin and end of each time aside in the interval
        self.left: Any = None  # begin of the time aside that has not ended
        self.warned = False
        self.alarmed: set[int] = set()  # alarms that have warned
        if not world.main:
            return
        self.peak = self._peak()
        folder.mkdir(parents=True, exist_ok=True)
        self._open(start)
        self.bar = Bar(total, start) if sys.stdout.isatty() else None

    def _open(self, start: int) -> None:
        """Open the files to write from position start on, without what is in them beyond it."""
        keep_rows(self.folder / "metrics.jsonl", start)
        self.rows = (self.folder / "metrics.jsonl").open("a")
        self.writer: Any = None
        if self.cfg.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # TensorBoard forgets what an earlier attempt logged from purge_step on.
            self.writer = SummaryWriter(str(self.folder / "tensorboard"), purge_step=start + 1)

    def step(self, position: int, scalars: Mapping[str, Tensor | float], *, images: int, waited: float) -> None:
        """Take in one step: no host transfer, no synchronisation.

        position: after the step. images: trained on by all ranks. waited: seconds this rank waited for data.
        """
        if not self.world.main:
            return
        self.position = position
        names = tuple(name for name, value in scalars.items() if isinstance(value, Tensor))
        if names:
            # One small kernel; it also frees the graph and whatever else the scalars are views of.
            self.pending.append((names, torch.stack([scalars[name].detach().float() for name in names])))  # type: ignore[union-attr]
        self.last.update({name: value for name, value in scalars.items() if not isinstance(value, Tensor)})
        if self.bar:
            self.bar.advance(position)
        if self.clock is None:  # the first step of a process pays for start-up and compilation: not a speed
            self.clock, self.asides = time.perf_counter(), []
        else:
            self.images += images
            self.waited += waited

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Time spent in here (evaluation, saving) does not count against the training speed.

        Steps still queued on the device when it is entered do count; nothing waits for them here, at every step.
        """
        if not self.world.main:
            yield
            return
        self.left = self._mark()
        yield
        self.asides.append((self.left, self._mark()))
        self.left = None

    def _mark(self) -> Any:
        """This moment: on CUDA in the device's queue, which the host runs ahead of; else on the clock."""
        if self.world.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.world.device))
        return event

    def _aside_seconds(self) -> float:
        """Seconds aside since the last call, up to now if that is aside itself. Waits for the device."""
        if self.left is not None:
            now = self._mark()
            self.asides.append((self.left, now))
            self.left = now
        asides, self.asides = self.asides, []
        if self.world.device.type != "cuda":
            return sum(end - begin for begin, end in asides)
        for _, end in asides[-1:]:
            end.synchronize()
        return sum(begin.elapsed_time(end) for begin, end in asides) / 1e3

    def flush(self, position: int) -> bool:
        """Write everything since the last flush: one host transfer. Returns whether an alarm wants the run to stop.

        Only rank 0 knows.
        """
        if not self.world.main or not (self.pending or self.last):
            return False
        values = self._collect() | self.last
        self.last = {}
        speed = self._speed()
        values |= speed
        self.scalars(position, values)
        if self.bar:
            self.bar.show(values)
        else:
            print(self._line(position, values), flush=True)
        self._warn(speed)
        return self._alarmed(position, values)

    def _alarmed(self, position: int, values: Mapping[str, float]) -> bool:
        """Warn of scalars out of their bounds, once each; returns whether one of them is to stop the run."""
        stop = False
        for number, alarm in enumerate(self.cfg.alarms):
            value = values.get(alarm.scalar)
            if value is None or position < duration("monitor.alarms.after", alarm.after, total=self.total):
                continue
            low, high = (alarm.below, alarm.above)
            if (low is None or value >= low) and (high is None or value <= high):
                continue
            stop = stop or alarm.stop
            if alarm.stop or number not in self.alarmed:
                self.alarmed.add(number)
                bound = f"below {low:g}" if low is not None and value < low else f"above {high:g}"
                self.note(f"alarm     {alarm.scalar} = {value:.4g} is {bound} at {position:,} images (monitor.alarms)")
        return stop

    def scalars(self, position: int, values: Mapping[str, float]) -> None:
        """Write numbers now, to metrics.jsonl and TensorBoard (under train/ unless the name says where)."""
        if not self.world.main:
            return
        row = {name: value if math.isfinite(value) else None for name, value in values.items()}
        self.rows.write(json.dumps({"position": position, "time": round(time.time(), 3), **row}) + "\n")
        self.rows.flush()
        if self.writer:
            for name, value in values.items():
                tag = name if "/" in name else f"{CHARTS.get(name, 'train')}/{name}"
                self.writer.add_scalar(tag, value, position)

    def picture(self, position: int, tag: str, image: Tensor) -> None:
        """An image uint8 [3, H, W] for TensorBoard."""
        if self.world.main and self.writer:
            self.writer.add_image(tag, image.cpu(), position)

    def histogram(self, position: int, tag: str, tensor: Tensor) -> None:
        """The distribution of a tensor's values, of any shape, for TensorBoard."""
        if self.world.main and self.writer:
            self.writer.add_histogram(tag, tensor.detach().float().cpu(), position)

    def note(self, text: str) -> None:
        """One line for the person watching."""
        if not self.world.main:
            return
        if self.bar:
            self.bar.print(text)
        else:
            print(text, flush=True)

    def rewind(self, position: int) -> None:
        """Forget everything beyond a position to which the run returns."""
        self.position, self.pending, self.last, self.clock, self.asides = position, [], {}, None, []
        self.images, self.waited = 0, 0.0
        if self.world.main:
            self._close()
            self._open(position)

    def close(self) -> None:
        """Write what is left and release the files."""
        if not self.world.main:
            return
        if self.pending:
            self.flush(self.position)
        if self.bar:
            self.bar.stop()
        self._close()

    def _close(self) -> None:
        self.rows.close()
        if self.writer:
            self.writer.close()

    def _collect(self) -> dict[str, float]:
        """Means of the pending tensors over their finite values, after one copy to the host."""
        if not self.pending:
            return {}
        host = torch.cat([values for _, values in self.pending]).cpu().tolist()
        names = [name for step, _ in self.pending for name in step]
        self.pending = []
        sums: dict[str, list[float]] = {}
        for name, value in zip(names, host):
            sums.setdefault(name, []).append(value)
        means, broken = {}, 0
        for name, series in sums.items():
            finite = [value for value in series if math.isfinite(value)]
            broken = max(broken, len(series) - len(finite))
            means[name] = sum(finite) / len(finite) if finite else math.nan
        return means | ({"nonfinite_steps": float(broken)} if broken else {})

    def _speed(self) -> dict[str, float]:
        """Throughput, data wait, MFU and memory since the last flush; starts the next interval."""
        speed = {"memory_gib": memory_gib(self.world.device)}
        if self.clock is not None and self.images:
            aside = self._aside_seconds()
            now = time.perf_counter()
            seconds = max(now - self.clock - aside, 1e-9)
            speed["images_per_second"] = self.images / seconds
            speed["data_wait"] = min(self.waited / seconds, 1.0)
            if self.peak and self.flops_per_image:
                speed["mfu"] = self.flops_per_image * self.images / seconds / (self.world.world * self.peak * 1e12)
            self.clock, self.images, self.waited = now, 0, 0.0
        return speed

    def _peak(self) -> float | None:
        if self.cfg.peak_tflops is not None or self.world.device.type != "cuda":
            return self.cfg.peak_tflops
        return peak_tflops(torch.cuda.get_device_name(self.world.device))

    def _line(self, position: int, values: Mapping[str, float]) -> str:
        parts = [f"{position:>{len(f'{self.total:,}')},}/{self.total:,} images {position / self.total:6.1%}"]
        parts += [form.format(values[name]) for name, form in CONSOLE.items() if name in values]
        if "nonfinite_steps" in values:
            parts.append(f"{values['nonfinite_steps']:.0f} non-finite steps")
        if "images_per_second" in values:
            parts.append(f"ETA {clock_time((self.total - position) / values['images_per_second'])}")
        return "  ".join(parts)

    def _warn(self, speed: Mapping[str, float]) -> None:
        share = speed.get("data_wait", 0.0)
        if self.warned or share <= self.cfg.wait_warning:
            return
        self.warned = True
        self.note(
            f"loader-bound: {share:.0%} of the time goes into waiting for images. Raise data.workers, shrink "
            "the images in the shards (halfseen shards build), or put data.cache on a local disk"
        )


class Bar:
    """A progress bar for a terminal: share done, loss, images per second, time left."""

    def __init__(self, total: int, start: int) -> None:
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TaskProgressColumn,
            TextColumn,
            TimeElapsedColumn,
        )

        self.progress = Progress(
            BarColumn(),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("ETA {task.fields[left]}"),
        )
        self.task = self.progress.add_task("", total=total, completed=start, left="-")
        self.total, self.done = total, start
        self.progress.start()

    def advance(self, position: int) -> None:
        """Move the bar; costs no host transfer."""
        self.done = position
        self.progress.update(self.task, completed=position)

    def show(self, values: Mapping[str, float]) -> None:
        """Put new values beside the bar."""
        text = "  ".join(form.format(values[name]) for name, form in CONSOLE.items() if name in values)
        speed = values.get("images_per_second")
        left = clock_time((self.total - self.done) / speed) if speed else "-"
        self.progress.update(self.task, description=text, left=left)

    def print(self, text: str) -> None:
        """A line above the bar."""
        self.progress.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the bar as it stands and give the terminal back."""
        self.progress.stop()


def memory_gib(device: torch.device) -> float:
    """Most memory held so far, in GiB: tensors of this process on a GPU, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return resident / 2**30 if sys.platform == "darwin" else resident / 2**20  # macOS counts bytes, Linux KiB


def clock_time(seconds: float) -> str:
    """``1:02:03``, with days in front when there are any."""
    days, rest = divmod(round(seconds), 86_400)
    return (f"{days}d " if days else "") + f"{rest // 3600}:{rest // 60 % 60:02}:{rest % 60:02}"
