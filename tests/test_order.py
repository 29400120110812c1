"""The order of samples is a function of (seed, epoch, rows, batch size): not of workers, nor of a resume."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydeep.data import order
from raydeep.data.augment import DRAWS
from raydeep.data.batches import Batches
from raydeep.data.resident import Pixels
from raydeep.errors import DataError

seeds = st.integers(0, 2**31 - 1)
epochs = st.integers(0, 100_000)
worlds = st.integers(1, 7)
ROWS = 50


class Keep:
    """In place of an augmenter: what a sample is (its pixels) and what it draws, as one row."""

    pairs = False
    draws = DRAWS

    def __call__(self, images: torch.Tensor, numbers: torch.Tensor, host: torch.Tensor) -> torch.Tensor:
        assert torch.equal(numbers, host)
        return torch.cat([images.flatten(1).double(), numbers], 1)

    def shape_draws(self, numbers: np.ndarray) -> np.ndarray:
        return numbers

    def mix(self, x: torch.Tensor, labels: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return x, None, None


class KeepPairs(Keep):
    pairs = True


def batches(batch_size: int, seed: int = 3, augmenter: Any = None, **parts: Any) -> Batches:
    """Pictures of one pixel: the number of the row."""
    rows = np.arange(ROWS)
    pixels = Pixels(rows.astype(np.uint8).reshape(-1, 1, 1, 1), rows)
    return Batches(pixels, augmenter or Keep(), batch_size, seed, **parts)


def stream(source: Batches, epoch: int = 0, start_step: int = 0) -> list[torch.Tensor]:
    """One tensor a step: this worker's micro-batches, one after the other, with their labels."""
    return [
        torch.cat([torch.cat([micro.images, micro.labels[:, None]], 1)[: micro.valid] for micro in micros])
        for micros in source.epoch(epoch, start_step)
    ]


@given(seeds, epochs, st.integers(1, 500))
def test_an_epoch_is_a_permutation_that_the_seed_and_epoch_fix(seed, epoch, rows):
    first = order.epoch_order(seed, epoch, rows)
    assert np.array_equal(np.sort(first), np.arange(rows))
    assert np.array_equal(first, order.epoch_order(seed, epoch, rows))


def test_epochs_and_seeds_shuffle_differently():
    orders = {order.epoch_order(seed, epoch, 100).tobytes() for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


@given(seeds, epochs, st.integers(1, 60), st.integers(0, 3), worlds)
def test_the_shares_of_any_world_are_the_global_batch(seed, epoch, batch_size, step, world):
    batch = order.global_batch(order.epoch_order(seed, epoch, 240), step, batch_size)
    shares = [order.share(batch, rank, world) for rank in range(world)]
    assert len(batch) == batch_size
    assert np.array_equal(np.concatenate(shares), batch)
    sizes = [len(part) for part in shares]
    assert max(sizes) - min(sizes) <= 1


@given(seeds, epochs, st.integers(0, 1000), worlds)
def test_draws_are_uniform_numbers_that_any_world_divides_alike(seed, epoch, step, world):
    numbers = order.draws(seed, epoch, step, 21, 5)
    assert numbers.shape == (21, 5)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    shares = [order.share(numbers, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate(shares), numbers)


def test_every_step_epoch_and_seed_draws_afresh():
    seen = {order.draws(seed, epoch, step, 1, 1).item() for seed in range(5) for epoch in range(5) for step in range(5)}
    assert len(seen) == 125


@pytest.mark.parametrize("world", range(1, 8))
@pytest.mark.parametrize("accumulate", [1, 3])
def test_workers_and_micro_batches_only_divide_the_global_batches(world, accumulate):
    whole = stream(batches(21), epoch=2)
    ranks = [stream(batches(21, rank=r, world=world, accumulate=accumulate), epoch=2) for r in range(world)]
    assert len(whole) == ROWS // 21
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([rank[step] for rank in ranks]), batch)


def test_a_sample_keeps_its_label_and_gets_the_draws_of_its_position():
    for step, batch in enumerate(stream(batches(10, seed=3), epoch=4)):
        assert torch.equal(batch[:, 0], batch[:, -1])
        assert np.array_equal(batch[:, 1:-1].numpy(), order.draws(3, 4, step, 10, DRAWS))


@given(st.integers(0, 5), st.integers(0, 7))
def test_a_resume_at_any_step_goes_on_with_the_tail(epoch, start_step):
    whole = stream(batches(7), epoch)
    tail = stream(batches(7), epoch, start_step)
    assert len(tail) == len(whole) - start_step
    assert all(torch.equal(a, b) for a, b in zip(tail, whole[start_step:], strict=True))


def test_rows_beyond_the_last_whole_batch_wait_for_another_epoch():
    source = batches(16)
    assert source.steps_per_epoch == 3
    served = [set(torch.cat(stream(source, epoch))[:, 0].int().tolist()) for epoch in range(12)]
    assert all(len(rows) == 48 for rows in served)
    assert set.union(*served) == set(range(ROWS))


def test_a_batch_larger_than_the_split_is_refused_with_the_numbers():
    with pytest.raises(DataError, match=r"train\.batch_size 51 is larger than the train split of 50 rows; lower it"):
        batches(51)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7, 60])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("augmenter", [Keep(), KeepPairs()], ids=["alone", "pairs"])
