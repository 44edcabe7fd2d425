"""The augmentation benchmark: every augmentation is timed, in a worker or on the device, or both ways."""

import json

from halfseen.tools import bench


def test_every_augmentation_is_timed(tmp_path, capsys):
    file = tmp_path / "figures.json"
    assert bench.main(["augment", "--batch=4", "--repeats=1", "--device=cpu", f"--json={file}"]) == 0
    found = json.loads(file.read_text())["ms_per_image"]
    assert {name.partition(":")[0] for name in found} == {"worker", "batch", "one by one", "pair by pair"}
    for what in ("RandAugment", "3-Augment", "erasing", "CutMix"):
        assert any(what in name for name in found)
    assert all(value > 0 for value in found.values())
    assert len(capsys.readouterr().out.splitlines()) == len(found)
