"""Which gdb is started, and how: of nobody's own settings, with the plugin."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from xen_symbols.absence import Undecidable
from xen_symbols.targets.qmp import absolute
from xen_symbols.xen.given import Given

OLDEST_GDB = 12  # has custom MI commands and packets sent from Python
_VERSION_SECONDS = 30.0


def find_gdb() -> str:
    """$XENCRASH_GDB, or gdb on PATH, of a version that will do. Raises Undecidable."""
    wanted = os.environ.get("XENCRASH_GDB") or "gdb"
    found = shutil.which(wanted)
    if found is None:
        raise Undecidable(f"{wanted} was not found: install gdb, or name one in XENCRASH_GDB")
    try:
        words = subprocess.run(
            [found, "-nx", "--version"], capture_output=True, text=True, timeout=_VERSION_SECONDS, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise Undecidable(f"{found} -nx --version failed: {error}") from None
    version = parse_version(words)
    if version is None or version < OLDEST_GDB:
        raise Undecidable(f"{found} is gdb {version or 'of an unknown version'}: {OLDEST_GDB} or newer is needed")
    return found


def parse_version(words: str) -> int | None:
    """The major version in the first line of `gdb --version`, whose last version-like word is gdb's own."""
    numbers = re.findall(r"\b(\d+)\.\d+", words.partition("\n")[0])
    return int(numbers[-1]) if words.startswith("GNU gdb") and numbers else None


def plugin_script() -> Path:
    """The file to `source` in gdb. It is found, not imported: only gdb can import what it loads."""
    found = importlib.util.find_spec("gdbplugin")
    if found is None or found.origin is None:
        raise Undecidable("the gdb plugin is not installed with this command: reinstall xencrash")
    return Path(found.origin).with_name("load.py")


def gdb_arguments() -> list[str]:
    """The first arguments of every gdb started here: nobody's own settings, nothing fetched, no questions."""
    return [
        "-q", "-nx",
        "-iex", "set debuginfod enabled off",
        "-iex", "set auto-load no",
        "-iex", "set confirm off",
        "-iex", "set tcp auto-retry off",
    ]  # fmt: skip


def path_for_gdb(path: str, folder: Path) -> str:
    """A file's absolute path; where that is not UTF-8, which gdb cannot hand to Python, a link to it in the folder."""
    plain = str(Path(path).absolute())
    try:
        plain.encode()
    except UnicodeEncodeError:
        link = folder / "symbols"
        link.unlink(missing_ok=True)
        link.symlink_to(plain)
        return str(link)
    return plain


def plugin_settings(symbols: str | None, qmp: str | None, given: Given) -> dict[str, str]:
    """What the user said, as values under `set xen`; what was not said stays as it is. `symbols`: by `path_for_gdb`."""
    aliases = " ".join(f"{name}={actual}" for name, actual in given.aliases.items())
    settings = {
        "symbols": symbols,
        "qmp-socket": absolute(qmp) if qmp else None,
        "allow-build-id-mismatch": "on" if given.allow_mismatch else "off",
        "generation": given.generation,
        "aliases": aliases,
    }
    return {name: value for name, value in settings.items() if value}
