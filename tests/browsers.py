"""A Chromium that tests drive. Its driver is the system's: selenium is never let look for one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_chromium = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="chromium and its chromedriver are not both installed"
)
FLAGS = "--headless=new --no-sandbox --disable-gpu --no-first-run --disable-background-networking --hide-scrollbars"

# Plots take their new width some time after the page has; one that never does is for the test to tell.
DRAWN = """
const fits = (plot) => Math.abs(plot.querySelector(".main-svg").clientWidth - plot.clientWidth) <= 1;
const end = performance.now() + arguments[0];
return new Promise((done) => {
  const look = () => {
    const all = [...document.querySelectorAll(".js-plotly-plot")].every(fits);
    if (all || performance.now() > end) setTimeout(done, 60);
    else setTimeout(() => requestAnimationFrame(look), 20);
  };
  requestAnimationFrame(look);
});
"""


@contextmanager
def chromium(profile: Path) -> Iterator[webdriver.Chrome]:
    """One that keeps its profile in this folder, and what pages say on the console in its log."""
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for flag in [*FLAGS.split(), f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SE_OFFLINE", "true")
        driver = webdriver.Chrome(options=options, service=Service(executable_path=str(DRIVER)))
        try:
            yield driver
        finally:
            driver.quit()


def look(driver: webdriver.Chrome, width: int, scheme: str = "light", media: str = "") -> None:
    """Go on with the page in other circumstances, which it hears of as it would from a person's device."""
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
    driver.execute_script(DRAWN, 0 if media else 5000)  # on paper plots keep a width of their own
