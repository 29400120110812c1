"""Every case of the table, as a command of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from hostile import made
from hostile.harness import Case, Ended, Server, Stock, examine, run_in
from hostile.table import CASES, PAGE, page

NOTHING = Case("", "nothing", "raydeep --version", r"raydeep \d", code=0)
AT_ONCE = 3


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    with made.stock(tmp_path_factory.mktemp("stock")) as made_:
        yield made_


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    found = Server()
    yield found
    found.close()


@pytest.fixture(scope="module")
def ended(
    request: pytest.FixtureRequest, server: Server, stock: Stock, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[int, Future[list[str]]]]:
    """Number of a case → what is wrong with it, for those that this session looks at: several run at once."""
    root = tmp_path_factory.mktemp("cases")
    wanted = [
        item.callspec.params["number"]
        for item in request.session.items
        if getattr(item, "originalname", "") == "test_a_hostile_case_ends_as_stated"
    ]
    nothing, *_ = run_in(NOTHING, stock, server, root / "nothing")

    def judge(number: int) -> list[str]:
        return examine(CASES[number], *run_in(CASES[number], stock, server, root / str(number)), nothing.peak)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {number: pool.submit(judge, number) for number in wanted}


@pytest.mark.parametrize("number", range(len(CASES)), ids=lambda number: f"{CASES[number].group}: {CASES[number].name}")
def test_a_hostile_case_ends_as_stated(number: int, ended: dict[int, Future[list[str]]]) -> None:
    wrong = ended[number].result()
    assert not wrong, "\n".join([f"$ {CASES[number].command[:300]}", *wrong])


# Commands of each kind, once more as `python -m raydeep.cli`: the fork server tells the truth.
FRESH = ["PNG cut in the middle", "a name that clears the terminal and sets its title", "a billion laughs",
         "a link in a circle for a run", "front.json cut off"]  # fmt: skip


@pytest.mark.parametrize("name", FRESH)
def test_a_fresh_interpreter_ends_alike(name: str, stock: Stock, server: Server, tmp_path: Path) -> None:
    [case] = [case for case in CASES if case.name == name]
    alone, box, before = run_in(case, stock, None, tmp_path / "box")
    assert examine(case, alone, box, before, 0) == []
    (tmp_path / "box").rename(tmp_path / "fresh")
    forked, *_ = run_in(case, stock, server, tmp_path / "box")
    assert (forked.code, forked.out, forked.err) == (alone.code, alone.out, alone.err)


def test_the_harness_sees_what_is_wrong(stock: Stock, server: Server, tmp_path: Path) -> None:
    """A case that states another end, or none of its traces, is told."""
    [case] = [case for case in CASES if case.name == "a torn picture among 40"]
    ended, box, before = run_in(case, stock, server, tmp_path)
    told = examine(replace(case, code=0, says="all is well", leaves=(), peak=0), ended, box, before, 1)
    for word in ("exit code 2, expected 0", "expected words that match", "left 'out.quarantine.jsonl'", "MiB more"):
        assert any(word in line for line in told), told
    (tmp_path / "here" / "pics" / "cat" / "00.png").write_bytes(b"")
    (tmp_path / "home" / "left").touch()
    worse = Ended(1, "\x1b[2J", "Traceback (most recent call last)\nValueError: x\n", 0, 0.0)
    told = examine(case, worse, box, {**before, "gone.png": 0}, 0)
    for word in (
        "a traceback",
        "steer a terminal",
        "'gone.png' is gone",
        "'pics/cat/00.png' has changed",
        "left in home",
    ):
        assert any(word in line for line in told), told


def test_names_differ_and_the_table_is_current() -> None:
    assert len({(case.group, case.name) for case in CASES}) == len(CASES) >= 80
    assert page() == PAGE.read_text(), "write it anew: cd tests && python -m hostile.table"