def test_a_last_batch_that_is_kept_is_divided_too(world, accumulate, augmenter):
    """50 rows in batches of 16: the last one has 2, for up to 60 workers."""
    whole = stream(batches(16, drop_last=False), epoch=2)
    assert [len(batch) for batch in whole] == [16, 16, 16, 2]
    assert sorted(torch.cat(whole)[:, 0].tolist()) == list(range(ROWS))
    parts = {"world": world, "accumulate": accumulate, "drop_last": False, "augmenter": augmenter}
    ranks = [stream(batches(16, rank=rank, **parts), epoch=2) for rank in range(world)]
    assert {len(rank) for rank in ranks} == {4}
    for step, batch in enumerate(whole):
        assert torch.equal(torch.cat([rank[step] for rank in ranks]), batch)


def test_a_worker_without_rows_still_has_pictures_for_every_micro_batch():
    for micros in batches(16, rank=59, world=60, accumulate=3, drop_last=False).epoch(0):
        assert [(micro.valid, len(micro.images)) for micro in micros] == [(0, 2)] * 3


@given(st.integers(0, 60), worlds)
def test_mixed_pairs_are_never_cut_apart(rows, parts):
    cuts = order.cut(np.arange(rows), parts, 2)
    assert np.array_equal(np.concatenate(cuts), np.arange(rows))
    assert all(part[0] % 2 == 0 for part in cuts if len(part))
    sizes = [len(part) for part in cuts]
    assert max(sizes) - min(sizes) <= 3  # of pairs by one, and the last one may be odd


# the order of what is streamed

sizes = st.lists(st.integers(1, 30), min_size=1, max_size=20).map(lambda values: np.array(values, np.int64))


@given(seeds, epochs, sizes, st.integers(1, 200), st.integers(1, 70))
def test_a_streamed_epoch_is_a_permutation_too(seed, epoch, groups, window, batch_size):
    found = order.stream_order(seed, epoch, groups, window, batch_size)
    assert np.array_equal(np.sort(found), np.arange(groups.sum()))
    assert np.array_equal(found, order.stream_order(seed, epoch, groups, window, batch_size))


@given(seeds, sizes, st.integers(1, 100), st.integers(1, 40))
def test_what_a_window_holds_is_served_before_the_next_window_begins(seed, groups, window, batch_size):
    """So a world never holds more than two windows, and a group is read in one go."""
    found = order.stream_order(seed, 0, groups, window, batch_size)
    group = np.searchsorted(np.cumsum(groups), found, side="right")
    spans = [np.flatnonzero(group == g) for g in range(len(groups))]
    most = window + int(groups.max()) + 2 * batch_size
    assert max(int(span[-1] - span[0]) for span in spans) <= most


