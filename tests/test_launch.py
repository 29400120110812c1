"""How a training on Ray Train is stopped: the handlers that its driver puts in place. Starts no Ray."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import wait_for
from ray.train.torch import TorchTrainer

from raydeep.train import launch


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """What came through to Ray Train's own handler."""
    came: list[int] = []

    def register(self: Any, controller: Any) -> None:
        signal.signal(signal.SIGINT, lambda number, frame: came.append(number))

    monkeypatch.setattr(TorchTrainer, "_register_sigint_handler", register)
    with launch._own_signals():
        yield came


def trainer(workers: Path) -> Any:
    kind = launch._trainer(workers)
    made = kind.__new__(kind)
    made._register_sigint_handler(None)
    return made


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_while_workers_start_a_stop_waits_for_nothing(tmp_path: Path, stopped: list[int], kind: signal.Signals) -> None:
    made = trainer(tmp_path)
    (tmp_path / "rank-0.step").write_bytes(bytes(8))  # of a worker of an attempt before
    with pytest.raises(SystemExit):
        signal.raise_signal(kind)
    assert made.stopped_by == kind  # what the command ends with
    assert not (tmp_path / "ask").exists()
    assert stopped == []


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_workers_at_work_save_before_they_are_stopped(tmp_path: Path, stopped: list[int], kind: signal.Signals) -> None:
    made = trainer(tmp_path)
    (tmp_path / "rank-0.json").write_text("{}")
    seen: list[list[int]] = []

    def worker() -> None:
        wait_for((tmp_path / "ask").exists, 30, "to be asked for a checkpoint")
        seen.append(stopped[:])  # not told before it is written
        (tmp_path / "ask").unlink()

    thread = threading.Thread(target=worker)
    thread.start()
    signal.raise_signal(kind)
    thread.join()
    assert (seen, stopped, made.stopped_by) == ([[]], [signal.SIGINT], kind)
    begun = time.monotonic()
    signal.raise_signal(kind)  # a second one does not wait
    assert time.monotonic() - begun < launch.SAVE_FIRST_S / 2
    assert stopped == [signal.SIGINT] * 2
