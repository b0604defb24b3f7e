"""Take a dump of the machine. `--format vmcore` waits for the crash kernel to copy
/proc/vmcore, and takes that. The others are QEMU's own dumps of the machine as it
is now, whatever runs in it.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from xencrash.errors import UsageError
from xencrash.lab.dumps import VMCORE_IN
from xencrash.lab.options import STEP, add_run_dir, machine

EPILOG = STEP


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--output", required=True, metavar="FILE", help="where to write it")
    parser.add_argument(
        "--format", default="vmcore", choices=("vmcore", "elf", "kdump-zlib", "kdump-lzo", "kdump-snappy"),
        help="default: vmcore",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=float, metavar="S", help=f"seconds to wait for the vmcore; default: {VMCORE_IN:.0f}"
    )
    add_run_dir(parser)


def run(args: Namespace) -> int:
    if args.format != "vmcore" and args.timeout is not None:
        raise UsageError(f"--timeout is for --format vmcore, and {args.format} is taken at once: leave it out")
    dumped = machine(args)
    if args.format == "vmcore":
        written = dumped.dumps.vmcore(args.output, args.timeout or VMCORE_IN)
    else:
        written = dumped.dumps.qemu(args.output, args.format)
    print(f"{written}  (symbols: {dumped.symbols})")
    return 0
