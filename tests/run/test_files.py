"""Files are whole or absent."""

from pathlib import Path

import pytest

from kajiya.errors import StoreError
from kajiya.run.files import check_files, hash_folder, new_folder, read_json, require_space, write_json


def test_a_folder_whose_making_fails_is_not_there(tmp_path: Path) -> None:
    def fail_halfway() -> None:
        with new_folder(tmp_path / "made") as folder:
            (folder / "part").write_text("x")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_halfway()
    assert list(tmp_path.iterdir()) == []


def test_an_old_folder_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    with new_folder(tmp_path / "made") as folder:
        (folder / "old").write_text("x")
    with pytest.raises(RuntimeError), new_folder(tmp_path / "made") as folder:
        raise RuntimeError
    assert (tmp_path / "made" / "old").is_file()
    with new_folder(tmp_path / "made") as folder:
        (folder / "new").write_text("x")
    assert [path.name for path in (tmp_path / "made").iterdir()] == ["new"]


def test_json_that_cannot_be_written_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    write_json(path, {"a": 1})
    for bad in ({"a": float("nan")}, {"a": object()}):
        with pytest.raises((ValueError, TypeError)):
            write_json(path, bad)
        assert read_json(path) == {"a": 1}
    assert [found.name for found in tmp_path.iterdir()] == ["facts.json"]


def test_missing_and_broken_json_are_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"none\.json: no such file"):
        read_json(tmp_path / "none.json")
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(StoreError, match=r"half\.json: broken JSON"):
        read_json(tmp_path / "half.json")


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_text("longer than it was"), "18 bytes, but the manifest says 7"),
        (lambda path: path.write_text("Content"), "corrupt"),
    ],
)
def test_a_file_that_is_not_as_listed_is_named(harm: object, words: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "f").write_text("content")
    listed = hash_folder(tmp_path)
    check_files(tmp_path, listed)
    harm(tmp_path / "sub" / "f")  # type: ignore[operator]
    with pytest.raises(StoreError, match=words) as raised:
        check_files(tmp_path, listed)
    assert "sub/f" in str(raised.value)


def test_too_little_space_says_how_much_and_what_to_do(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "A checkpoint")
    with pytest.raises(StoreError, match=r"(?s)A checkpoint needs .* MiB .*--store"):
        require_space(tmp_path, 2**60, "A checkpoint")