def test_inside_a_batch_rows_stand_by_their_groups():
    groups = np.full(8, 100)
    found = order.stream_order(0, 0, groups, 400, 64)
    for step in range(6):
        group = order.global_batch(found, step, 64) // 100
        assert (np.diff(group) != 0).sum() == len(set(group.tolist())) - 1  # each group in one piece
        assert len(set(group.tolist())) >= 4  # a batch mixes the groups of its window


@given(seeds, sizes, st.integers(1, 100), st.integers(1, 40), worlds, st.integers(1, 25), st.booleans())
def test_a_plan_gives_every_worker_its_rows_from_units_read_once(
    seed, groups, window, batch_size, world, unit_rows, drop
):
    found = order.stream_order(seed, 1, groups, window, batch_size)
    steps = order.steps_per_epoch(len(found), batch_size, drop)
    read: list[int] = []
    for rank in range(world):
        mine = [order.share(order.global_batch(found, s, batch_size), rank, world) for s in range(steps)]
        plan = order.fetch_plan(mine, groups, unit_rows)
        assert all(0 < len(unit) <= unit_rows for unit in plan.units)
        rows = np.concatenate([np.empty(0, np.int64), *mine])
        served = [plan.units[u][o] for u, o in zip(plan.unit.tolist(), plan.offset.tolist(), strict=True)]
        assert served == rows.tolist()
        read += [row for unit in plan.units for row in unit.tolist()]
    assert sorted(read) == sorted(found[: steps * batch_size].tolist())  # nothing is decoded twice


def test_shards_are_filled_at_random_but_blocks_stay_together():
    blocks = np.repeat(np.arange(10), 7)
    found = order.shard_order(blocks, 3)
    assert np.array_equal(np.sort(found), np.arange(70))
    assert found.reshape(10, 7)[:, 0].tolist() != list(range(0, 70, 7))
    assert (np.diff(found.reshape(10, 7), axis=1) == 1).all()
    assert not np.array_equal(order.shard_order(np.arange(70), 3), order.shard_order(np.arange(70), 4))


@given(st.integers(0, 300), worlds)
def test_evaluation_covers_every_row_once(rows, world):
    ranges = [order.eval_range(rows, rank, world) for rank in range(world)]
    assert [row for start, stop in ranges for row in range(start, stop)] == list(range(rows))
    sizes = [stop - start for start, stop in ranges]
    assert max(sizes) - min(sizes) <= 1


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=200), seeds, st.floats(0.01, 0.99), st.floats(0.01, 0.99)
)  # fmt: skip
def test_a_split_leaves_train_a_row_of_every_class_and_counts_by_share(labels, seed, test, val):
    labels = np.array(labels)
    names = order.stratified_split(labels, {"test": test, "val": val}, seed)
    for label in np.unique(labels):
        count = int((labels == label).sum())
        found = {name: int(((labels == label) & (names == name)).sum()) for name in ("train", "val", "test")}
        assert sum(found.values()) == count
        assert found["train"] >= 1
        assert found["test"] == min(max(1, round(test * count)), count - 1)
        assert found["val"] == min(max(1, round(val * count)), count - found["test"] - 1)


def test_a_split_depends_on_its_seed_alone():
    labels = np.arange(200) % 4
    splits = [order.stratified_split(labels, {"test": 0.2, "val": 0.1}, seed) for seed in (0, 0, 1)]
    assert np.array_equal(splits[0], splits[1])
    assert not np.array_equal(splits[0], splits[2])
    assert np.unique(splits[2], return_counts=True)[1].tolist() == [40, 140, 20]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=100), seeds, st.integers(1, 30))
def test_few_takes_at_most_n_a_class_and_nests(labels, seed, per_class):
    labels = np.array(labels)
    rows = order.few(labels, per_class, seed)
    assert np.array_equal(rows, np.unique(rows))
    assert set(rows) <= set(order.few(labels, per_class + 1, seed))
    for label in np.unique(labels):
        assert (labels[rows] == label).sum() == min(per_class, (labels == label).sum())


def test_few_depends_on_the_seed():
    labels = np.arange(200) % 4
    assert not np.array_equal(order.few(labels, 5, 0), order.few(labels, 5, 1))


