"""Every case of the table, as a command of its own."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from hostile import cases_configs, cases_pictures, cases_tables, made
from hostile.harness import Case, Server, Stock, examine, run_in

CASES: list[Case] = [*cases_pictures.CASES, *cases_tables.CASES, *cases_configs.CASES]
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
