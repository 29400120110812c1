"""The report as people meet it: in a real Chromium, with mouse, keyboard, a phone's width, dark and on paper.

One browser serves the module.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import browsers
import pytest
from browsers import chromium, needs_chromium
from runfolders import CLASSES, FAILED, PICTURE, TRIALS, Page, dump, make_run
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from raydeep.report.page import write_report

pytestmark = needs_chromium

WIDE, NARROW, A4 = 1200, 390, 688  # pixels; of A4 those between the margins


class Browser:
    """A page open in Chromium."""

    def __init__(self, driver: webdriver.Chrome, page: Path) -> None:
        self.driver, self.address = driver, page.as_uri()
        self.data = Page(page).data

    def look(self, width: int = WIDE, scheme: str = "light", media: str = "") -> None:
        """Go on with the page in other circumstances."""
        browsers.look(self.driver, width, scheme, media)

    def settle(self) -> None:
        """Let the page draw what changed."""
        self.js("return new Promise((done) => requestAnimationFrame(() => setTimeout(done, 60)))")

    def reset(self) -> None:
        """The page as it opened: loading its 5 MB anew for each test would take most of their time."""
        self.look()
        self.js(
            """const set = (id, value) => {
              const box = document.getElementById(id);
              if (box.value !== value) { box.value = value; box.dispatchEvent(new Event("change")); }
            };
            set("chosen", "");
            set("axis-x", "bytes");
            set("axis-y", "val_accuracy");
            document.getElementById("unbrush").click();
            document.querySelector("[data-over=at]").click();
            document.querySelector("#trials button.sort").click();
            document.querySelectorAll("#trials button.sort")[1].click();
            document.activeElement.blur();"""
        )

    def cdp(self, command: str, **parameters: Any) -> dict[str, Any]:
        return self.driver.execute_cdp_cmd(command, parameters)

    def js(self, code: str, *values: Any) -> Any:
        return self.driver.execute_script(code, *values)

    def all(self, selector: str) -> list[Any]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> Any:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def mouse(self) -> ActionChains:
        return ActionChains(self.driver, duration=20)

    def at(self, point: int) -> Any:
        """The mouse above a point of the front's plot, by the pixel that its axes put it at."""
        self.js("document.getElementById('plot-front').scrollIntoView({block: 'center'})")
        x, y = self.js(
            """const plot = document.getElementById("plot-front"), {xaxis, yaxis} = plot._fullLayout, i = arguments[0];
            const data = JSON.parse(document.getElementById("run-data").textContent).points;
            const box = plot.getBoundingClientRect();
            return [box.left + xaxis._offset + xaxis.d2p(data.bytes[i]),
              box.top + yaxis._offset + yaxis.d2p(data.val_accuracy[i])];
            """,
            point,
        )
        mouse = self.mouse()
        mouse.w3c_actions.pointer_action.move_to_location(round(x), round(y))
        return mouse

    def chosen(self) -> list[set[str]]:
        """What the parts of the page say is selected: rows, list, thick line."""
        return [
            {row.get_attribute("data-point") for row in self.all("tr.selected")},
            {Select(self.one("#chosen")).first_selected_option.get_attribute("value")} - {""},
            {path.get_attribute("data-point") for path in self.all("#parallel path.chosen")},
        ]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    folder = tmp_path_factory.mktemp("report")
    page = write_report(make_run(folder / "run", classes=["</script><b>", *CLASSES[1:]]))
    with chromium(folder / "profile") as driver:
        browser = Browser(driver, page)
        browser.look()
        driver.get(browser.address)
        yield browser
        assert driver.get_log("browser") == []  # after all that the tests did


@pytest.fixture
def wide(browser: Browser) -> Browser:
    browser.reset()
    return browser


def test_as_many_points_as_trials_and_no_word_on_the_console(wide: Browser) -> None:
    assert wide.driver.get_log("browser") == []
    trials = TRIALS - FAILED
    assert len(wide.all("#plot-front .scatterlayer .point")) == trials + 1  # and the dense model
    assert len(wide.all("#parallel path.trial")) == trials
    assert len(Select(wide.one("#chosen")).options) == trials + 2  # dense, and none
    assert len(wide.all(".js-plotly-plot")) == 7
    assert len(wide.all("b")) == 0  # no markup out of the run
    sizes = wide.js("return document.getElementById('plot-front').data.slice(0, 2).map((t) => [t.name, t.x.length])")
    rungs, front = wide.data["points"]["rungs"], set(wide.data["front"])
    short = sum(n == 1 for i, n in enumerate(rungs) if i not in front)
    assert sizes == [["stopped at rung 0", short], ["trained further", trials - len(front) - short]]


