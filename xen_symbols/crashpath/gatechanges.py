"""What changed each CPU's NMI and #MC gate between the stops of a trace, from the gates as they were read there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields

from xen_symbols.x86.gate import VECTOR_MC, VECTOR_NMI, Gate
from xen_symbols.xen.state import State

Key = tuple[int, int]  # CPU (Xen's number), vector
Gates = Mapping[Key, Gate]


@dataclass(frozen=True)
class GateChange:
    """One gate that differs from how it was last read. `since` and `stop` are indices into the report's stages."""

    cpu: int
    vector: int
    before: Gate
    after: Gate
    since: int | None  # None: it was last read before the first stage
    stop: int

    @property
    def changed(self) -> tuple[str, ...]:
        """Which properties differ, by their names in `Gate`."""
        names = (field.name for field in fields(Gate))
        return tuple(name for name in names if getattr(self.before, name) != getattr(self.after, name))


def gates_of(state: State) -> Gates:
    """Every NMI and #MC gate that could be read at one moment."""
    reads = {
        (cpu.cpu, vector): read
        for cpu in state.cpus.values()
        for vector, read in ((VECTOR_NMI, cpu.nmi_gate), (VECTOR_MC, cpu.mc_gate))
    }
    return {key: read.value for key, read in reads.items() if read.present}


class GateHistory:
    """Each gate as it was last read, and at which stop. A gate that cannot be read at a stop keeps what is known."""

    def __init__(self, gates: Gates) -> None:
        self._last: dict[Key, tuple[Gate, int | None]] = {key: (gate, None) for key, gate in gates.items()}

    def see(self, gates: Gates, stop: int) -> list[GateChange]:
        """The changes that a stop's gates show."""
        changes = []
        for key, gate in sorted(gates.items()):
            before, since = self._last.get(key, (gate, None))
            if before != gate:
                changes.append(GateChange(*key, before, gate, since, stop))
            self._last[key] = (gate, stop)
        return changes
