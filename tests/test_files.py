"""Files and folders that are complete or absent."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill import files


def test_a_file_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.replacing(path) as aside:
        aside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")

    def half() -> None:
        with files.replacing(path) as aside:
            aside.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "stale").touch()
    with files.replacing_folder(path) as aside:
        (aside / "deep").mkdir()
        (aside / "deep" / "weights").write_text("new")
        assert (path / "stale").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert sorted(p.name for p in path.rglob("*")) == ["deep", "weights"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")

    def half() -> None:
        with files.replacing_folder(path) as aside:
            (aside / "weights").write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        half()
    assert (path / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_old_folder_comes_back_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model"
    path.mkdir()
    (path / "weights").write_text("old")
    replace = Path.replace

    def refuse(self: Path, target: Path) -> Path:
        if target == path and self.suffix == ".tmp":
            raise OSError("disk trouble")
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="disk trouble"), files.replacing_folder(path) as aside:
        (aside / "weights").write_text("new")
    assert (path / "weights").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_the_hash_of_a_json_value_forgets_the_order_of_keys_and_nothing_else() -> None:
    value = files.sha256_json({"a": 1, "b": [1, 2]})
    assert value == files.sha256_json({"b": [1, 2], "a": 1})
    assert value != files.sha256_json({"a": 1, "b": [2, 1]})


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    value = {"label": "très bien", "figures": [1, 0.1, None]}
    files.write_json(tmp_path / "x.json", value)
    assert files.read_json(tmp_path / "x.json") == value
