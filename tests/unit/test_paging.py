"""Page walks over tables built in a dictionary, by SDM vol. 3, 4.5."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xen_symbols.absence import Unreadable
from xen_symbols.x86 import paging

XEN = 0xFFFF82D040200000
P, PS, NX = 1, 1 << 7, 1 << 63


class Tables(dict[int, int]):
    """Page-table entries by physical address; anything else cannot be read."""

    def read(self, address: int, size: int) -> bytes:
        if address not in self:
            raise Unreadable(f"no memory at {address:#x}")
        return self[address].to_bytes(size, "little")


def entry(table: int, address: int, shift: int) -> int:
    return table + 8 * (address >> shift & 0x1FF)


def tables(address: int = XEN) -> Tables:
    """Four tables at 0x1000 to 0x4000 that map one page at 0x5fa00000."""
    return Tables(
        {
            entry(0x1000, address, 39): 0x2000 | P,
            entry(0x2000, address, 30): 0x3000 | P | NX,
            entry(0x3000, address, 21): 0x4000 | P,
            entry(0x4000, address, 12): 0x5FA00000 | P | NX,
        }
    )


def test_four_levels() -> None:
    mapping = paging.walk(tables().read, 0x1000, XEN + 0x123)
    assert (mapping.physical, mapping.size, mapping.remaining) == (0x5FA00123, 4096, 4096 - 0x123)
    assert [level for level, _, _ in mapping.entries] == ["PML4E", "PDPTE", "PDE", "PTE"]


@pytest.mark.parametrize(("shift", "table"), [(21, 0x3000), (30, 0x2000)])
def test_superpages(shift: int, table: int) -> None:
    found = tables()
    size = 1 << shift
    found[entry(table, XEN, shift)] = 0x40000000 | P | PS | 1 << 12  # bit 12 is PAT in a superpage, not address
    address = XEN + 0x123456
    mapping = paging.walk(found.read, 0x1000, address)
    assert (mapping.physical, mapping.size) == (0x40000000 + address % size, size)


@pytest.mark.parametrize(("shift", "table"), [(39, 0x1000), (30, 0x2000), (21, 0x3000), (12, 0x4000)])
def test_an_entry_that_is_not_present_is_named(shift: int, table: int) -> None:
    found = tables()
    found[entry(table, XEN, shift)] = 0
    with pytest.raises(Unreadable, match=f"{entry(table, XEN, shift):#x} is 0"):
        paging.walk(found.read, 0x1000, XEN)


def test_a_table_that_cannot_be_read_is_unreadable() -> None:
    with pytest.raises(Unreadable, match="no memory"):
        paging.walk(Tables().read, 0x1000, XEN)


def test_low_bits_of_cr3_are_not_address() -> None:
    assert paging.walk(tables().read, 0x1018, XEN).physical == 0x5FA00000


def test_tables_that_loop_end() -> None:
    loop = Tables({0x1000 + 8 * index: 0x1000 | P for index in range(512)})
    assert paging.walk(loop.read, 0x1000, XEN).physical == 0x1000


@given(st.integers(0x8000_0000_0000, 0xFFFF_7FFF_FFFF_FFFF))
def test_no_walk_from_an_address_that_is_not_canonical(address: int) -> None:
    with pytest.raises(Unreadable, match="not a canonical address"):
        paging.walk(tables().read, 0x1000, address)


@given(st.dictionaries(st.integers(0, 1023).map(lambda i: 8 * i), st.integers(0, 2**64 - 1)), st.integers(0, 2**47 - 1))
def test_any_tables_end_in_a_mapping_or_unreadable(content: dict[int, int], address: int) -> None:
    try:
        mapping = paging.walk(Tables(content).read, 0, address)
    except Unreadable:
        return
    assert mapping.physical % mapping.size == address % mapping.size
