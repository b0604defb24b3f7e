"""A compressed file that memory has no room for is not called damaged."""

from __future__ import annotations

import pytest

from xen_symbols.absence import Undecidable
from xen_symbols.formats import compression
from xen_symbols.formats.content import Held


@pytest.mark.parametrize(("packed", "reader"), [("gzip", "_streamed"), ("zstd", "_zstd_file")])
def test_too_little_memory_is_said(monkeypatch: pytest.MonkeyPatch, packed: str, reader: str) -> None:
    def no_room(*_: object) -> bytes:
        raise MemoryError

    monkeypatch.setattr(compression, reader, no_room)
    with pytest.raises(Undecidable) as raised:
        compression.unpacked(Held(b"packed"), packed)
    assert str(raised.value) == f"not enough memory to undo its {packed} compression; give the uncompressed file"
