"""The text of a recorded example: for a person to read, and for `recorded` to load.

    # comments, until the first line that is not one
    verdict       pass
    crashing_cpu  0

    cpu                                     one block for each
        apic_id       0
        idtr          0xffff83003fd6d000 0xfff
        nmi_pending   ? UNAVAILABLE the reason why it is not known
        registers
            rax 0x000000000002a07b  rbx 0x0000000000000003  …
    note CORE 0x1                           one for each; its content as the lines of `memory`
        0000  00000000 00000000 …
    symbols
        ffff82d040203f80 T traps.c#nmi_callback
    memory
        3fd6d000  8c160340 10e0008e …       address, bytes; a line that starts where the last ended continues it

`parse` gives the same as nested dictionaries and lists, with integers for numbers, None for `-`, booleans for `yes`
and `no`, hexadecimal strings for bytes, and {"absent": reason, "kind": kind} for what was not known; `write` is its
inverse.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

Json = dict[str, Any]

_HEAD = ("verdict", "crashing_cpu", "kind", "format", "build_id")
_COUNTED = {"index", "xen_cpu", "apic_id", "crashing_cpu"}  # decimal
_PER_LINE = 32  # bytes


# -- writing ----------------------------------------------------------------------------------


def write(example: Json) -> str:
    return "\n".join(_lines(example)) + "\n"


def _lines(example: Json) -> Iterator[str]:
    yield from (f"# {line}".rstrip() for line in example["about"].splitlines())
    yield ""
    yield from (_row(name, example[name]) for name in _HEAD)
    for cpu in example["cpus"]:
        yield from ("", "cpu", *_fields(cpu))
    for name, kind, desc in example["notes"]:
        yield from ("", f"note {name} {kind:#x}", *_dump({0: bytes.fromhex(desc)}, 4))
    rows = (f"    {int(address, 16):016x} {kind} {name}" for address, kind, name in example["symbols"])
    yield from ("", "symbols", *rows)
    memory = {int(address, 16): bytes.fromhex(data) for address, data in example["memory"].items()}
    yield from ("", "memory", *_dump(memory, 8))


def _row(name: str, value: Any) -> str:
    return f"{name:<13} {_word(name, value)}"


def _fields(fields: Json, indent: str = "    ") -> Iterator[str]:
    for name, value in fields.items():
        if name == "registers":
            yield f"{indent}registers"
            words = [f"{register:<7} {number:#018x}" for register, number in value.items()]
            yield from (f"{indent}    {'  '.join(words[at : at + 4])}" for at in range(0, len(words), 4))
        elif isinstance(value, dict) and "absent" not in value:
            yield from (f"{indent}{name}", *_fields(value, indent + "    "))
        else:
            yield indent + _row(name, value)


def _word(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return str(value) if name in _COUNTED else f"{value:#x}"
    if isinstance(value, (list, tuple)):
        return " ".join(f"{number:#x}" for number in value)
    if isinstance(value, dict):
        return f"? {value['kind']} {value['absent']}"
    return str(value)


def _dump(stretches: dict[int, bytes], digits: int) -> Iterator[str]:
    for start, data in stretches.items():
        for at in range(0, len(data), _PER_LINE):
            line = data[at : at + _PER_LINE]
            words = " ".join(line[word : word + 4].hex() for word in range(0, len(line), 4))
            yield f"    {start + at:0{digits}x}  {words}"


# -- reading ----------------------------------------------------------------------------------


def parse(text: str) -> Json:
    lines = text.splitlines()
    comments = [line for line in lines if line.startswith("#")]
    example: Json = {"about": "\n".join(line[2:] for line in comments), "cpus": [], "notes": [], "symbols": []}
    for head, *block in _blocks(lines[len(comments) :]):
        keyword, _, rest = head.partition(" ")
        if keyword == "cpu":
            example["cpus"].append(_read_fields(block))
        elif keyword == "note":
            name, _, kind = rest.rpartition(" ")
            example["notes"].append([name, int(kind, 16), "".join(_read_dump(block).values())])
        elif keyword == "symbols":
            words = (line.split(None, 2) for line in block)
            example["symbols"] = [[hex(int(address, 16)), kind, name] for address, kind, name in words]
        elif keyword == "memory":
            example["memory"] = {hex(start): data for start, data in _read_dump(block).items()}
        else:
            example |= _read_fields([head, *block])
    return example


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    block: list[str] = []
    for line in [*lines, ""]:
        if line:
            block.append(line)
        elif block:
            yield block
            block = []


def _read_fields(lines: list[str]) -> Json:
    """`NAME VALUE`, or NAME and below it, further in, its own."""
    fields: Json = {}
    inner: list[str] = []
    depth = len(lines[0]) - len(lines[0].lstrip())
    for line in reversed(lines):
        if len(line) - len(line.lstrip()) > depth:
            inner.insert(0, line)
            continue
        name, _, value = line.strip().partition(" ")
        if not value:
            fields[name] = _read_registers(inner) if name == "registers" else _read_fields(inner)
            inner = []
        else:
            fields[name] = _read_word(name, value.strip())
    return dict(reversed(fields.items()))


def _read_registers(lines: list[str]) -> Json:
    words = " ".join(lines).split()
    return {name: int(value, 16) for name, value in zip(words[::2], words[1::2], strict=True)}


def _read_word(name: str, word: str) -> Any:
    if word in ("-", "yes", "no"):
        return {"-": None, "yes": True, "no": False}[word]
    if word.startswith("? "):
        _, kind, reason = word.split(" ", 2)
        return {"absent": reason, "kind": kind}
    if word.startswith("0x"):
        numbers = [int(number, 16) for number in word.split()]
        return numbers if len(numbers) > 1 else numbers[0]
    return int(word) if name in _COUNTED else word


def _read_dump(lines: list[str]) -> dict[int, str]:
    stretches: dict[int, str] = {}
    start = end = -1
    for line in lines:
        address, _, words = line.strip().partition("  ")
        at, data = int(address, 16), words.replace(" ", "")
        if at != end:
            start, stretches[at] = at, ""
        stretches[start] += data
        end = at + len(data) // 2
    return stretches
