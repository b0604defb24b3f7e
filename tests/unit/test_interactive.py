"""`xencrash gdb FILE`: gdb itself knows Xen's symbols, whoever gave them."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cramjam import zstd

from tests.machines.syntheticxen import PHYS_START, VIRT_START, CrashedXen
from xen_symbols import open_dump
from xen_symbols.symbols.elfwrite import symbol_file
from xen_symbols.symbols.load import load_symbols
from xencrash.cli import main
from xencrash.serve import served


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> CrashedXen:
    machine = CrashedXen(tmp_path_factory.mktemp("machine"))
    machine.elf()
    return machine


def gdb(machine: CrashedXen, *words: str | Path) -> subprocess.CompletedProcess[str]:
    commands = ["p &idle_pg_table", "p/x *(unsigned int*) &nr_cpu_ids", "bt 1", "xen symbols"]
    theirs = ["-batch", *(part for command in commands for part in ("-ex", command))]
    code = "import sys; from xencrash.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, "gdb", machine.folder / "vmcore", *words, "--", *theirs],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("given", [False, True], ids=["carried", "map"])
def test_gdb_on_a_dump_has_symbols(machine: CrashedXen, given: bool) -> None:
    done = gdb(machine, *(["--symbols", machine.symbols] if given else []))
    table = machine.xen.symbols["idle_pg_table"][0]
    assert f"$1 = (<data variable, no debug info> *) {table:#x}\n" in done.stdout
    assert "$2 = 0x2\n" in done.stdout
    assert " in kexec_crash_save_cpu ()\n" in done.stdout
    whose = f"of {machine.symbols}" if given else "that Xen carries in its image"
    said = f"xencrash: gdb has the symbols {whose}, and no types; use xen bt for Xen's stacks\n"
    assert (done.returncode, done.stderr) == (0, said)
    (shown,) = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("symbols ")]
    if given:
        assert shown == f"{machine.symbols} (.map)"
    else:
        path = Path(shown.removesuffix(" (ELF symbol table)"))
        assert path.name == "xen-syms" and not path.exists() and not path.parent.exists()


NOT_UTF8 = os.fsdecode(b"xen-\xff\xe4")


@pytest.mark.parametrize(
    ("name", "pack", "source"),
    [
        ("xen-syms.gz", gzip.compress, "ELF symbol table"),
        ("xen-syms.xz", lzma.compress, "ELF symbol table"),
        ("xen-syms.zst", lambda data: bytes(zstd.compress(data)), "ELF symbol table"),
        (NOT_UTF8, bytes, "ELF symbol table"),
        (f"{NOT_UTF8}.bz2", bz2.compress, "ELF symbol table"),
        (f"{NOT_UTF8}.map", None, ".map"),
    ],
    ids=["gz", "xz", "zst", "not UTF-8", "not UTF-8, bz2", "not UTF-8, map"],
)
def test_gdb_has_the_symbols_of_any_file(
    machine: CrashedXen, tmp_path: Path, name: str, pack: Callable[[bytes], bytes] | None, source: str
) -> None:
    path = tmp_path / name
    path.write_bytes(machine.symbols.read_bytes() if pack is None else pack(symbol_file(load_symbols(machine.symbols))))
    done = gdb(machine, "--symbols", path)
    assert f"{machine.xen.symbols['idle_pg_table'][0]:#x}\n" in done.stdout.partition("$1 = ")[2]
    assert " in kexec_crash_save_cpu ()\n" in done.stdout
    (shown,) = [line.split(maxsplit=1)[1] for line in done.stdout.splitlines() if line.startswith("symbols ")]
    assert done.returncode == 0 and shown.endswith(f" ({source})")
    assert (shown == f"{path} ({source})") is (name in ("xen-syms.gz", "xen-syms.xz"))
    assert "Traceback" not in done.stderr and "Error" not in done.stderr


def test_a_file_that_is_not_a_dump_starts_no_gdb(machine: CrashedXen) -> None:
    text = machine.folder / "text"
    text.write_text("no dump")
    code = "import sys; from xencrash.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, "gdb", text], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith(f"xencrash: {text}: not a dump of a known format") and done.stderr.count("\n") == 1


def test_a_xen_with_undetermined_cpus_starts_no_gdb(machine: CrashedXen, capsys: pytest.CaptureFixture[str]) -> None:
    address = machine.xen.symbols["nr_cpu_ids"][0] - VIRT_START + PHYS_START
    count = machine.xen.content[address]
    machine.xen.content[address] = bytes(4)
    try:
        path = machine.elf()
    finally:
        machine.xen.content[address] = count
    assert main(["gdb", str(path)]) == 3
    machine.elf()
    assert capsys.readouterr().err == (
        f"xencrash: {path}: nr_cpu_ids is 0, which is impossible: it is not set yet, or the symbols are wrong\n"
    )


def test_a_raw_image_has_the_registers_that_xen_saved(machine: CrashedXen, tmp_path: Path) -> None:
    ram = tmp_path / "ram"
    with ram.open("wb") as file:
        for address, data in machine.xen.content.items():
            file.seek(address)
            file.write(data)
    memory = open_dump(ram, base=0)
    registers = [machine.xen._registers(cpu) for cpu in (0, 1)]
    threads = served(memory, 0).threads
    assert [thread.says for thread in threads] == [f"CPU {cpu}, Xen's crash notes in its memory" for cpu in (0, 1)]
    assert all(each.items() <= thread.registers.items() for each, thread in zip(registers, threads, strict=True))
    buffer = memory.read_uint(memory.variable("crash_notes") + 16)
    with ram.open("r+b") as file:
        file.seek(memory.physical(buffer) + 20)
        file.write(bytes(336))
        file.seek(memory.physical(buffer) + 372)
        file.write(bytes(32))
    first, second = served(open_dump(ram, base=0), 0).threads
    assert first.registers["rip"] == registers[0]["rip"]
    assert (second.registers, second.says) == ({}, "CPU 1: the dump holds no registers of any CPU")
