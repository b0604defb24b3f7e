"""Pictures of reports as a browser shows them, for docs/pictures and for looking at: python -m tests.screenshots.

Each report is made once, by the lab or from a machine of tests/machines, and kept as JSON in a folder, from which it is
shown again in seconds. `--look DIR` writes PNGs of every report at both widths, and of some on paper and in the dark.
"""

from __future__ import annotations

import argparse
import base64
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from tests.gendocs import DOCS
from tests.genterminal import trace
from tests.machines import dumpwriter
from tests.machines.browser import browser, look_like
from tests.machines.changed import CHANGES, NMI, Machine
from tests.machines.recorded import write_files
from tests.machines.syntheticxen import SyntheticXen
from xen_symbols.report.page import page, pages
from xencrash.lab.storm.shown import page as storm_page

PICTURES = DOCS / "pictures"
HEIGHT = {1280: 900, 400: 800}  # of a window, by its width
TALLEST = 6000  # pixels of a page that is looked at
QUALITY = 60  # of WebP


def xencrash(*words: str, folder: str, fine: Sequence[int] = (0, 1)) -> bytes:
    """What the command prints, run in a folder: its reports then name files without this machine's folders."""
    command = [str(Path(sys.executable).with_name("xencrash")), *words]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE)
    if done.returncode not in fine:  # a failure may well be what is shown
        raise SystemExit(f"screenshots: {' '.join(command)} ended with {done.returncode}")
    return done.stdout


def traced(*words: str) -> Callable[[str], bytes]:
    def make(folder: str) -> bytes:
        xencrash("lab", "run", *words, "--output", "run", folder=folder, fine=(0, 1, 3))  # 3: no vmcore, on a busy host
        report = json.loads((Path(folder) / "run/trace.json").read_text())
        report["target"]["location"], report["symbols"]["path"] = "gdb:gdb.sock", "xen-syms"
        return json.dumps(report).encode()

    return make


def storm(folder: str) -> bytes:
    machine = ("--guest", "4.17.0", "--fault", "trap-nop-stays")
    return xencrash("lab", "storm", *machine, "--experiments", "150", "--format", "json", folder=folder)


def thousands(folder: str) -> bytes:
    """4,096 CPUs: sixteen have no crash_save_done, and one an NMI gate without its IST."""
    xen = SyntheticXen(4096)
    for cpu in range(1000, 1016):
        area = xen.areas[cpu]
        xen.content[area] = b"\0" + xen.content[area][1:]
    idt = bytearray(xen.content[xen.areas[7] + 4096])
    idt[16 * NMI + 4] = 0
    xen.content[xen.areas[7] + 4096] = bytes(idt)
    with (Path(folder) / "vmcore").open("wb") as file:
        dumpwriter.write_elf(file, [(0, 4 << 30)], xen.content, xen.notes())
    (Path(folder) / "xen-syms.map").write_text(xen.map_file())
    return xencrash("check", "vmcore", "--symbols", "xen-syms.map", "--format", "json", folder=folder)


def six(folder: str) -> bytes:
    """Six dumps of one Xen, of which two fail."""
    damage = {2: "#MC gate with another selector", 5: "notes of one CPU empty"}
    dumps = []
    for number in range(1, 7):
        machine = Machine("4.17-crashed-vmcore")
        if number in damage:
            CHANGES[damage[number]][0](machine)
        dump, symbols = write_files(Path(folder) / f"crash-{number}", machine.target, machine.symbols)
        dumps.append(str(dump.relative_to(folder)))
    return xencrash("check", *dumps, "--symbols", str(symbols.relative_to(folder)), "--format", "json", folder=folder)


class Shown(NamedTuple):
    make: Callable[[str], bytes]  # the report as JSON, from an empty folder
    page: Callable[[Any], Iterable[str]] = page
    narrow: bool = False  # in the documentation at 400 pixels as well


REPORTS = {
    "clean-trace": Shown(lambda folder: json.dumps(trace()).encode(), narrow=True),
    "rfc-as-posted": Shown(traced("--guest", "rfc-v1"), narrow=True),
    "deaf-cpu": Shown(traced("--guest", "4.17.0", "--fault", "stuck")),
    "32-cpus": Shown(traced("--guest", "4.17.0", "--cpus", "32", "--fault", "nmi-not-sent")),
    "4096-cpus": Shown(thousands),
    "six-dumps": Shown(six, pages, narrow=True),
    "storm": Shown(storm, storm_page),
}


class Window(NamedTuple):
    width: int
    scheme: str = "light"
    media: str = ""
    whole: bool = False


def shoot(driver: Any, window: Window, format: str) -> bytes:
    """What the window shows, or the whole page."""
    size: dict[str, Any] = {"x": 0, "y": 0, "width": window.width, "height": HEIGHT[window.width], "scale": 1}
    if window.whole:
        tall = driver.execute_script("return document.documentElement.scrollHeight")
        size["height"] = min(TALLEST, tall)
    asked = {"format": format, "clip": size, "captureBeyondViewport": True}
    if format == "webp":
        asked["quality"] = QUALITY
    return base64.b64decode(driver.execute_cdp_cmd("Page.captureScreenshot", asked)["data"])


def views(shown: Shown) -> Iterator[Window]:
    """Those of the documentation."""
    yield Window(1280)
    if shown.narrow:
        yield Window(400)


LOOKS = (Window(1280, whole=True), Window(400, whole=True), Window(1280, "dark"), Window(400, "dark"),
         Window(1280, media="print", whole=True))  # fmt: skip


def name_of(name: str, window: Window) -> str:
    parts = [name, str(window.width), *filter(None, ("dark" * (window.scheme == "dark"), window.media))]
    return "-".join(parts)


def take(reports: Path, names: Sequence[str], look: Path | None) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        driver = browser(Path(temporary))
        for name in names:
            html = Path(temporary) / f"{name}.html"
            html.write_text("".join(REPORTS[name].page(json.loads((reports / f"{name}.json").read_text()))))
            for window in LOOKS if look else views(REPORTS[name]):
                look_like(driver, window.width, HEIGHT[window.width], window.scheme, window.media)
                driver.get(html.as_uri())
                format = "png" if look else "webp"
                path = (look or PICTURES) / f"{name_of(name, window)}.{format}"
                path.write_bytes(shoot(driver, window, format))
                print(f"{path}: {path.stat().st_size} bytes", flush=True)
        driver.quit()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.screenshots", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="REPORT", help=f"of {', '.join(REPORTS)}; default: all")
    parser.add_argument("--reports", type=Path, metavar="DIR", help="keep the reports there; those that are there stay")
    parser.add_argument("--look", type=Path, metavar="DIR", help="write PNGs to look at there, not the documentation's")
    args = parser.parse_args()
    names = args.names or list(REPORTS)
    with tempfile.TemporaryDirectory() as temporary:
        reports = args.reports or Path(temporary)
        for folder in (reports, args.look or PICTURES):
            folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            if not (reports / f"{name}.json").exists():
                print(f"{name}: making the report", flush=True)
                with tempfile.TemporaryDirectory() as folder:
                    (reports / f"{name}.json").write_bytes(REPORTS[name].make(folder))
        take(reports, names, args.look)


if __name__ == "__main__":
    main()
