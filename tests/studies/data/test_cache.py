"""Cache of computed arrays: whole or not at all, checked, computed again with a warning."""

import os
from pathlib import Path

import numpy as np
import pytest

from kronscope.studies.data.cache import cached
from kronscope.studies.data.cache import folder as place


class Recipe:
    """Counts how often it is followed."""

    made = 0

    def __call__(self):
        self.made += 1
        return {"a": np.arange(6).reshape(2, 3), "b": np.arange(4, dtype=np.uint8)}


def test_made_once(cache):
    recipe = Recipe()
    for _ in range(2):
        found = cached("one-1", recipe)
        np.testing.assert_array_equal(found["a"], np.arange(6).reshape(2, 3))
        assert found["b"].dtype == np.uint8
    assert recipe.made == 1
    assert os.listdir(cache) == ["one-1.npz"]
    cached("one-2", recipe)  # another version is another entry
    assert recipe.made == 2


def test_an_entry_of_an_earlier_version_is_read(cache):
    """It had a file with its checksum beside it."""
    cache.mkdir()
    np.savez(cache / "one.npz", a=np.zeros(3))
    (cache / "one.npz.sha256").write_text("0" * 64)
    assert cached("one", Recipe())["a"].tolist() == [0, 0, 0]


def change_a_byte(at):
    def change(path):
        content = bytearray(path.read_bytes())
        content[int(at * len(content))] ^= 1
        path.write_bytes(content)

    return change


def change_a_number(path):
    """The last one of "a", in the middle of the file."""
    content, last = path.read_bytes(), np.arange(4, 6).tobytes()
    assert content.count(last) == 1
    path.write_bytes(content.replace(last, np.array([4, 7]).tobytes()))


DAMAGE = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "empty": lambda path: path.write_bytes(b""),
    "no zip file": lambda path: path.write_bytes(b"nothing of that kind" * 20),
    "a wrong bit at the start": change_a_byte(0),
    "a wrong bit in the middle": change_a_byte(0.3),
    "a wrong number": change_a_number,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_entry_is_made_again(cache, damage):
    recipe = Recipe()
    cached("one", recipe)
    damage(cache / "one.npz")
    with pytest.warns(UserWarning, match=r"one\.npz is damaged .*: it is made again"):
        found = cached("one", recipe)
    assert found["a"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert recipe.made == 2
    cached("one", recipe)
    assert recipe.made == 2


def test_an_interrupted_entry_leaves_nothing(cache, monkeypatch):
    def interrupted(file, **_):
        Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(np, "savez", interrupted)
        with pytest.raises(KeyboardInterrupt):
            cached("one", Recipe())
    assert os.listdir(cache) == []
    recipe = Recipe()
    cached("one", recipe)
    assert recipe.made == 1


def test_a_folder_that_cannot_be_written_is_no_obstacle(cache):
    cache.write_text("a file, not a folder")
    with pytest.warns(UserWarning, match=r"could not be written .* set KRONSCOPE_CACHE to"):
        found = cached("one", Recipe())
    assert found["b"].tolist() == [0, 1, 2, 3]


def test_where_the_cache_is(cache, monkeypatch):
    assert place() == cache
    monkeypatch.setenv("KRONSCOPE_CACHE", "~/there")
    assert place() == Path.home() / "there"
    monkeypatch.delenv("KRONSCOPE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert place() == Path("/somewhere/kronscope")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert place() == Path.home() / ".cache" / "kronscope"
