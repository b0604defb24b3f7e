"""Fill the cache ($XENCRASH_CACHE, else ~/.cache/xencrash) with what a Xen and a
QEMU need, so that `lab up` needs no network. What is already there is checked
against its SHA-256, and fetched again if it is broken.
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from xencrash.errors import UsageError
from xencrash.lab import progress
from xencrash.lab.images import domu_images, qemu_words, xen_images
from xencrash.lab.options import STEP
from xencrash.lab.packages import Cache
from xencrash.lab.rows import DEFAULT_QEMU, DEFAULT_XEN, QEMUS, XENS

EPILOG = STEP


def add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--xen", choices=XENS, action="append", help=f"may be repeated; default: {DEFAULT_XEN}")
    parser.add_argument("--qemu", choices=QEMUS, action="append", help=f"may be repeated; default: {DEFAULT_QEMU}")
    parser.add_argument("--all", action="store_true", help="every Xen and every QEMU")
    parser.add_argument("--domu", action="store_true", help="also what --domu-vcpus needs (it is built with gcc)")
    parser.add_argument("--refresh", action="store_true", help="ask the package source for newer versions first")


def run(args: Namespace) -> int:
    if args.all and (args.xen or args.qemu):
        raise UsageError("--all is every Xen and every QEMU: leave it or --xen and --qemu out")
    cache = Cache(progress=progress.on_stderr())
    if args.refresh:
        cache.refresh()
    for name in QEMUS if args.all else args.qemu or [DEFAULT_QEMU]:
        qemu_words(cache, QEMUS[name])
    for name in XENS if args.all else args.xen or [DEFAULT_XEN]:
        made = (domu_images if args.domu else xen_images)(cache, XENS[name])
        print(f"Xen {name}: symbols {made.symbols}")
    return 0
