"""Sourced in a gdb with the plugin: which promises the target that it is attached to keeps and breaks, as JSON.

`$cases` names a file with the list of cases, each the arguments of `_subject`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gdb

from gdbplugin.target import open_target
from tests.contract import promises
from xen_symbols.symbols.load import load_symbols


def _subject(qmp: str | None, registers: str, symbols: str, ram: str, build_id: str, cpus: int,
             notes: list[str]) -> promises.Subject:  # fmt: skip
    target: Any = open_target(gdb.selected_inferior().connection)
    target.qmp_socket = qmp
    threads = gdb.selected_inferior().threads()
    return promises.Subject(
        target,
        load_symbols(symbols),
        promises.ram(ram),
        bytes.fromhex(build_id),
        cpus,
        getattr(promises, registers),
        frozenset(notes),
        tuple(thread.switch for thread in threads),
    )


sys.stdout.flush()
_cases = json.loads(Path(gdb.convenience_variable("cases").string()).read_text())
print(json.dumps([promises.tried(_subject(**case)) for case in _cases]))
