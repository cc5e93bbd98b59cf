"""The cache directory: damaged entries, directories that cannot be written."""

from __future__ import annotations

from pathlib import Path

import pytest

from attncompiler.codegen.kernel_module import load_module
from attncompiler.config import cache_dir, read_checked, write_atomic


def test_an_entry_comes_back(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a" / "b.py", "text\n")
    assert read_checked(tmp_path / "a" / "b.py") == "text\n"
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["b.py"], "nothing else is left behind"


@pytest.mark.parametrize("damage", [b"", b"# 123\ntext\n", b"\xff\xfe"])
def test_a_damaged_entry_is_discarded_and_said(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "b.py"
    write_atomic(path, "text\n")
    path.write_bytes(damage)
    if damage == b"\xff\xfe":
        assert read_checked(path) is None
        return
    with pytest.warns(UserWarning, match="damaged cache entry"):
        assert read_checked(path) is None
    assert not path.exists()


def test_a_directory_that_cannot_be_written_is_replaced_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("not a directory")
    monkeypatch.setenv("ATTNCOMPILER_CACHE_DIR", str(blocked / "cache"))
    with pytest.warns(UserWarning, match="can't write its cache[\\s\\S]*ATTNCOMPILER_CACHE_DIR"):
        path = cache_dir()
    assert path.is_dir() and blocked.read_text() == "not a directory"


def test_a_full_disk_does_not_stop_a_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("ATTNCOMPILER_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("attncompiler.config.os.replace", full)
    with pytest.warns(UserWarning, match="No space left on device; it will be made again next time"):
        assert load_module("answer = 42\n").answer == 42
    assert not list((tmp_path / "kernels").glob("*.py"))


def test_failing_to_write_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a file where a folder should be")
    with pytest.warns(UserWarning, match="could not write"):
        write_atomic(tmp_path / "a" / "b.py", "text")
