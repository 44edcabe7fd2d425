"""The table of GPUs: how the best micro-batch is found, and that one row that fails spares the others."""

import json

import pytest

from halfseen.config import ConfigError
from halfseen.tools import bench_table
from halfseen.tools.bench_table import Trial, climb

TINY = [
    *("model.width=32", "model.depth=1", "model.heads=2", "data.image_size=32", "engine.device=cpu"),
    *("objective.mae.decoder_width=16", "objective.mae.decoder_depth=1", "objective.mae.decoder_heads=2"),
    *("engine.precision=fp32", "monitor.peak_tflops=0.5"),
]


def tried(start, most, room, slower_from=1 << 30):
    """Micro-batches that were tried on a device with room for so many images, and those that fitted."""
    asked, found = [], []

    def trial(batch):
        asked.append(batch)
        if batch > room:
            raise MemoryError
        return Trial(batch, 100.0 * min(batch, slower_from), batch)

    climb(trial, start, most, found)
    return asked, [trial.batch for trial in found]


@pytest.mark.parametrize(
    ("limits", "asked", "fitted"),
    [
        ((16, 4096, 100), [16, 32, 64, 128, 96], [16, 32, 64, 96]),
        ((16, 4096, 80), [16, 32, 64, 128, 96], [16, 32, 64]),
        ((16, 60, 100), [16, 32, 48], [16, 32, 48]),
        ((64, 4096, 20), [64, 32, 16], [16]),
        ((4, 4096, 0), [4, 2, 1], []),
        ((16, 4096, 4096, 32), [16, 32, 64], [16, 32, 64]),
    ],
)
def test_micro_batches_grow_while_they_fit_and_gain(limits, asked, fitted):
    assert tried(*limits) == (asked, fitted)


def test_the_table_has_a_row_for_all_that_was_asked_whatever_fails(tmp_path, capsys):
    out = tmp_path / "table.json"
    few = ["--start", "2", "--most", "2", "--steps", "1", "--repeats", "1", "--json", str(out)]
    assert bench_table.main(["pretrain/mae_b16", *TINY, "--engines", "single,horovod", "--against", "", *few]) == 0
    (result,) = json.loads(out.read_text())
    ours, other = result["rows"]
    assert ours["best"]["batch"] == 2
    assert ours["best"]["memory"] > 0
    executed = ours["images_per_second_per_rank"] * result["train_flops_per_image"]
    assert ours["mfu"] == pytest.approx(executed / 0.5e12)
    assert "engine.name='horovod'" in other["failure"]
    assert other["trials"] == []
    shown = capsys.readouterr().out
    assert "| `single` | 1 | 2 |" in shown
    assert "| `horovod` | 1 | engine.name='horovod'" in shown


def test_a_recipe_that_cannot_be_is_refused_before_anything_is_started(monkeypatch):
    monkeypatch.setattr(bench_table, "measured", None)
    with pytest.raises(ConfigError, match=r"model\.heads"):
        bench_table.main([*TINY, "model.heads=5"])
