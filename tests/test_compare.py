"""The page that compares runs, over run folders made by hand. No cluster, no torch."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from browsers import chromium, look, needs_chromium
from runfolders import CLASSES, FACTS, FAILED, TRIALS, Page, choose, dump, ledger, make_run, put
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select
from typer.testing import CliRunner

from raydeep import mirror
from raydeep.cli import app
from raydeep.errors import RaydeepError
from raydeep.report.compare import MARKS, write_comparison
from raydeep.report.differences import comparable, costs, differing, doubt, headline, per_class, volumes
from raydeep.report.folder import DEFAULT, read_run
from raydeep.report.words import pick


def change(path: Path, **facts: object) -> None:
    dump(path, {**json.loads(path.read_text()), **facts})


def other_run(folder: Path) -> Path:
    """A run like the first, with another seed and learning rate, 2 points lower and a quarter larger."""
    make_run(folder)
    (folder / "job.yaml").write_text(
        "name: digits\nseed: 2\nmodel:\n  name: resnet8\ntrain:\n  epochs: 40\n  lr: 0.1\nstorage: elsewhere\n"
        "search:\n  trials: 60\n  space:\n    prune.sparsity: {low: 0.1, high: 0.9}\n"
    )
    change(folder / "provenance.json", id="other", seed=2, versions={"python": "3.11.2", "torch": "2.16.0"})
    worse = {"val_accuracy": lambda v: v - 0.02, "bytes": lambda v: v * 5 // 4}
    put(folder, [{k: worse[k](v) if k in worse else v for k, v in row.items()} for row in ledger(folder)])
    front = json.loads((folder / "front.json").read_text())
    for row in [front["dense"], *front["models"]]:
        row |= {"val_accuracy": row["val_accuracy"] - 0.02, "test_accuracy": row["test_accuracy"] - 0.02}
        row |= {"bytes": row["bytes"] * 5 // 4}
    dump(folder / "front.json", front)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["confusion"][4][4] -= 9
    evaluation["confusion"][4][9] += 9
    dump(folder / "evaluation.json", evaluation)
    return folder


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs. Read only: the tests share them."""
    folder = tmp_path_factory.mktemp("runs")
    return [make_run(folder / "first"), other_run(folder / "second")]


@pytest.fixture(scope="module")
def page(pair: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_comparison(pair, tmp_path_factory.mktemp("page") / "compare.html"))


def test_the_page_is_whole_and_loads_nothing(page: Page) -> None:
    assert len(page.html.encode()) < 6_000_000
    assert page.html.startswith("<!doctype html>")
    assert [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "action", "data") if key in a] == []
    assert "default-src 'none'" in page.html
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {"h-front", "h-models", "h-volume", "h-keys", "h-training", "h-classes", "h-cost"} <= set(ids)
    assert all("aria-label" in attrs for _, attrs in page.tags if attrs.get("role") == "img")
    labels = {attrs["for"] for tag, attrs in page.tags if tag == "label"}
    assert {attrs["id"] for tag, attrs in page.tags if tag == "select"} == labels


def test_each_run_has_its_front_and_is_told_apart_by_more_than_colour(pair: list[Path], page: Page) -> None:
    for path, one in zip(pair, page.data["runs"], strict=True):
        done = read_run(path).done
        assert [one["points"]["trial"][i] for i in one["front"]][::-1] == [row["trial"] for row in choose(done)]
        assert len(one["points"]["bytes"]) == TRIALS - FAILED
        assert one["dense"]["bytes"] == 312_000  # what the search was held against
    marks = [(one["symbol"], one["dash"]) for one in page.data["runs"]]
    assert len({symbol for symbol, _ in marks}) == len({dash for _, dash in marks}) == 2
    assert len({mark.symbol for mark in MARKS}) == len({mark.path for mark in MARKS}) == len(MARKS)
    for scheme in ("light", "dark"):
        assert len({getattr(mark, scheme) for mark in MARKS}) == len(MARKS)
    assert [(one["letter"], one["name"]) for one in page.data["runs"]] == [("A", "first"), ("B", "second")]


