"""The meter: seconds go to their stages, and the last line names what to do about waiting."""

from __future__ import annotations

import time
from typing import Any

import pytest

from raydeep.data.meter import STAGES, Meter, verdict, waiting


def line(seconds: float = 10.0, device: str = "cpu", start: float | None = 0.0, **spent: float) -> dict[str, Any]:
    """A line of metrics.jsonl."""
    meter = {f"{stage}_s": spent.get(stage, 0.0) for stage in STAGES}
    return {"seconds": seconds, "device": device, "meter": meter, "first_batch_s": 1.25, "start_s": start}


def test_seconds_go_to_the_stage_and_start_anew_when_taken():
    meter = Meter()
    with meter("augment"):
        time.sleep(0.02)
    meter.add("decode", 3.0)
    taken = meter.take()
    assert 0.02 <= taken["augment_s"] < 0.5
    assert taken["decode_s"] == 3.0
    assert set(taken) == {f"{stage}_s" for stage in STAGES}
    assert set(meter.take().values()) == {0.0}


def test_the_wait_for_the_first_batch_is_kept_apart():
    meter = Meter()
    meter.add("wait", 4.0)
    meter.arrived()
    meter.add("wait", 0.5)
    meter.arrived()
    assert meter.start_s == 4.0
    assert meter.first_batch_s is not None
    assert meter.take()["wait_s"] == 0.5


def test_a_stage_that_fails_is_timed_too():
    meter = Meter()
    with pytest.raises(KeyError), meter("step"):
        raise KeyError
    assert meter.seconds["step"] > 0


def test_waiting_on_a_cpu_is_what_was_waited_and_on_a_gpu_what_it_did_not_work():
    assert waiting(line(wait=4)) == pytest.approx(0.4)
    assert waiting(line(start=5.0, wait=4)) == pytest.approx(0.8)
    assert waiting(line(device="cuda", wait=4, transfer=1, augment=1, step=5)) == pytest.approx(0.3)
    assert waiting(line(device="cuda", step=11)) == 0


@pytest.mark.parametrize(
    ("rows", "cache", "decoded", "parts", "absent"),
    [
        ([line(step=9.9, wait=0.1)], "stream", 0, ["not input-bound: 1%", "1.2 s, not counted"], ["augm"]),
        ([line(step=5, augment=4)], "resident", 0, ["not input-bound", "40% on augmenting them"], []),
        (
            [line(wait=6, decode=9, read=1), line(wait=4, decode=9)], "stream", 10**9,
            ["input-bound: 50%", "decode takes most", "memory_bytes 1,000,000,000", "--store decoded", "more CPUs"],
            ["faster storage"],
        ),
        ([line(wait=6, decode=1, read=9)], "stream", 10**12, ["read takes most", "faster storage"], ["memory_bytes"]),
        ([line(wait=6, read=9)], "resident", 0, ["input-bound: 60%", "raise train.batch_size"], ["CPUs", "shard"]),
    ],
    ids=["fed", "augmenting", "decoding", "reading", "copying"],
)  # fmt: skip
def test_the_verdict_says_how_much_and_which_knob(rows, cache, decoded, parts, absent):
    text = verdict(rows, cache, decoded, 24 * 10**9)
    assert "\n" not in text
    for part in parts:
        assert part in text
    for part in absent:
        assert part not in text
