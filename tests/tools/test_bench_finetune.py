"""The fine-tuning benchmark: it counts what a forward keeps, and times whole steps of the same student."""

import json

import pytest
import torch

from halfseen.tools import bench_finetune

TINY = ["model.width=32", "model.depth=2", "model.heads=2", "model.patch=16", "data.image_size=64", "engine.device=cpu"]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Without the processes of their own, and without a ViT-B."""
    monkeypatch.setattr(bench_finetune, "peak_alone", lambda arguments, name: 7_000_000)
    monkeypatch.setattr(bench_finetune, "delta_share", lambda: 0.5)


def test_the_report_has_every_job_its_bytes_and_the_bars(tmp_path, capsys):
    out = tmp_path / "bench.json"
    assert bench_finetune.main([*TINY, "--batch", "2", "--repeats", "2", "--json", str(out)]) == 0
    result = json.loads(out.read_text())
    full, attention, recompute = result["jobs"]
    assert [job["name"] for job in result["jobs"]] == list(bench_finetune.JOBS)
    assert full["saved_bytes"] > attention["saved_bytes"] > recompute["saved_bytes"] > 0
    assert full["optimizer_bytes"] > 2 * full["trained"] * 4 > attention["optimizer_bytes"]
    assert full["checkpoint_bytes"] - attention["checkpoint_bytes"] == (
        full["optimizer_bytes"] - attention["optimizer_bytes"]
    )
    assert attention["saved"] == pytest.approx(1 - attention["saved_bytes"] / full["saved_bytes"])
    assert all(len(job["all_seconds"]) == 2 for job in result["jobs"])
    assert full["ratio"]["median"] == 1.0
    assert len(result["bars"]) == 4
    assert result["versions"]["torch"] == torch.__version__
    said = capsys.readouterr().out
    assert "attention, recompute" in said
    assert "NOT MET: a ViT-B's attention delta is 50.0%" in said


def test_kept_bytes_are_those_of_distinct_memory_without_weights_and_inputs():
    """One linear map keeps its input alone, which is the batch: nothing is counted; a ReLU's result is."""

    class Fake:
        student = torch.nn.Linear(10, 10)

        def forward(self, batch):
            hidden = self.student(batch["image"]).relu()
            return {"loss": (hidden * hidden).sum()}

    batch = {"image": torch.randn(4, 10)}
    assert bench_finetune.saved_bytes(Fake(), batch) == 4 * 10 * 4
