"""A real Chromium without a screen, driven through its own driver.

Debian's packages are ``chromium`` and ``chromium-driver``; other places are named
by CHROMIUM_BIN and CHROMEDRIVER_BIN. Where there is none, tests fail and say so.
"""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import pytest
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.action_chains import ActionChains

T = TypeVar("T")

LIMIT_S = 60.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1280,1400",
)


class Page:
    """One tab."""

    def __init__(self, driver: webdriver.Chrome) -> None:
        self.driver = driver

    def open(self, url: str) -> None:
        self.driver.get(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def text(self, selector: str = "main") -> str:
        """What is written there now, "" if there is no such element."""
        return str(self.run("return document.querySelector(arguments[0])?.innerText ?? ''", selector))

    def until(self, what: str, condition: Callable[[], T], limit_s: float = LIMIT_S) -> T:
        """Wait for ``condition`` and return what it returned."""
        deadline = time.monotonic() + limit_s
        while True:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            assert time.monotonic() < deadline, f"not in {limit_s:g} s: {what}\n{self.text('body')[:3000]}"
            time.sleep(0.05)

    def until_text(self, text: str, selector: str = "main") -> None:
        self.until(f"{text!r} in {selector}", lambda: text in self.text(selector))

    def click(self, text: str) -> None:
        """Click the one button or link that says so."""
        self.run(
            "const found = [...document.querySelectorAll('button, a')]"
            ".filter((e) => e.checkVisibility() && e.innerText.trim() === arguments[0]);"
            "if (found.length !== 1) throw new Error(`${found.length} of ${arguments[0]}`); found[0].click()",
            text,
        )

    def press(self, key: str) -> None:
        """Press a key, wherever the focus is."""
        ActionChains(self.driver).send_keys(key).perform()

    def nodes(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader is told of."""
        tree = self.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})  # type: ignore[no-untyped-call]
        return [
            (node.get("role", {}).get("value", ""), str(node.get("name", {}).get("value", "")).strip())
            for node in tree["nodes"]
            if not node.get("ignored")
        ]

    def complaints(self) -> list[str]:
        """What the browser has written to its console since it was asked last: refused scripts, errors."""
        return [entry["message"] for entry in self.driver.get_log("browser")]  # type: ignore[no-untyped-call]


def programs() -> tuple[str, str]:
    """Where Chromium and its driver are; fails the test if there are none."""
    found = [
        os.environ.get(variable) or next(filter(None, map(shutil.which, names)), None)
        for variable, names in (
            ("CHROMIUM_BIN", ("chromium", "chromium-browser", "google-chrome")),
            ("CHROMEDRIVER_BIN", ("chromedriver",)),
        )
    ]
    if None in found:
        pytest.fail(
            "there is no Chromium on this machine: apt-get install chromium chromium-driver, "
            "or name them by CHROMIUM_BIN and CHROMEDRIVER_BIN",
            pytrace=False,
        )
    return str(found[0]), str(found[1])


@contextmanager
def chromium(profile: Path, *more: str) -> Iterator[Page]:
    """A browser with a fresh profile; ``more``: further flags of it."""
    browser, driver_path = programs()
    options = webdriver.ChromeOptions()
    for flag in (*FLAGS, f"--user-data-dir={profile}", *more):
        options.add_argument(flag)
    options.binary_location = browser
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_path))
    try:
        driver.set_script_timeout(30)
        yield Page(driver)
    finally:
        driver.quit()