@pytest.mark.parametrize(("look", "ground"), [("light", "#ffffff"), ("dark", "#14171a")])
def test_marks_stand_out_from_the_page(look: str, ground: str) -> None:
    def light(colour: str) -> float:  # relative luminance, WCAG 2
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        r, g, b = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    for mark in MARKS:
        low, high = sorted([light(getattr(mark, look)), light(ground)])
        assert (high + 0.05) / (low + 0.05) >= 4.5, mark.symbol  # letters have the colour too


def test_answers_stand_beside_each_other(pair: list[Path], page: Page) -> None:
    first, second = (read_run(path) for path in pair)
    a, b = pick(first), pick(second)
    assert a is not None
    assert b is not None
    assert headline([first, second], "AB").startswith(f"A: {100 * a['test_accuracy']:.1f}% at ")
    assert headline([first, second], "AB") in page.text
    rows = [row[:2] for row in page.rows if row and re.fullmatch(r"[AB] (dense|t\d+answer)", row[0])]
    assert rows == [
        ["A dense", "98.6%"], [f"A {a['label']}answer", f"{100 * a['test_accuracy']:.1f}%"],
        ["B dense", "96.6%"], [f"B {b['label']}answer", f"{100 * b['test_accuracy']:.1f}%"],
    ]  # fmt: skip
    p, q = a["test_accuracy"], b["test_accuracy"]
    error = 100 * math.sqrt((p * (1 - p) + q * (1 - q)) / 360)
    assert f"{100 * abs(p - q):.1f} points apart. One standard error of such a difference is about ±{error:.1f}" in (
        doubt([first, second])
    )


def test_of_many_runs_the_smallest_and_the_most_accurate_are_named(pair: list[Path]) -> None:
    first, second = (read_run(path) for path in pair)
    said = headline([second, first, second, second], "ABCD")
    assert said.startswith("Of 4 runs, the smallest and most accurate answer is B: ")
    assert first.front is not None
    large = read_run(pair[0])
    assert large.front is not None
    large.front["models"] = [row | {"bytes": row["bytes"] * 9, "test_accuracy": 0.999} for row in large.front["models"]]
    said = headline([second, first, large, second], "ABCD")
    assert said.startswith("Of 4 runs, the smallest answer is B: ")
    assert "; the most accurate C: 99.9% at" in said
    assert doubt([first, second, large]) == ""


def test_keys_that_differ(page: Page) -> None:
    rows = {row[0]: row[1:] for row in page.rows if len(row) == 3}
    assert rows["seed"] == ["1", "2"]
    assert rows["train.lr"] == ["–", "0.1"]
    assert rows["search.space.prune.sparsity"] == ["–", "low: 0.1, high: 0.9"]
    assert "storage" not in rows
    assert "train.epochs" not in rows
    assert "4 other keys are the same." in page.text  # name, model.name, train.epochs, search.trials
    assert rows["torch"] == ["2.15.0", "2.16.0"]
    assert rows["ray"] == ["2.60.0", "–"]
    assert "python\u00a03.11.2" in page.text
    assert rows["Epochs trained"] == ["40", "40"]


def test_differing() -> None:
    differ, same = differing([{"a": "1", "b": "2"}, {"b": "2", "c": "3"}, {"a": "1", "b": "2"}])
    assert differ == [("a", ["1", "–", "1"]), ("c", ["–", "3", "–"])]
    assert same == [("b", "2")]


def test_costs_of_a_run_without_trials(pair: list[Path], tmp_path: Path) -> None:
    found = dict(costs([read_run(make_run(tmp_path / "run", search=False)), read_run(pair[0])]))
    assert found["Epochs trained"] == ["40", "40"]
    assert found["Trials"] == ["–", "60, 2 failed"]


def test_the_same_job_twice_differs_in_nothing(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name) for name in "ab"]
    text = Page(write_comparison(runs, tmp_path / "page.html")).text
    assert "In nothing: all 5 keys are the same." in text


# whether they can be compared


