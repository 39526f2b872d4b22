"""Records: atomic parts, a strict schema, damaged files left out and named."""

import json
import os

import numpy as np
import pandas as pd
import pytest

from kronscope.studies.results import records


def row(**changes):
    kinds = {"str": "", "int64": 0, "float64": 0.0}
    return {name: kinds[kind] for name, kind in records.COLUMNS.items()} | changes


def test_append_and_read(tmp_path):
    run = records.new_run(tmp_path, "study")
    first = records.append(run, [row(step=1, value=0.5), row(step=2, value=np.inf)])
    second = records.append(run, [row(step=3, block="0")])
    assert (first.name, second.name) == ("part-00000.parquet", "part-00001.parquet")
    frame = records.read(tmp_path)
    assert list(frame["step"]) == [1, 2, 3]
    assert list(frame.columns) == list(records.COLUMNS)
    assert frame.attrs["damaged"] == []
    pd.testing.assert_frame_equal(frame, records.read(run))


def test_put_replaces_a_part(tmp_path):
    records.put(tmp_path, "adam", [row(step=1), row(step=2)])
    records.put(tmp_path, "sgd", [row(step=3)])
    records.put(tmp_path, "adam", [row(step=4)])
    assert sorted(records.read(tmp_path)["step"]) == [3, 4]


def test_a_wrong_row_is_refused_and_its_columns_named(tmp_path):
    wrong = row()
    del wrong["block"]
    with pytest.raises(ValueError, match=r"lacks columns \['block'\].*unknown columns \['blok'\]"):
        records.append(tmp_path, [wrong | {"blok": "0"}])
    assert records.read(tmp_path).empty


def test_damaged_parts_are_left_out_and_named(tmp_path):
    run = records.new_run(tmp_path, "study")
    records.append(run, [row(step=1)])
    (run / "records" / "part-00001.parquet").write_bytes(b"PAR1 half a file")
    frame = records.read(tmp_path)
    assert len(frame) == 1
    assert "part-00001.parquet" in frame.attrs["damaged"][0]


def test_nothing_half_written_stays(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        records.write_atomically(tmp_path / "file.bin", b"content")
    assert list(tmp_path.iterdir()) == []


def test_headers_and_runs(tmp_path):
    assert records.runs(tmp_path) == []
    older, newer = (records.new_run(tmp_path, name) for name in ("a", "b"))
    records.write_header(older, {"status": "finished"})
    records.append(newer, [row()])
    assert records.read_header(older) == {"status": "finished"}
    assert records.read_header(newer) == {}
    os.utime(older, (1, 1))
    assert records.runs(tmp_path) == [newer, older]
    (older / "header.json").write_text(json.dumps([1, 2]))
    assert records.read_header(older) == {}


def test_matrices(tmp_path):
    key = dict(zip(records.MATRIX_KEY, ("kfac", 0, 5, "0", "ggn", 3), strict=True))
    path = records.save_matrices(tmp_path, key, {"exact": np.eye(3), "kfac": 2 * np.eye(3)})
    index = records.list_matrices(tmp_path)
    assert index.iloc[0].to_dict() == key | {"path": str(path)}
    assert set(records.load_matrices(path)) == {"exact", "kfac"}
    (tmp_path / "matrices" / "torn.npz").write_bytes(b"PK")
    index = records.list_matrices(tmp_path)
    assert len(index) == 1
    assert "torn.npz" in index.attrs["damaged"][0]


def test_reducing_keeps_the_entry_of_largest_magnitude():
    matrix = np.zeros((1000, 1000), dtype=np.float32)
    matrix[7, 901], matrix[500, 500] = -5.0, 3.0
    small = records.reduce_matrix(matrix, pixels=100)
    assert small.shape == (100, 100)
    assert small[0, 90] == -5.0
    assert small[50, 50] == 3.0
    assert np.count_nonzero(small) == 2
    ragged = records.reduce_matrix(np.arange(49.0).reshape(7, 7), pixels=3)
    np.testing.assert_array_equal(ragged, [[16, 19, 20], [37, 40, 41], [44, 47, 48]])
    np.testing.assert_array_equal(records.reduce_matrix(np.eye(5)), np.eye(5))
