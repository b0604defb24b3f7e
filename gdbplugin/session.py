"""One debugging session: the settings, the symbols, the machine that gdb is connected to, and the Xen found in it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gdb

from gdbplugin import running, watchpoints
from gdbplugin.declare import NoteWrite, Stop
from gdbplugin.rdmsr import measure_modes
from gdbplugin.target import LiveTarget, ServedDump, cpu_index, open_target
from xen_symbols.absence import Undecidable, Unreadable
from xen_symbols.crashpath.follow import Follower
from xen_symbols.crashpath.gatechanges import Key
from xen_symbols.crashpath.gatewatch import GateWatch
from xen_symbols.crashpath.identification import Identification, identify
from xen_symbols.symbols.load import load_symbols
from xen_symbols.symbols.table import SymbolTable
from xen_symbols.targets import PhysicalCpu
from xen_symbols.targets.qmp import absolute
from xen_symbols.xen.given import Given, parse_aliases
from xen_symbols.xen.images import carried_symbols
from xen_symbols.xen.locate import locate, still_there
from xen_symbols.xen.memory import ROOT, XenMemory

if TYPE_CHECKING:
    from xen_symbols.report import contract


class Session:
    """Implements gdbplugin.declare.Session. `settings` are gdb's parameters under `set xen`, by name."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = settings
        self.report: contract.Report | None = None
        self.follower: Follower | None = None
        self.gate_watch: GateWatch | None = None
        self._tables: dict[tuple[str, int, int], SymbolTable] = {}
        self._renamed: tuple[SymbolTable, SymbolTable] | None = None  # one as it is, and with the aliases
        self._target: LiveTarget | ServedDump | None = None
        self._memory: XenMemory | None = None
        self._identification: Identification | None = None

    # -- symbols ------------------------------------------------------------------------------

    def symbols(self) -> SymbolTable:
        """The symbols in use: the chosen ones, or those that the Xen found last carries. Raises Undecidable."""
        table = self._chosen()
        if table is None and self._memory is not None:
            table = self._memory.symbols
        if table is None:
            raise Undecidable("no symbols of Xen's: set xen symbols FILE (its xen-syms, .map, or image)")
        return table

    def _chosen(self) -> SymbolTable | None:
        """The file of `set xen symbols`, or the first file gdb has loaded that is Xen's. Raises Undecidable."""
        table = self._file()
        return None if table is None else self._with_aliases(table)

    def _with_aliases(self, table: SymbolTable) -> SymbolTable:
        """The same object for as long as the setting is the same."""
        aliases = self._given().aliases
        if self._renamed is None or self._renamed[0] is not table or self._renamed[1].aliases != aliases:
            self._renamed = table, table.with_aliases(aliases)
        return self._renamed[1]

    def _given(self) -> Given:
        return Given(
            self.settings["generation"].value or None,
            parse_aliases((self.settings["aliases"].value or "").split()),
            bool(self.settings["allow-build-id-mismatch"].value),
        )

    def _file(self) -> SymbolTable | None:
        chosen = self.settings["symbols"].value
        if chosen:
            return self._load(str(Path(chosen).expanduser().absolute()))
        for objfile in gdb.objfiles():
            with contextlib.suppress(Undecidable):
                table = self._load(objfile.filename)
                if table.has(ROOT):
                    return table
        return None

    def _load(self, path: str) -> SymbolTable:
        try:
            status = Path(path).stat()
            key = (path, status.st_mtime_ns, status.st_size)
        except OSError:
            return load_symbols(path)  # which says what is wrong with it
        if key not in self._tables:
            self._tables[key] = load_symbols(path)
        return self._tables[key]

    # -- the machine --------------------------------------------------------------------------

    def connected(self) -> bool:
        connection = gdb.selected_inferior().connection
        return connection is not None and connection.type in ("remote", "extended-remote")

    def target(self) -> LiveTarget | ServedDump:
        """The stopped machine. Raises Undecidable."""
        if not self.connected():
            raise Undecidable("gdb is not connected to QEMU: target remote HOST:PORT, or a unix socket's path")
        thread = gdb.selected_thread()
        if thread is None or not thread.is_valid():
            raise Undecidable("no CPU is selected: the machine is gone, or not stopped; see info threads")
        if thread.is_running():
            raise Undecidable("the machine is running: stop it first (interrupt, or Ctrl-C)")
        connection = gdb.selected_inferior().connection
        qmp = self.settings["qmp-socket"].value
        qmp = absolute(qmp) if qmp else None
        if self._target is None or self._target.connection is not connection:
            self._target = open_target(connection)
        self._target.qmp_socket = qmp
        return self._target

    @contextlib.contextmanager
    def look(self) -> Iterator[XenMemory]:
        """Xen in the stopped machine. Nothing read in one look is reused in the next."""
        target = self.target()
        if isinstance(target, LiveTarget):
            target.measured_modes = {}
            if self.settings["rdmsr"].value:
                with target.batch():
                    found = self._xen(target)
                target.measured_modes = measure_modes(found)
        with target.batch():
            yield self._xen(target)

    def _xen(self, target: LiveTarget | ServedDump) -> XenMemory:
        """Xen where it was found before, or else located again: after a new connection, other symbols, another boot."""
        chosen, given = self._chosen(), self._given()
        memory = self._memory
        same = memory is not None and memory.target is target and (
            memory.symbols.aliases == given.aliases if chosen is None else memory.symbols is chosen
        )
        if memory is None or not same or not still_there(memory):
            self._memory = self._identification = None
            memory = self._memory = locate(target, chosen or carried_symbols(target), given)
        if memory.given_generation != given.generation:
            memory.given_generation, self._identification = given.generation, None
        return memory

    def identification(self, memory: XenMemory) -> Identification:
        if memory is not self._memory:
            return identify(memory)
        if self._identification is None:
            self._identification = identify(memory)
        return self._identification

    def thread(self, cpu: int | None, physical: PhysicalCpu) -> int | None:
        """A served dump numbers its threads by Xen's CPUs, QEMU by its own."""
        number = cpu if isinstance(self._target, ServedDump) else physical.index
        return next((t.num for t in gdb.selected_inferior().threads() if cpu_index(t) == number), None)

    # -- letting the machine run --------------------------------------------------------------

    @contextlib.contextmanager
    def look_again(self, memory: XenMemory) -> Iterator[None]:
        target = self.target()
        if target is not memory.target:
            raise Undecidable("gdb was reconnected while a crash was followed: the trace is lost")
        with target.batch():
            yield

    def selected(self) -> tuple[int, int]:
        return cpu_index(gdb.selected_thread()), gdb.newest_frame().pc()

    def settable(self, addresses: Sequence[int]) -> int:
        target = self.target()
        assert isinstance(target, LiveTarget)
        return max(0, target.settable(addresses) - running.own_hardware())

    def breakpoints(self) -> contextlib.AbstractContextManager[Callable[[Sequence[int]], None]]:
        return running.breakpoints()

    def run(self, seconds: float | None) -> Stop:
        return running.let_run(seconds)

    def watch(self, addresses: Mapping[Key, int], note: NoteWrite) -> str | None:
        target = self.target()
        assert isinstance(target, LiveTarget)
        if refused := target.unwatchable(list(addresses.values())):
            return refused
        return watchpoints.watch(addresses, note)

    def end_watching(self) -> None:
        watchpoints.end_watching()

    # -- gdb's own words ----------------------------------------------------------------------

    def evaluate(self, expression: str) -> int:
        """A symbol of Xen's (also file#name) with or without + OFFSET, else gdb's expression. Raises Undecidable."""
        name, _, offset = expression.partition("+")
        with contextlib.suppress(Undecidable, Unreadable, ValueError):
            return self.symbols().address(name.strip()) + int(offset.strip() or "0", 0)
        try:
            return int(gdb.parse_and_eval(f"(unsigned long) ({expression})"))
        except gdb.error as error:
            # gdb's advice is left out: its "file" command does not help here.
            raise Undecidable(f"{expression}: {str(error).partition('  ')[0]}") from None

    def value(self, name: str, raw: bytes) -> gdb.Value:
        """The content of a per-CPU variable: with its type where there is debug information, else an unsigned
        integer of its size, else an array of bytes."""
        kind = self._type(name, len(raw))
        if kind is None:
            byte = gdb.selected_inferior().architecture().integer_type(8, False)
            kind = byte.array(len(raw) - 1)
        return gdb.Value(raw, kind)

    def formatted(self, name: str, raw: bytes) -> str | None:
        symbol = _debug_symbol(name)
        if symbol is None or symbol.type.sizeof != len(raw):
            return None
        shown: str = gdb.Value(raw, symbol.type).format_string(styling=False)
        return shown

    def _type(self, name: str, size: int) -> gdb.Type | None:
        symbol = _debug_symbol(name)
        if symbol is not None and symbol.type.sizeof == size:
            return symbol.type
        if size in (1, 2, 4, 8):
            return gdb.selected_inferior().architecture().integer_type(8 * size, False)
        return None


def _debug_symbol(name: str) -> gdb.Symbol | None:
    """The variable in debug information, which a .map and Debian's 4.17 xen-syms do not have."""
    full = f"per_cpu__{name}"
    return gdb.lookup_global_symbol(full, gdb.SYMBOL_VAR_DOMAIN) or gdb.lookup_static_symbol(
        full, gdb.SYMBOL_VAR_DOMAIN
    )
