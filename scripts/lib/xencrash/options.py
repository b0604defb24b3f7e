"""Options that several sub-commands share, and what they mean."""

from __future__ import annotations

from argparse import ArgumentParser, ArgumentTypeError, Namespace

from xen_symbols.absence import Undecidable
from xen_symbols.crashpath.generations import BY_ID
from xen_symbols.records import NamedTuple
from xen_symbols.targets import PHYSICAL_END, Map
from xen_symbols.xen.given import NOTHING_GIVEN, Given, parse_aliases
from xencrash.errors import UsageError

LIVE_TARGET = "gdb:HOST:PORT, or gdb:/path/of/a/unix/socket (QEMU's -gdb)"
ANY_TARGET = f"TARGET is a dump's path, or {LIVE_TARGET}."
JUDGED = """\
exit status:
  0  every check passed          2  bad usage
  1  at least one check failed   3  could not be decided (the reason is on standard error)
"""


class Request(NamedTuple):
    """What to look at, and how: a TARGET and its options."""

    target: str
    symbols: str | None = None
    qmp: str | None = None  # of a live machine
    base: int | None = None  # of a raw image
    maps: tuple[Map, ...] = ()  # the same, where it is not one piece
    given: Given = NOTHING_GIVEN

    @property
    def live(self) -> bool:
        """Whether it is a machine, behind QEMU's gdbstub, and not a dump."""
        return self.target.startswith("gdb:")


def add_target(parser: ArgumentParser, *, several: bool = False, dumps: bool = True) -> None:
    """TARGET and how to read it: for `request`, or for `requests` if there may be several."""
    if several:
        parser.add_argument("target", nargs="+", metavar="TARGET", help="dumps, or one gdb:…")
    else:
        parser.add_argument("target", metavar="TARGET", help="a dump, or gdb:…" if dumps else "gdb:…")
    parser.add_argument(
        "--symbols", metavar="FILE", help="xen-syms, xen.efi, a .map, or an image; default: what Xen itself carries"
    )
    parser.add_argument(
        "--qmp", metavar="SOCKET",
        help="QEMU's QMP, a unix socket or HOST:PORT: for a live machine's LAPIC modes, NMI latches and IDTRs",
    )
    if dumps:
        parser.add_argument(
            "--base", type=_address, metavar="ADDRESS", help="physical address of a raw image's first byte"
        )
        parser.add_argument(
            "--map", type=_map, action="append", default=[], metavar="PHYS=OFFSET:SIZE",
            help="what of physical memory is where in a raw image; repeatable. Default: Xen's memory shows it",
        )  # fmt: skip
    else:
        parser.set_defaults(base=None, map=[])
    parser.add_argument(
        "--allow-build-id-mismatch", action="store_true", help="use symbols of another build; the report says so"
    )


def add_given(parser: ArgumentParser) -> None:
    """What is said of a patched crash path: for `what_is_given`, which `request` has."""
    parser.add_argument(
        "--generation", choices=BY_ID, metavar="ID",
        help="the crash path's generation, where a patched one is not recognised (xencrash lab guests lists them)",
    )  # fmt: skip
    parser.add_argument(
        "--alias", type=_alias, action="append", default=[], metavar="NAME=ACTUAL",
        help="what a patched Xen calls a name of the crash path: do_nmi_crash=my_nmi_crash; may be repeated",
    )  # fmt: skip


def what_is_given(args: Namespace) -> Given:
    """Nothing where the command has no such options."""
    return Given(
        getattr(args, "generation", None),
        parse_aliases(getattr(args, "alias", [])),
        getattr(args, "allow_build_id_mismatch", False),
    )


def _alias(text: str) -> str:
    try:
        parse_aliases([text])
    except Undecidable as error:
        raise ArgumentTypeError(str(error)) from None
    return text


def requests(args: Namespace) -> list[Request]:
    """A request for each TARGET. Raises UsageError for an option that would have no effect."""
    if args.allow_build_id_mismatch and args.symbols is None:
        raise UsageError("--allow-build-id-mismatch is for --symbols, and none are given: leave it out")
    targets = args.target if isinstance(args.target, list) else [args.target]
    return [_request(target, args) for target in targets]


def request(args: Namespace, *, symbols_may_follow: bool = False) -> Request:
    """The same for one TARGET. With `symbols_may_follow`, gdb may be given the symbols of another build later."""
    return _request(args.target, args) if symbols_may_follow else requests(args)[0]


def _request(target: str, args: Namespace) -> Request:
    asked = Request(target, args.symbols, args.qmp, args.base, tuple(args.map), what_is_given(args))
    if asked.maps and asked.base is not None:
        raise UsageError("--map says all of what is where in a raw image, and --base as well: leave one out")
    for name, given in (("--base", asked.base is not None), ("--map", bool(asked.maps))):
        if asked.live and given:
            raise UsageError(f"{name} is for a raw image of memory, and {target} is a live machine: leave it out")
    if not asked.live and asked.qmp is not None:
        raise UsageError(f"--qmp is for a live machine, and {target} is a dump: leave it out")
    return asked


def parse_live(target: str) -> str:
    """What gdb's `target remote` takes, from gdb:HOST:PORT or gdb:/path/of/a/socket. Raises Undecidable."""
    where = target.removeprefix("gdb:")
    if where == target or not where:
        raise Undecidable(f"{target!r} is not a live machine: that is gdb:HOST:PORT or gdb:/path/of/a/unix/socket")
    if where.startswith("/"):
        return where
    host, colon, port = where.rpartition(":")
    if not colon or not port.isdecimal() or not 0 < int(port) < 1 << 16:
        raise Undecidable(f"{target!r} has no port: a live machine is gdb:HOST:PORT or gdb:/path/of/a/unix/socket")
    return f"{host or 'localhost'}:{port}"


def add_output(parser: ArgumentParser, *formats: str) -> None:
    """--format, one of these and by default the first, and --output."""
    parser.add_argument("--format", choices=formats, default=formats[0], help="default: %(default)s")
    parser.add_argument("--output", metavar="FILE", help="write the report there instead of standard output")


def _address(text: str) -> int:
    try:
        if 0 <= (value := int(text, 0)) < PHYSICAL_END:
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not a physical address, such as 0x100000")


def _map(text: str) -> Map:
    physical, equals, place = text.partition("=")
    offset, colon, size = place.partition(":")
    try:
        if equals and colon and (found := Map(int(physical, 0), int(offset, 0), int(size, 0))).size > 0:
            return found
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not PHYS=OFFSET:SIZE, such as 0x100000000=0x80000000:0x40000000")


def seconds(text: str) -> float:
    try:
        if 0 < (value := float(text)) < float("inf"):
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def count(text: str) -> int:
    try:
        if (value := int(text, 0)) > 0:
            return value
    except ValueError:
        pass
    raise ArgumentTypeError(f"{text!r} is not a number above 0")
