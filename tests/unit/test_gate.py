"""Gate descriptors against bytes computed by hand from SDM vol. 3, figure 6-8."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from xen_symbols.x86 import gate


def test_the_nmi_gate_of_xen_4_22_with_ist_2() -> None:
    # offset ffff82d040201f00, selector e008, IST 2, type e, DPL 0, present
    raw = bytes.fromhex("001f 08e0 02 8e 2040 d082ffff 00000000".replace(" ", ""))
    decoded = gate.decode(raw)
    assert decoded == gate.Gate(0xFFFF82D040201F00, 0xE008, 2, gate.INTERRUPT_GATE, 0, True)
    assert decoded.raw == raw


def test_each_field_lies_where_the_manual_says() -> None:
    assert gate.decode(b"\x34\x12" + bytes(14)).handler == 0x1234
    assert gate.decode(bytes(6) + b"\x78\x56" + bytes(8)).handler == 0x56780000
    assert gate.decode(bytes(8) + b"\x01\0\0\x80" + bytes(4)).handler == 0x80000001 << 32
    assert gate.decode(bytes(2) + b"\x08\xe0" + bytes(12)).selector == 0xE008
    assert gate.decode(bytes(4) + b"\x07" + bytes(11)).ist == 7
    assert gate.decode(bytes(5) + b"\x0f" + bytes(10)).type == gate.TRAP_GATE
    assert gate.decode(bytes(5) + b"\x60" + bytes(10)).dpl == 3
    assert gate.decode(bytes(5) + b"\x80" + bytes(10)).present is True


def test_reserved_bits_are_reported_in_place() -> None:
    assert gate.decode(bytes(4) + b"\x08" + bytes(11)).reserved == (1 << 35, 0)
    assert gate.decode(bytes(5) + b"\x10" + bytes(10)).reserved == (1 << 44, 0)
    assert gate.decode(bytes(12) + b"\x01" + bytes(3)).reserved == (0, 1 << 32)


@given(st.binary(min_size=gate.SIZE, max_size=gate.SIZE))
def test_every_16_bytes_survive_decoding(raw: bytes) -> None:
    assert gate.encode(gate.decode(raw)) == raw


@given(
    st.builds(
        gate.Gate,
        handler=st.integers(0, 2**64 - 1),
        selector=st.integers(0, 0xFFFF),
        ist=st.integers(0, 7),
        type=st.integers(0, 15),
        dpl=st.integers(0, 3),
        present=st.booleans(),
        reserved=st.just((0, 0)),
    )
)
def test_every_gate_survives_encoding(value: gate.Gate) -> None:
    assert gate.decode(gate.encode(value)) == value