def test_the_order_hash_names_seed_epoch_and_batch_size():
    hashes = [
        batches(size, seed).order_hash(epoch) for size, seed, epoch in [(7, 0, 0), (7, 0, 1), (7, 1, 0), (10, 0, 0)]
    ]
    assert len(set(hashes)) == 4


def test_the_order_of_samples_never_changes_between_versions():
    """Old runs must resume in the same order: a change here is a new version of every run."""
    assert batches(7, seed=0).order_hash(0) == "94ca8d6b41becbb2"
    assert order.epoch_order(0, 0, 8).tolist() == [0, 7, 5, 3, 6, 2, 4, 1]
    assert order.draws(0, 0, 0, 1, 2)[0].tolist() == [0.12383735540353724, 0.6629749397174886]
    assert order.stream_order(7, 1, np.array([4, 4, 4, 4, 4]), 8, 5).tolist() == [
        0, 1, 6, 4, 5, 3, 2, 7, 18, 10, 17, 16, 19, 9, 8, 11, 13, 14, 15, 12,
    ]  # fmt: skip
    names = order.stratified_split(np.arange(24) % 2, {"test": 0.25, "val": 0.25}, 5)
    assert "".join(name[1] for name in names) == "rrerrarreraarrreaereeaar"  # train, test, val
    assert order.shard_order(np.repeat(np.arange(6), 2), 5).tolist() == [6, 7, 8, 9, 10, 11, 2, 3, 4, 5, 0, 1]
    assert order.shuffled(8, 5, 3).tolist() == [2, 0, 7, 5, 3, 1, 6, 4]
    assert order.few(np.arange(20) % 2, 4, 5).tolist() == [5, 8, 12, 14, 15, 17, 18, 19]


def test_the_hash_is_of_the_rows_that_are_served_whatever_their_type():
    rows = order.epoch_order(3, 2, 10)
    assert order.order_hash(rows, 4) == order.order_hash(rows, 4, True) == "7e75ebf4729a9a2c"
    assert order.order_hash(rows, 4, False) == "9627925400186940"
    assert order.order_hash(rows.astype(np.int32), 4) == order.order_hash(rows, 4)
    assert order.order_hash(rows[:8], 4) == order.order_hash(rows, 4)


def test_a_last_batch_is_left_out_unless_asked_for():
    assert (order.steps_per_epoch(10, 4), order.steps_per_epoch(10, 4, False)) == (2, 3)


def test_cuts_by_hand():
    assert [part.tolist() for part in order.cut(np.arange(5), 2)] == [[0, 1, 2], [3, 4]]
    assert [part.tolist() for part in order.cut(np.arange(6), 2, 2)] == [[0, 1, 2, 3], [4, 5]]
    assert order.share(np.arange(6), 0, 2, 2).tolist() == [0, 1, 2, 3]


def test_no_draws_and_no_rows_are_arrays_too():
    assert order.draws(0, 0, 0, 3, 0).shape == (3, 0)
    assert order.shard_order(np.empty(0, np.int64), 0).tolist() == []
    plan = order.fetch_plan([], np.array([2, 2]), 3)
    assert (plan.units, plan.unit.tolist(), plan.offset.tolist()) == ([], [], [])


def test_units_follow_the_groups_in_the_order_of_need():
    plan = order.fetch_plan([np.array([2, 1]), np.array([3, 0])], np.array([2, 2]), 2)
    assert [unit.tolist() for unit in plan.units] == [[2, 3], [1, 0]]
    assert {unit.dtype for unit in plan.units} == {np.dtype(np.int64)}
    assert plan.unit.tolist() == [0, 1, 0, 1]
    assert plan.offset.tolist() == [0, 0, 1, 1]


def test_rows_of_a_group_are_read_in_the_order_of_need():
    rows = np.random.default_rng(0).permutation(200)
    plan = order.fetch_plan([rows], np.array([100, 100]), 1000)
    first = int(rows[0] >= 100)
    assert plan.units[0].tolist() == sorted(rows.tolist(), key=lambda row: (row >= 100) != first)
