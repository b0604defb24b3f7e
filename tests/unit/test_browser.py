"""Pages in a real browser: Debian's chromium, without a window."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.machines.browser import browser, look_like
from tests.machines.pages import HOSTILE, poisoned, traced
from tests.machines.recorded import load
from xen_symbols.crashpath.engine import evaluate_if_possible
from xen_symbols.describe.summary import summarise
from xen_symbols.report.blocks import Cell, Lines, Table
from xen_symbols.report.page import page, pages, summary_page, table_page
from xen_symbols.xen.locate import locate

Open = Callable[..., Any]


@pytest.fixture(scope="module")
def show(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Open]:
    """Opens the page of a report in the one browser."""
    folder = tmp_path_factory.mktemp("browser")
    driver = browser(folder)

    def show(report: Any, page: Callable[[Any], Iterator[str]] = page) -> Any:
        path = folder / "page.html"
        path.write_text("".join(page(report)))
        driver.get("about:blank")
        driver.get_log("performance")
        driver.get_log("browser")
        driver.get(path.as_uri())
        return driver

    yield show
    driver.quit()


@pytest.fixture(scope="module")
def trace() -> Any:
    return traced("4.17-normal", "4.17-shootdown", "4.17-handover")


def requested(driver: Any) -> set[str]:
    """The addresses that the browser asked for since the page was opened, without those that the policy stopped."""
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    stopped = {one["params"]["requestId"] for one in events if one["params"].get("blockedReason") == "csp"}
    asked = [one["params"] for one in events if one["method"] == "Network.requestWillBeSent"]
    return {one["request"]["url"] for one in asked if one["requestId"] not in stopped}


def texts(driver: Any, selector: str) -> list[str]:
    """What is visible of the elements."""
    return [one.text for one in driver.find_elements("css selector", selector)]


def test_the_picture_and_its_folding(show: Open, trace: Any) -> None:
    driver = show(trace)
    assert texts(driver, ".picture tbody th") == ["Machine", "CPU 0\ncrashing", "CPUs 1-2\nother", "CPU 3\nother"]
    cells = driver.find_elements("css selector", ".picture tbody tr:nth-child(3) td:not(.names)")
    assert [cell.get_attribute("class") for cell in cells] == ["pass", "fail", "pass"]
    colours = [cell.value_of_css_property("outline-style") for cell in cells]
    assert colours == ["none", "solid", "none"]
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_a_narrow_page_scrolls_within_the_picture_alone(show: Open, trace: Any) -> None:
    driver = show(trace)
    look_like(driver, 400, 800)
    try:
        assert driver.execute_script("return innerWidth") == 400
        assert driver.execute_script("return document.documentElement.scrollWidth") <= 400
        assert driver.execute_script("let s = document.querySelector('.scroll'); return s.scrollWidth > s.clientWidth")
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_a_row_that_is_too_long_for_a_telephone_is_a_paragraph_there(show: Open) -> None:
    long = Table("Long", ["what", "empty", "why"], [[Cell("hang", "fail"), Cell("", "pass"), Cell("it is in " * 9)]])
    short = Table("Short", ["CPU", "at"], [[Cell("1"), Cell("idle")]])
    driver = show([long, short], lambda blocks: table_page("Tables", blocks))
    wide = texts(driver, "thead")
    look_like(driver, 400, 800)
    try:
        cells = driver.find_elements("css selector", ".wide td")
        assert all(cell.rect["x"] + cell.rect["width"] <= 400 for cell in cells)
        assert [cell.is_displayed() for cell in cells] == [True, False, True]
        name = "return getComputedStyle(arguments[0], '::before').content"
        assert [driver.execute_script(name, cell).strip('" ') for cell in cells] == ["what", "empty", "why"]
        assert (wide, texts(driver, ".plain thead")) == (["what empty why", "CPU at"], ["CPU at"])
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_by_keyboard_alone(show: Open, trace: Any) -> None:
    """Tab to the first failure, then to the switch: Space shows every value; Tab to the failing cell: Enter leads to
    its finding."""
    driver = show(trace)

    def press(key: str) -> Any:
        driver.switch_to.active_element.send_keys(key)
        return driver.switch_to.active_element

    tab, space, enter = "\ue004", "\ue00d", "\ue007"
    assert press(tab).text == "nmi-gate-ist CPUs 1-2 at shootdown"
    assert press(tab).get_attribute("type") == "checkbox"
    same = driver.find_element("css selector", ".picture .same span")
    hidden = same.size["width"]
    press(space)
    assert hidden <= 1 and same.size["width"] > 20
    assert press(tab).get_attribute("class") == "scroll"
    link = press(tab)
    assert link.text == "\u2717 nmi-gate-ist" and link.value_of_css_property("outline-style") == "solid"
    press(enter)
    assert driver.current_url.endswith("#f0")
    target = driver.find_element("css selector", ":target")
    assert target.text.startswith("\u2717 FAIL nmi-gate-ist CPUs 1-2 at shootdown")
    top = driver.execute_script("return arguments[0].getBoundingClientRect().top", target)
    assert 0 <= top < 1000
    summary = press(tab)
    assert summary.tag_name == "summary" and target.get_attribute("open")
    press(enter)
    assert not target.get_attribute("open")


def test_what_follows_from_another_failure_is_folded_until_a_link_or_paper_shows_it(show: Open, trace: Any) -> None:
    report = copy.deepcopy(trace)
    (one, *_) = [finding for finding in report["findings"] if finding["verdict"] == "fail"]
    report["findings"].append({**one, "check": "mc-gate-ist", "follows": "nmi-gate-ist"})
    driver = show(report)
    (told,) = driver.find_elements("css selector", ".follows dl")

    def visible() -> bool:
        return bool(driver.execute_script("return arguments[0].checkVisibility()", told))

    assert not visible()
    look_like(driver, media="print")
    assert visible()
    look_like(driver)
    assert not visible()
    driver.find_element("css selector", ".picture a[href='#f1']").send_keys("\ue007")
    assert visible() and driver.find_element("css selector", ":target").text.startswith("\u2717 FAIL mc-gate-ist")


def test_nothing_is_requested_and_nothing_from_a_dump_is_obeyed(show: Open, trace: Any) -> None:
    driver = show(poisoned(trace))
    assert requested(driver) == {driver.current_url}
    assert driver.find_elements("css selector", "script, img, b:not(summary b)") == []
    assert HOSTILE.split("\x1b")[0] in driver.find_element("css selector", "h1").text
    assert driver.get_log("browser") == []  # its own style is let in


def test_a_summary_obeys_nothing_from_a_dump_and_is_as_wide_as_the_window(show: Open) -> None:
    memory = locate(*load("summary/4.17-page-fault"))
    summary = poisoned(summarise(memory, evaluate_if_possible(memory).to_json()))
    driver = show(summary, summary_page)
    assert requested(driver) == {driver.current_url}
    assert driver.find_elements("css selector", "script, img, b") == []
    assert driver.find_element("css selector", "h1").text.count(HOSTILE.split("\x1b")[0]) == 2
    assert "(XEN) Panic on CPU 2:" in driver.find_element("css selector", "pre").text
    assert driver.get_log("browser") == []
    assert driver.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_an_index_leads_to_each_dump_by_keyboard_and_back(show: Open, trace: Any) -> None:
    driver = show([poisoned(trace), trace], pages)
    assert requested(driver) == {driver.current_url} and driver.get_log("browser") == []
    assert driver.find_elements("css selector", "script, img, b:not(summary b)") == []
    driver.find_element("css selector", ".index a[href='#r1-top']").send_keys("\ue007")
    section = driver.find_element("css selector", ":target")
    assert section.tag_name == "section" and trace["target"]["location"] in section.text
    section.find_element("css selector", "p.back a[href='#index']").send_keys("\ue007")
    assert driver.find_element("css selector", ":target").text.startswith("2 dumps: 2 fail")


def test_tables_of_a_matrix_or_a_storm_unfold_and_ask_for_nothing(show: Open) -> None:
    """All of their pages are made by this one function."""
    table = Table(HOSTILE, ["verdict"], [[Cell(HOSTILE, "fail")]])
    driver = show(HOSTILE, lambda title: table_page(title, [Lines([[Cell(HOSTILE)]]), table], [table]))
    assert requested(driver) == {driver.current_url} and driver.get_log("browser") == []
    assert driver.find_elements("css selector", "script, img, b:not(summary b)") == []
    inside = driver.find_element("css selector", "details td")
    assert not inside.is_displayed()
    driver.find_element("css selector", "summary").send_keys("\ue007")
    assert inside.is_displayed() and inside.text.startswith("\u2717 </script>")


def test_the_policy_stops_what_would_get_in(show: Open, trace: Any) -> None:
    driver = show(trace)
    driver.execute_script(
        "let s = document.createElement('script'); s.textContent = 'window.ran = 1'; document.body.append(s);"
        "let i = new Image(); i.src = 'http://127.0.0.1:9/x'; document.body.append(i);"
    )
    assert driver.execute_script("return window.ran === undefined")
    assert requested(driver) == {driver.current_url}
    said = " ".join(entry["message"] for entry in driver.get_log("browser"))
    assert "inline script" in said and "127.0.0.1:9/x" in said


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_in_light_and_dark(scheme: str, show: Open, trace: Any) -> None:
    """Contrast as WCAG 2 asks for text: 4.5 at least."""
    driver = show(trace)
    look_like(driver, scheme=scheme)
    for selector, behind in (("body", "body"), (".dim", "body"), (".picture td.fail a", ".picture td.fail"),
                             (".new", ".new"), (".finding summary b", ".finding"), (".picture th", ".picture th")):
        text, back = (
            rgb(driver.find_element("css selector", one).value_of_css_property(what))
            for one, what in ((selector, "color"), (behind, "background-color"))
        )
        assert contrast(text, back) >= 4.5, (selector, text, back)


def rgb(colour: str) -> list[float]:
    return [int(part.strip()) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]


def contrast(one: list[float], other: list[float]) -> float:
    def luminance(colour: list[float]) -> float:
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in colour]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)