def test_hover_tells_the_whole_configuration_of_that_trial(wide: Browser) -> None:
    points = wide.data["points"]
    for i in wide.data["front"][:2]:
        wide.at(i).perform()
        said = wide.one("#plot-front .hovertext").text
        assert f"Trial {points['trial'][i]}" in said
        for key, column in points["config"].items():
            assert f"{key} {column[i]}" in " ".join(said.split())


def test_a_click_selects_everywhere_and_the_layers_follow(wide: Browser) -> None:
    points, layers = wide.data["points"], [model["label"] for model in wide.data["layers"]]
    exported = next(i for i in wide.data["front"] if points["label"][i] == layers[-1])
    assert wide.chosen() == [set()] * 3
    wide.at(exported).click().perform()
    assert wide.chosen() == [{str(exported)}] * 3
    assert wide.one("#readout").text.startswith(f"Trial {points['trial'][exported]}, model {layers[-1]}: test ")
    assert f"prune.sparsity {points['config']['prune.sparsity'][exported]}" in wide.one("#readout").text
    assert Select(wide.one("#layers-of")).first_selected_option.text == layers[-1]
    bits = [row.find_elements(By.TAG_NAME, "td")[4].text for row in wide.all("#layers-table tbody tr")]
    assert bits == [str(b) for b in wide.data["layers"][-1]["bits"]]
    assert len(wide.all("#plot-layers .barlayer .point")) == 3 * len(bits)
    wide.at(exported).click().perform()
    assert wide.chosen() == [set()] * 3  # once more: none


def test_a_trial_that_is_not_exported_can_be_chosen_too(wide: Browser) -> None:
    points = wide.data["points"]
    other = points["label"].index(None)
    Select(wide.one("#chosen")).select_by_value(str(other))
    assert wide.chosen() == [{str(other)}] * 3
    assert wide.one("#readout").text.endswith("· not exported")
    assert wide.one("#layers-note").text.startswith(f"Trial {points['trial'][other]} is not exported")


def test_the_keyboard_reaches_rows_points_and_axes(wide: Browser) -> None:
    button = wide.all("table.models button.choose")[1]
    point = button.find_element(By.XPATH, "ancestor::tr").get_attribute("data-point")
    wide.js("arguments[0].focus()", button)
    outline = wide.js("return getComputedStyle(document.activeElement).outlineStyle")
    button.send_keys(Keys.ENTER)
    assert wide.chosen() == [{point}] * 3
    assert button.get_attribute("aria-pressed") == "true"
    axis = wide.one("[role=slider][aria-label^='quantize.weight_bits']")
    axis.send_keys(Keys.ARROW_DOWN)  # the widest are left out
    axis = wide.driver.switch_to.active_element
    assert axis.get_attribute("aria-valuetext") == "2, 3, 4"
    frame = wide.js(
        "const style = getComputedStyle(document.activeElement.querySelector('.grip'));"
        "return [style.stroke, parseFloat(style.strokeWidth)]"
    )
    assert outline in ("auto", "solid")
    assert (frame[0] not in ("none", "transparent", "rgba(0, 0, 0, 0)"), frame[1] >= 2) == (True, True), frame
    bits = wide.data["points"]["config"]["quantize.weight_bits"]
    kept = [path.get_attribute("data-point") for path in wide.all("#parallel path.trial") if _shown(path)]
    assert sorted(map(int, kept)) == [i for i, b in enumerate(bits) if b != "8"]
    assert wide.one("#within").text == f"{len(kept)} of {TRIALS - FAILED} trials are kept."
    axis.send_keys(Keys.ESCAPE)
    assert wide.one("#within").text == ""
    order = wide.js(
        """return [...document.querySelectorAll("button, select, summary, [tabindex='0']")]
        .filter((node) => node.getClientRects().length && node.tabIndex !== 0).length"""
    )
    assert order == 0


