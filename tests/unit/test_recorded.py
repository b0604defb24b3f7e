"""The text of recorded examples: it is read back as written, and the recorded files are as they would be written."""

from __future__ import annotations

import pytest

from tests.machines import exampletext
from tests.machines.recorded import names, parsed, path_of


@pytest.mark.parametrize("name", [*names(), *names("died")])
def test_an_example_is_as_it_would_be_written(name: str) -> None:
    assert exampletext.write(parsed(name)) == path_of(name).read_text()


def test_every_kind_of_value_is_read_as_it_was_written() -> None:
    lapic = {"source": "QEMU device state", "apic_base": 0xFEE00900, "apic_id": 3, "lvt": [0x10000, 0, 1]}
    unknown = {"absent": "no note holds it: 0x10 bytes, or none", "kind": "UNAVAILABLE"}
    cpu = {"index": 10, "registers": {f"r{number}": number << 60 for number in range(10)}, "xen_cpu": None,
           "apic_id": unknown, "idtr": [0xFFFF83003FD6D000, 0xFFF], "halted": True, "nmi_blocked": False,
           "lapic": lapic, "source": "Xen's crash notes"}  # fmt: skip
    example = {
        "about": "Of a machine made up here.\nBy hand.", "verdict": "pass", "crashing_cpu": None, "kind": "dump",
        "format": "ELF core", "build_id": None, "cpus": [cpu, cpu | {"registers": {}, "lapic": unknown}],
        "notes": [["CORE", 1, "00" * 70], ["Xen", 0x1000001, "ab"]],
        "symbols": [["0xffff82d040203f80", "d", "traps.c#nmi_callback"], ["0x10", "T", "a"]],
        "memory": {"0x1000": "01" * 33, "0x1022": "02", "0x10000000000": "0304"},
    }  # fmt: skip
    assert exampletext.parse(exampletext.write(example)) == example