def test_other_test_data_is_said_first_and_loudly(pair: list[Path], page: Page, tmp_path: Path) -> None:
    assert [attrs for _, attrs in page.tags if attrs.get("role") == "alert"] == []
    assert "All were tested on the same 360 pictures (dataset sha256:9b1e4)." in page.text
    run = make_run(tmp_path / "run")
    dataset = json.loads((run / "provenance.json").read_text())["dataset"]
    change(run / "provenance.json", dataset=dataset | {"hash": "ffff" * 16, "rows": {"test": 500}})
    said = Page(write_comparison([*pair, run], tmp_path / "page.html"))
    assert len([attrs for _, attrs in said.tags if attrs.get("role") == "alert"]) == 1
    assert "Not comparable: the runs were tested on different data." in said.text
    assert "A and B on 360 pictures of dataset sha256:9b1e4; C on 500 pictures of dataset ffffffffffff. " in said.text
    assert "The hash covers all splits" not in said.text
    first, second = (read_run(path) for path in pair)
    assert headline([first, second, read_run(run)], "ABC") not in said.text
    change(run / "provenance.json", dataset=dataset | {"hash": "ffff" * 16})
    assert comparable([first, read_run(run)])[0] is False
    assert "the test pictures could still be the same, but nothing shows that" in comparable([first, read_run(run)])[1]
    change(run / "provenance.json", dataset=dataset | {"image": [32, 32, 1]})
    same, about = comparable([first, read_run(run)])
    assert same is True
    assert about.endswith("as pictures of [8, 8, 1], [32, 32, 1].")