def _shown(path: Any) -> bool:
    return float(path.get_attribute("opacity")) > 0.1


def test_a_drag_along_an_axis_keeps_the_trials_that_cross_it(wide: Browser) -> None:
    grip = wide.one("[role=slider][aria-label^='validation accuracy'] .grip")
    wide.js("arguments[0].scrollIntoView({block: 'center'})", grip)
    height = grip.size["height"]
    mouse = wide.mouse().move_to_element_with_offset(grip, 0, -height // 2 + 2)
    mouse.click_and_hold().move_by_offset(0, height // 4).release().perform()
    accuracy = next(axis for axis in wide.data["parallel"] if axis["name"] == "val_accuracy")["at"]
    kept = {int(path.get_attribute("data-point")) for path in wide.all("#parallel path.trial") if _shown(path)}
    low = min(accuracy[i] for i in kept)
    assert 0 < len(kept) < TRIALS - FAILED
    assert kept == {i for i, at in enumerate(accuracy) if at >= low}
    assert low > 0.7
    dimmed = wide.js("return document.getElementById('plot-front').data[1].marker.opacity")
    assert min(dimmed) < 0.1
    wide.one("#unbrush").click()
    assert all(map(_shown, wide.all("#parallel path.trial")))


def test_a_line_of_the_search_tells_its_trial_and_can_be_clicked(wide: Browser) -> None:
    line = wide.all("#parallel path.hit")[-1]  # the most accurate is drawn last
    wide.js("arguments[0].scrollIntoView({block: 'center'})", line)
    x, y = wide.js(
        """const path = arguments[0], at = path.getPointAtLength(path.getTotalLength() * 0.95);
        const to = at.matrixTransform(path.getScreenCTM()); return [to.x, to.y]""",
        line,
    )
    mouse = wide.mouse()
    mouse.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    mouse.perform()
    tip = wide.one("#tip").text
    mouse.click().perform()
    [chosen] = wide.chosen()[2]
    assert tip.startswith(f"Trial {wide.data['points']['trial'][int(chosen)]}")
    assert "prune.sparsity" in tip


def test_axes_and_scales_change(wide: Browser) -> None:
    points = wide.data["points"]
    Select(wide.one("#axis-y")).select_by_value("test_accuracy")
    front = "return document.getElementById('plot-front').data.find((trace) => trace.name === 'front')"
    assert wide.js(front + ".mode") == "lines+markers"
    tested = [points["test_accuracy"][i] for i in wide.data["front"][::-1]]
    assert wide.js(front + ".y") == [value for value in tested if value is not None]
    Select(wide.one("#axis-x")).select_by_value("worst_class_accuracy")
    assert wide.js(front + ".mode") == "markers"  # judged by other measures: no line
    assert wide.one("#h-front").text == "Test accuracy against accuracy of the worst class"
    volume = "return document.getElementById('plot-volume').data[0].x.at(-1)"
    assert wide.js(volume) == wide.data["volume"]["at"][-1]
    wide.one("[data-over=trials]").click()
    assert wide.js(volume) == TRIALS - 1


def test_trials_sort_by_what_they_took(wide: Browser) -> None:
    def column(k: int) -> list[float]:
        rows = "return [...document.querySelectorAll('#trials tbody tr')]"
        cells = wide.js(f"{rows}.map((row) => row.children[arguments[0]].dataset.value)", k)
        return [float(cell) for cell in cells if cell != ""]

    assert column(1) == sorted(column(1), reverse=True)
    size = wide.all("#trials button.sort")[5]
    size.click()
    assert column(5) == sorted(column(5), reverse=True)
    size.click()
    assert column(5) == sorted(column(5))
    assert [head.get_attribute("aria-sort") for head in wide.all("#trials thead th")].count("ascending") == 1


def test_the_command_copies_itself(wide: Browser) -> None:
    wide.cdp("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    wide.one("#copy").click()
    wide.settle()
    assert wide.one("#copy").text == "Copied"
    assert wide.driver.execute_async_script(
        "const done = arguments[0]; navigator.clipboard.readText().then(done, (error) => done(String(error)))"
    ) == "raydeep search jobs/digits.yaml"  # fmt: skip


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(wide: Browser, scheme: str) -> None:
    browser = wide
    browser.look(scheme=scheme)
    browser.js("document.querySelectorAll('tr[data-point]')[1].click()")  # a tinted row, too
    found = browser.js(CONTRAST)
    assert len(found) > 150
    assert {"plot", "svg", "page"} == {place for _, _, place, _ in found}
    assert [entry for entry in found if entry[0] < 4.5] == []
    paper = browser.js("return getComputedStyle(document.body).backgroundColor")
    assert paper == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 26)"}[scheme]


# Each text: its contrast with what lies behind it (WCAG 2.1), the text, where it stands, its colour.
CONTRAST = """
const channels = (colour) => (colour.match(/[0-9.]+/g) || []).map(Number);
const linear = (v) => v / 255 <= 0.04045 ? v / 255 / 12.92 : ((v / 255 + 0.055) / 1.055) ** 2.4;
const light = ([r, g, b]) => 0.2126 * linear(r) + 0.7152 * linear(g) + 0.0722 * linear(b);
const contrast = (a, b) => {
  const [x, y] = [light(a), light(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
};
const behind = (node) => {
  for (let at = node; at; at = at.parentElement) {
    const found = channels(getComputedStyle(at).backgroundColor);
    if (found.length === 3 || found[3] > 0) return found;
  }
};
// texts in the confusion matrix stand on its cells
const plot = document.getElementById("plot-confusion"), paper = behind(plot), accent = document.createElement("i");
accent.style.color = "var(--accent)";
document.body.append(accent);
const top = channels(getComputedStyle(accent).color), z = plot.data[0].z;
accent.remove();
const cells = plot.layout.annotations.map((note) => paper.map((v, k) => v + z[note.y][note.x] * (top[k] - v)));
const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT), out = [];
while (walk.nextNode()) {
  const text = walk.currentNode.textContent.trim(), node = walk.currentNode.parentElement;
  if (!text || node.closest("script, style, noscript") || !node.getClientRects().length) continue;
  if (node.closest("[opacity='0'], [style*='opacity: 0']")) continue;
  const style = getComputedStyle(node), svg = node.closest("svg"), note = node.closest("#plot-confusion .annotation");
  const colour = channels(svg ? style.fill : style.color);
  const under = note ? cells[Number(note.dataset.index)] : behind(svg ? svg.closest("div") : node);
  const place = svg ? (node.closest(".js-plotly-plot") ? "plot" : "svg") : "page";
  out.push([contrast(colour, under), text.slice(0, 40), place, String(colour)]);
}
return out;
"""


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_plots_follow_the_scheme(wide: Browser, scheme: str) -> None:
    wide.look(scheme="dark" if scheme == "light" else "light")
    wide.look(scheme=scheme)
    ticks = wide.js("return getComputedStyle(document.querySelector('#plot-front .xtick text')).fill")
    names = wide.js("return document.querySelector('#parallel .axis text:nth-child(2)').getAttribute('fill')")
    assert (ticks, names) == {
        "light": ("rgb(89, 98, 107)", "#1b1f23"), "dark": ("rgb(160, 169, 178)", "#e6e9ec")
    }[scheme]  # fmt: skip


# How much wider than the window the page is, and what sticks out of it, but for what scrolls in its own box.
WIDER = """
const width = document.documentElement.clientWidth;
const out = [...document.querySelectorAll("body *")].filter((node) => !node.closest(".scroll > *, pre, svg"));
return [document.documentElement.scrollWidth - width,
  out.filter((node) => node.getBoundingClientRect().right > width + 0.5).map((node) => node.outerHTML.slice(0, 90))];
"""


def test_a_phone_scrolls_one_way(wide: Browser) -> None:
    wide.look(NARROW)
    assert wide.js(WIDER) == [0, []]
    rows = wide.js("return [...document.querySelectorAll('#trials tr')].map((row) => row.offsetHeight)")
    assert max(rows) < 80  # columns are not squeezed, they scroll
    inner, outer = wide.js(
        "const box = document.getElementById('parallel').parentNode; return [box.scrollWidth, box.clientWidth]"
    )
    assert inner > outer
    assert wide.js("return document.querySelector('#plot-front .main-svg').clientWidth") <= NARROW


def test_a_reader_of_the_screen_finds_its_way(wide: Browser) -> None:
    assert wide.js("return document.documentElement.lang") == "en"
    assert len(wide.all("main")) == 1
    levels = wide.js("return [...document.querySelectorAll('h1, h2, h3, h4')].map((head) => Number(head.tagName[1]))")
    assert levels.count(1) == levels[0] == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    nameless = wide.js(
        """const wanted = "section, [role=region], .plot, select, svg[role=group], .axis";
        return [...document.querySelectorAll(wanted)].filter((node) => {
          const by = document.getElementById(node.getAttribute("aria-labelledby"));
          return !(by?.textContent || node.getAttribute("aria-label") || node.labels?.[0]?.textContent || "").trim();
        }).map((node) => node.outerHTML.slice(0, 90))"""
    )
    assert nameless == []
    pictures = [(image.get_attribute("src"), image.get_attribute("alt")) for image in wide.all("img")]
    assert len(pictures) == 7
    assert all(source == PICTURE and alt for source, alt in pictures)
    assert wide.js("return [...document.images].every((image) => image.naturalWidth === 2)")
    assert "true 8, taken for 1, 98%" in [alt for _, alt in pictures]


def test_paper_shows_every_section_in_light_colours(wide: Browser) -> None:
    wide.look(scheme="dark")
    wide.js("window.dispatchEvent(new Event('beforeprint'))")  # comes while the page is still on the screen
    wide.look(A4, scheme="dark", media="print")
    ticks = "return getComputedStyle(document.querySelector('#plot-front .xtick text')).fill"
    shown = wide.js(
        "return [...document.querySelectorAll('section, .plot, svg')].map((node) => node.clientHeight > 20)"
    )
    try:
        assert wide.js(ticks) == "rgb(89, 98, 107)"
        assert wide.js("return getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert wide.js("return document.querySelector('details.job').open")
        assert wide.js(WIDER) == [0, []]
        cut = "return [...document.querySelectorAll('.scroll')].map((box) => box.scrollWidth - box.clientWidth)"
        assert max(wide.js(cut)) <= 0
        cut = """return [...document.querySelectorAll(".plot")].map((plot) =>
          plot.querySelector(".main-svg").clientWidth - plot.clientWidth)"""
        assert max(wide.js(cut)) <= 0
        assert all(shown)
        assert sum(row.is_displayed() for row in wide.all("#trials tbody tr")) == 25
    finally:
        wide.look(scheme="dark")
        wide.js("window.dispatchEvent(new Event('afterprint'))")
    assert wide.js(ticks) == "rgb(160, 169, 178)"


@pytest.mark.parametrize("kind", ["a training", "a search that goes on", "a compression", "a job"])
def test_pages_of_all_kinds_of_runs_draw_without_an_error(browser: Browser, tmp_path: Path, kind: str) -> None:
    run = make_run(tmp_path / "run", search=kind != "a training")
    front = json.loads((run / "front.json").read_text())
    if kind == "a search that goes on":
        for name in ("front.json", "evaluation.json", "gallery.json"):
            (run / name).unlink()
    elif kind == "a compression":
        (run / "ledger.jsonl").unlink()
        dump(run / "front.json", front | {"models": [front["models"][0] | {"trial": None, "label": "compressed"}]})
    elif kind == "a job":
        for file in [path for path in run.iterdir() if path.name != "job.yaml"]:
            file.unlink()
    browser.driver.get(write_report(run).as_uri())
    plots = {"a training": 4, "a search that goes on": 5, "a compression": 6, "a job": 0}[kind]
    assert len(browser.all(".js-plotly-plot")) == plots
    assert len(browser.all("#parallel path.trial")) == (TRIALS - FAILED if kind == "a search that goes on" else 0)
    for row in browser.all("tr[data-point] button")[:2]:
        browser.js("arguments[0].click()", row)
    browser.js("window.dispatchEvent(new Event('beforeprint')); window.dispatchEvent(new Event('afterprint'))")
    assert browser.driver.get_log("browser") == []
    browser.driver.get(browser.address)


def test_the_page_reads_without_scripts(browser: Browser) -> None:
    browser.cdp("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.driver.get(browser.address)
        text = browser.one("main").text
    finally:
        browser.cdp("Emulation.setScriptExecutionDisabled", value=False)
    assert "The plots need JavaScript; the tables don’t." in text
    assert "raydeep search jobs/digits.yaml" in text
