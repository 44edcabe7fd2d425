"""Files in one move: what is there is whole at every moment."""

from pathlib import Path

import pytest

from halfseen.writing import write_whole


def test_a_write_that_breaks_off_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / "receipt.json"
    write_whole(path, "old")

    def broken(self, text):
        self.write_bytes(text[:2].encode())
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_text", broken)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "new and longer")
    assert path.read_text() == "old"
    monkeypatch.undo()
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [each.name for each in tmp_path.iterdir()] == ["receipt.json"]
