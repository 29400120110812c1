"""The scaling benchmark's paper model against numbers worked out by hand, and what it reads from files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import report
import scale_model as model
import scale_raylets
import scale_search as search

A = model.Assumed(
    parameters=25_000_000,
    images_s=2500,
    batch=250,
    backward=0.6,
    nvlink_bytes_s=100e9,
    hop_s=0,
    bucket_bytes=25_000_000,
)


def test_a_ring_sends_twice_all_but_its_own_share() -> None:
    assert model.ring_s(100e6, 4, 1e9) == pytest.approx(2 * 3 / 4 * 0.1)
    assert model.ring_s(100e6, 1, 1e9) == 0
    assert model.ring_s(12, 512, 1e9, 50e-6) == pytest.approx(1022 * 50e-6, rel=1e-3)


def test_two_levels_add_up() -> None:
    assert model.all_reduce_s(100e6, 8, 1, A) == pytest.approx(
        2 * 7 / 8 * 1e-3
    )  # NVLink alone, the network is not used
    assert model.all_reduce_s(100e6, 64, 10e9, A) == pytest.approx(1.75e-3 + 2 * 7 / 8 * 10e-3)
    assert model.all_reduce_s(100e6, 2, 1, A) == pytest.approx(1e-3)  # fewer GPUs than a node has


def test_backward_hides_all_but_the_last_bucket_and_no_more_than_it_lasts() -> None:
    assert model.buckets(100e6, A) == 4
    assert model.exposed_s(0.040, 100e6, A) == pytest.approx(0.010)  # 45 ms could hide 40: the last bucket stays
    assert model.exposed_s(0.100, 100e6, A) == pytest.approx(0.100 - 0.75 * 0.6 * 0.1)
    # 100 MB over 8 nodes at 1 GB/s: 175 ms and 1.75 inside; 45 are hidden, a step is 100 ms
    assert model.efficiency(64, 8 / A.wire, 4, A) == pytest.approx(100 / (100 + 176.75 - 45))


def test_groups_are_read_as_often_as_units_cut_them() -> None:
    one = {"rows": 1000, "group_rows": 10, "window_rows": 100, "batch": 100}
    assert model.read_ratio(**one, world=1, unit_rows=100) == 1.0  # a batch is a window is a unit
    assert model.read_ratio(**one, world=1, unit_rows=5) == 2.0
    assert model.read_ratio(**one, world=50, unit_rows=100) == pytest.approx(5.0)  # 2 of the 10 rows of each group


def test_units_ahead_are_those_of_the_stream() -> None:
    a = model.Assumed()
    assert [model.units_ahead(world, a) for world in (1, 8, 64, 512)] == [2 + 17, 2 + 3, 3, 3]


def test_costs_follow_from_the_assumptions() -> None:
    found = model.cost(64, model.Assumed(images_s=1000, jpeg_bytes=100_000), model.Measured(order_s=1.0, away=0.5))
    assert found["pictures a second, all"] == 64_000
    assert found["epoch, s"] == pytest.approx(1_281_167 / 64_000)
    assert found["order of an epoch and its hash, on every worker, share of it"] == pytest.approx(64_000 / 1_281_167)
    assert found["JPEG needed, GB/s a node"] == pytest.approx(0.8)
    assert found["decoded pixels between nodes, Gb/s a node"] == pytest.approx(8000 * 150_528 * 8 / 1e9 / 2)
    assert found["µs that a step of its ring may take before training waits"] == pytest.approx(256_000 / 126)
    assert {len(columns) for _, columns in model.cost_rows()} == {len(model.GPUS)}
    assert len(model.reduce_rows()) == 7


def test_spans() -> None:
    assert search.overlap(0, 4, 1, 3) == 2
    assert search.overlap(0, 1, 2, 3) == 0
    assert search.most_at_once([(0, 2), (1, 3), (2, 4), (3, 5)]) == 2
    assert search.most_at_once([]) == 0


def test_lengths_are_the_medians_of_rungs(tmp_path: Path) -> None:
    lines = [{"schema": 2}] + [{"event": "rung", "rung": r, "seconds": s} for r, s in ((1, 9), (0, 1), (0, 3), (0, 2))]
    file = tmp_path / "ledger.jsonl"
    file.write_text("\n".join(map(json.dumps, [*lines, {"event": "end", "seconds": 99}])))
    assert search.lengths(file) == {0: 2, 1: 9}


def test_environment_of_a_cluster() -> None:
    assert scale_raylets.environment("export A=b\n# c\nexport D='e=f'\n") == {"A": "b", "D": "e=f"}


def test_rows_with_columns_of_their_own_become_a_table_a_part() -> None:
    rows = [
        {"part": "x", "name": "one", "columns": {"a": "1"}},
        {"part": "x", "name": "two", "columns": {"a": "2", "b": "3"}},
        {"part": "y", "name": "three", "columns": {"c": "4"}},
    ]  # fmt: skip
    text = report.wide(rows)
    assert "| | a | b |" in text
    assert "| one | 1 |  |" in text
    assert "| three | 4 |" in text
    assert text.index("*y*") > text.index("| two | 2 | 3 |")
