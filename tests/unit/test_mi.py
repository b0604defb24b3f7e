"""The records of gdb's machine interface: as pygdbmi reads them, and an answer of the plugin without it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as some
from pygdbmi import gdbmiparser

from xencrash import mi
from xencrash.mi import Records, parsed

ANSWER = json.dumps({"symbol": 'traps.c#"nmi"\\', "text": "two\nlines, ü", "bytes": "00ff"})


def in_mi(text: str) -> str:
    """As gdb prints a string: a C string, with what is not printable in octal."""
    bare = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t")
    return '"' + "".join(c if " " <= c < "\x7f" else "".join(f"\\{b:03o}" for b in c.encode()) for c in bare) + '"'


def test_an_answer_of_the_plugin_needs_no_pygdbmi(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mi.gdbmiparser, "parse_response", None)
    record = parsed(f"12^done,json={in_mi(ANSWER)}")
    assert record == {"type": "result", "message": "done", "payload": {"json": ANSWER}, "token": 12}
    assert json.loads(record["payload"]["json"])["symbol"] == 'traps.c#"nmi"\\'


@given(some.text(some.characters(codec="utf-8")), some.booleans())
def test_an_answer_is_what_pygdbmi_makes_of_it(text: str, ascii_only: bool) -> None:
    answer = json.dumps({"text": text}, ensure_ascii=ascii_only)
    line = f"7^done,json={in_mi(answer)}"
    assert parsed(line) == gdbmiparser.parse_response(line)
    assert parsed(line)["payload"] == {"json": answer}


@pytest.mark.parametrize(
    "line",
    [
        '3^done,json="one",more="two"',
        '3^done,json="\\303\\274\\a"',
        '3^done,bkpt={number="1",type="hw breakpoint"}',
        '3^error,msg="No \\"x\\""',
        "3^running",
        '*stopped,reason="signal-received",signal-name="SIGINT"',
        '~"json=\\"x\\"\\n"',
        "not a record",
    ],
)
def test_any_other_record_is_pygdbmis(line: str) -> None:
    assert parsed(line) == gdbmiparser.parse_response(line)


@pytest.fixture
def pipe() -> Iterator[tuple[Records, int]]:
    reading, writing = os.pipe()
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        yield Records(pipe), writing


def test_records_that_come_in_pieces(pipe: tuple[Records, int]) -> None:
    records, writing = pipe
    assert records.read(0.01) == []
    os.write(writing, b'~"on')
    assert records.read(60) == []
    os.write(writing, b'e"\n(gdb) \n\n~"two\xff"\r\n5^do')
    assert [record["payload"] for record in records.read(60)] == ["one", "two\ufffd"]
    os.write(writing, b"ne\n")
    assert [record["token"] for record in records.read(60)] == [5]
    os.close(writing)
    assert records.read(60) == []
