"""Debian's chromium without a window. A machine without it runs scripts/setup --tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

FLAGS = (
    "--headless --no-sandbox --disable-gpu --no-first-run --disable-background-networking --disable-component-update "
    "--disable-sync"
).split()


def browser(folder: Path) -> Any:
    """A driver of a new browser, whose files are in the folder; it logs requests and what pages complain of."""
    from selenium import webdriver  # for browsers alone: tests are collected without it

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={folder / 'data'}", "--window-size=1280,1000"):
        options.add_argument(flag)
    return webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))


def look_like(driver: Any, width: int = 1280, height: int = 1000, scheme: str = "light", media: str = "") -> None:
    """A window of so many pixels; `media` "print" is paper."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})