def test_data_that_is_not_known_is_said(pair: list[Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    change(run / "provenance.json", dataset=None)
    assert comparable([read_run(pair[0]), read_run(run)]) == (
        None, "Whether the runs are tested on the same pictures is not known: B names no dataset yet.",
    )  # fmt: skip
    said = Page(write_comparison([pair[0], run], tmp_path / "page.html"))
    assert "Perhaps not comparable." in said.text
    assert len([attrs for _, attrs in said.tags if attrs.get("role") == "alert"]) == 1


# fronts


def searched(folder: Path, dense: tuple[float, int], trials: list[tuple[float, int]], **facts: object) -> Path:
    """A run whose search was held against this dense model and has these results, accuracy and bytes each."""
    run = make_run(folder)
    (run / "front.json").unlink()
    change(run / "provenance.json", reference={"val_accuracy": dense[0], "bytes": dense[1], "macs": 10})
    row = {"event": "rung", "rung": 0, "epochs": 1, "config": {}, "macs": 5}
    put(run, [FACTS | facts, *({**row, "trial": i, "val_accuracy": a, "bytes": b} for i, (a, b) in enumerate(trials))])
    return run


def test_hypervolume_is_that_beyond_one_corner(tmp_path: Path) -> None:
    first = read_run(searched(tmp_path / "a", (0.98, 1000), [(0.97, 500), (0.80, 10)]))
    second = read_run(searched(tmp_path / "b", (0.96, 2000), [(0.95, 1000), (0.95, 1500)]))
    # one corner: 10 points below 96%, at 2000 bytes
    assert volumes([first, second], DEFAULT) == pytest.approx([11 * 2, 9 * 1])
    trained = read_run(make_run(tmp_path / "c", search=False))
    assert volumes([first, trained, second], DEFAULT) == [pytest.approx(22), None, pytest.approx(9)]
    assert volumes([trained, trained], DEFAULT) == [None, None]


def test_searches_with_other_objectives_are_held_against_accuracy_and_size(tmp_path: Path) -> None:
    trials = [(0.97, 500), (0.96, 600), (0.95, 400)]
    first = searched(tmp_path / "a", (0.98, 1000), trials)
    second = searched(tmp_path / "b", (0.98, 1000), trials, objectives={"accuracy": "max", "macs": "min"})
    page = Page(write_comparison([first, second], tmp_path / "page.html"))
    assert [sorted(one["front"]) for one in page.data["runs"]] == [[0, 2], [0, 2]]
    assert page.data["objectives"] == ["val_accuracy", "bytes"]
    assert "The front of B is drawn by these objectives, not by those of its own search." in page.text
    page = Page(write_comparison([second, first], tmp_path / "page.html"))
    assert page.data["objectives"] == ["val_accuracy", "bytes"]
    assert "The front of A is drawn by these objectives" in page.text
    same = [searched(tmp_path / name, (0.98, 1000), trials, objectives={"macs": "min"}) for name in "cd"]
    page = Page(write_comparison(same, tmp_path / "page.html"))
    assert page.data["objectives"] == ["macs"]
    assert "by MACs, small faint ones" in page.text
    assert "The front of" not in page.text


def test_runs_that_are_trained_only_or_not_finished(tmp_path: Path) -> None:
    trained, half, bare = make_run(tmp_path / "a", search=False), make_run(tmp_path / "b"), tmp_path / "c"
    for name in ("front.json", "evaluation.json"):
        (half / name).unlink()
    bare.mkdir()
    (bare / "job.yaml").write_text("name: bare\n")
    page = Page(write_comparison([trained, half, bare], tmp_path / "page.html"))
    assert page.data["runs"][0]["points"]["bytes"] == []
    assert page.data["runs"][2]["dense"] is None
    assert page.data["classes"] is None
    assert "A: 98.6% at 312\u00a0kB (dense); B: not finished; C: not finished." in (
        headline([read_run(path) for path in (trained, half, bare)], "ABC")
    )
    assert "Nothing measured yet." in page.text
    two = [bare, tmp_path / "d"]
    two[1].mkdir()
    (two[1] / "job.yaml").write_text("name: other\n")
    page = Page(write_comparison(two, tmp_path / "page.html"))
    assert len(page.scripts) == 1  # no plot, so no plotly


# classes


def test_classes_that_differ_most_stand_first(page: Page) -> None:
    rows = [row for row in page.rows if len(row) == 4 and row[0] in CLASSES]
    assert rows[0] == ["4", "100.0%", "75.0%", "−25.0"]
    assert {row[3] for row in rows[1:]} == {"+0.0"}
    assert "The smallest class has 36 test pictures: one is 2.8 points." in page.text


def test_per_class() -> None:
    found = per_class({"names": ["a", "b", "c"], "accuracy": [[0.5, 1.0, None], [0.75, 0.0, 0.5], [None, 0.5, None]]})
    assert [(row["name"], row["gap"]) for row in found] == [("b", 1.0), ("a", 0.25), ("c", None)]
    assert per_class(None) == []


def test_other_classes_are_not_held_against_each_other(pair: list[Path], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", classes=["zero", *CLASSES[1:]])
    assert Page(write_comparison([pair[0], run], tmp_path / "page.html")).data["classes"] is None


# input


def test_what_can_not_be_compared_is_one_error(pair: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    link = tmp_path / "link"
    link.symlink_to(pair[0])
    for runs in ([pair[0], pair[0]], [pair[0], pair[1], pair[0].parent / "." / "first"], [pair[0], link]):
        with pytest.raises(RaydeepError, match="first: the same run twice"):
            write_comparison(runs, out)
    with pytest.raises(RaydeepError, match="is not a run folder"):
        write_comparison([pair[0], tmp_path], out)
    with pytest.raises(RaydeepError, match="no such folder"):
        write_comparison([pair[0], tmp_path / "none"], out)
    with pytest.raises(RaydeepError, match="1 runs: expected 2 to 8"):
        write_comparison(pair[:1], out)
    with pytest.raises(RaydeepError, match="9 runs: expected 2 to 8"):
        write_comparison([tmp_path / str(k) for k in range(9)], out)
    with pytest.raises(RaydeepError, match="a folder; --out takes the name of the page"):
        write_comparison(pair, tmp_path)
    assert not out.exists()


def test_text_from_the_folders_stays_text(tmp_path: Path) -> None:
    evil = "</script><b>\"'&{{ 7*7 }}<!--"
    runs = [make_run(tmp_path / name, classes=[evil, *CLASSES[1:]]) for name in ("a", "b")]
    (runs[0] / "job.yaml").write_text(json.dumps({"name": evil, evil: evil}))
    front = json.loads((runs[0] / "front.json").read_text())
    for row in front["models"]:
        row["label"] = evil
    dump(runs[0] / "front.json", front)
    change(runs[0] / "provenance.json", command=evil, versions={evil: evil}, dataset={"hash": evil, "classes": evil})
    page = Page(write_comparison(runs, tmp_path / "page.html", [evil, "b"]))  # parses with every element closed
    assert page.of("b") == []
    assert len(page.of("script")) == 3
    assert page.text.count(evil) >= 7


@pytest.mark.parametrize("value", [3, "x", [1], {"a": "b"}])
def test_values_of_another_kind_are_left_out(pair: list[Path], tmp_path: Path, value: object) -> None:
    run = make_run(tmp_path / "run")
    dump(run / "provenance.json", {"dataset": value, "versions": value, "hardware": value, "reference": value})
    dump(run / "evaluation.json", {"confusion": value})
    (run / "job.yaml").write_text(json.dumps({"name": value, "search": value}))
    assert Page(write_comparison([pair[0], run], tmp_path / "page.html")).data["classes"] is None


# the command


def test_the_command(pair: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", *map(str, pair)])
    assert (done.exit_code, done.output) == (0, "compare.html\n")
    assert Page(tmp_path / "compare.html").data["runs"][1]["name"] == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["compare.html"]
    done = CliRunner().invoke(app, ["report", *map(str, pair), "--out", "new/page.html"])
    assert (done.output, (tmp_path / "new" / "page.html").is_file()) == ("new/page.html\n", True)
    run = make_run(tmp_path / "run")
    done = CliRunner().invoke(app, ["report", str(run)])
    assert (done.exit_code, done.output) == (0, f"{run}/report.html\n")
    done = CliRunner().invoke(app, ["report", str(run), "--out", "page.html"])
    assert "--out names the page that compares runs" in str(done.exception)
    done = CliRunner().invoke(app, ["report", str(run), str(run)])
    assert "the same run twice" in str(done.exception)


def test_runs_of_a_bucket(
    pair: list[Path], bucket: str, on: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = mirror.place(f"{bucket}/far")
    shutil.copytree(pair[1], run)
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "step-1.safetensors").write_bytes(b"x")
    mirror.push_folder(run)
    on("b")
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", str(pair[0]), f"{bucket}/far"])
    assert (done.exit_code, done.output) == (0, "compare.html\n")
    assert f"{bucket}/far" in Page(tmp_path / "compare.html").text
    assert not (mirror.place(f"{bucket}/far") / "checkpoints").exists()


# in a browser


@needs_chromium
def test_browser_draws_both_runs_on_any_screen_and_on_paper(pair: list[Path], page: Page, tmp_path: Path) -> None:
    path = write_comparison(pair, tmp_path / "page.html")
    with chromium(tmp_path / "profile") as driver:
        look(driver, 1200)
        driver.get(path.as_uri())

        def plot(name: str, what: str) -> Any:
            return driver.execute_script(f"const plot = document.getElementById('plot-{name}'); return {what}")

        drawn = "plot.querySelectorAll('.scatterlayer .point').length"
        assert plot("front", drawn) == 2 * (TRIALS - FAILED + 1)  # trials and dense
        assert plot("classes", drawn) == 2 * len(CLASSES)
        symbols = plot("front", "[...new Set(plot.data.map((trace) => trace.marker.symbol))]")
        assert symbols == ["circle", "circle-open", "square", "square-open"]
        assert plot("accuracy", "plot.data.map((trace) => trace.line.dash)") == ["solid", "dash"]

        curve = page.data["runs"][0]["curves"][0]
        assert plot("loss", "plot.data[0].y[0]") == curve["val_loss"][0]
        driver.find_element(By.CSS_SELECTOR, "[data-loss=train_loss]").send_keys(Keys.ENTER)
        assert plot("loss", "plot.data[0].y[0]") == curve["train_loss"][0]

        lines = "plot.data.filter((trace) => trace.mode === 'lines+markers').length"
        assert plot("front", lines) == 2
        assert plot("front", "plot.layout.yaxis.range[0]") > 0.8
        driver.find_element(By.CSS_SELECTOR, "[data-framed=no]").click()
        assert plot("front", "plot.layout.yaxis.range[0]") < 0.8
        Select(driver.find_element(By.ID, "axis-x")).select_by_value("macs")
        assert plot("front", lines) == 0  # it joins a front only over what that is judged by
        assert driver.find_element(By.ID, "h-front").text == "Validation accuracy against MACs"

        for width in (320, 390, 1200):
            look(driver, width)
            assert driver.execute_script("return document.documentElement.scrollWidth") == width
        colour = "plot.data[1].line.color"
        assert plot("front", colour) == MARKS[0].light
        look(driver, 1200, "dark")
        assert plot("front", colour) == MARKS[0].dark
        driver.execute_script("window.dispatchEvent(new Event('beforeprint'))")
        assert plot("front", colour) == MARKS[0].light
        driver.execute_script("window.dispatchEvent(new Event('afterprint'))")
        assert plot("front", colour) == MARKS[0].dark
        assert driver.get_log("browser") == []
