"""The lab's package cache: what apt says, and what is trusted of what it fetched."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
from pathlib import Path

import pytest

from xencrash.lab import packages
from xencrash.lab.errors import LabError, PackageGone
from xencrash.lab.packages import Cache, Package, apt_failure, parse_mirrors, parse_records, sources_list
from xencrash.lab.rows import SUITES

RECORDS = """\
Package: kexec-tools
Version: 1:2.0.25-3+deb12u3
Installed-Size: 288
Pre-Depends: init-system-helpers (>= 1.54~)
Depends: libc6 (>= 2.34), libxenmisc4.17 (>= 4.17.5) | libxen-other, debconf
Description: tools to support fast kexec reboots
 This package provides tools.
 .
 Filename: is only text here
Filename: pool/main/k/kexec-tools/kexec-tools_2.0.25-3+deb12u3_amd64.deb
Size: 85260
SHA256: 1d386c0e

Package: busybox-static
Version: 1:1.35.0-4
Filename: pool/main/b/busybox/busybox-static_1.35.0-4_amd64.deb
Size: 9
SHA256: 3d3f
"""


def test_records_hold_what_the_index_says() -> None:
    found = parse_records(RECORDS)
    assert found["kexec-tools"] == Package(
        "kexec-tools",
        "1:2.0.25-3+deb12u3",
        "kexec-tools_2.0.25-3+deb12u3_amd64.deb",
        85260,
        "1d386c0e",
        ("init-system-helpers", "libc6", "libxenmisc4.17", "debconf"),
    )
    assert found["busybox-static"].depends == ()
    assert parse_records("N: Unable to locate package nosuch\n") == {}


def test_mirrors_are_the_machines_own_and_debians() -> None:
    listed = (
        "Other|Other|http://other.example/\n"
        "Debian|Debian|http://one.example/debian/\n"
        "Debian|Debian|http://two.example/debian/\n"
        "Debian|Debian-Security|http://one.example/security/\n"
    )
    assert parse_mirrors(listed) == {
        "Debian": "http://one.example/debian/",
        "Debian-Security": "http://one.example/security/",
    }


def test_sources_use_the_existing_mirrors() -> None:
    text = sources_list(SUITES["bookworm"], {"Debian": "http://one.example/debian/"}, Path("/k.gpg"))
    assert text == "deb [arch=amd64 target=Packages signed-by=/k.gpg] http://one.example/debian/ bookworm main\n"
    with pytest.raises(LabError, match="apt-get update as root"):
        sources_list(SUITES["bookworm"], {}, None)


@pytest.mark.parametrize(
    ("output", "kind", "words"),
    [
        (
            "Err:1 http://m.example bullseye Release\n  404  Not Found\n"
            "E: The repository 'http://m.example bullseye Release' does not have a Release file.",
            PackageGone,
            "answered 404 Not Found",
        ),
        (
            "E: Failed to fetch http://m.example/x.deb  Could not connect to m.example:80 (1.2.3.4).",
            LabError,
            "check the network",
        ),
        ("E: The repository 'http://m.example sid InRelease' is not signed.", LabError, "is not signed"),
        ("", LabError, "apt said nothing"),
    ],
)  # fmt: skip
def test_only_the_sources_own_denial_counts_as_gone(output: str, kind: type[Exception], words: str) -> None:
    error = apt_failure("fetching the package index of bullseye", "bullseye", output)
    assert type(error) is kind
    assert words in str(error)
    assert "\n" not in str(error)


class FakeApt:
    """Stands in for apt: an index of one package, and a download that yields `delivered`."""

    def __init__(self, content: bytes) -> None:
        self.content = self.delivered = content
        self.version = "1:2.0-1"
        self.index_error = ""
        self.show_fails: tuple[int, str, str] | None = None  # status, output, errors
        self.calls: list[str] = []
        self.options: list[dict[str, str]] = []

    def __call__(self, command: list[str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
        if command[1] == "indextargets":
            return subprocess.CompletedProcess(command, 0, "Debian|Debian|http://m.example/debian/\n", "")
        words = [word for word in command[1:] if not word.startswith("-") and "::" not in word]
        self.calls.append(" ".join([command[0], *words]))
        given = (value for option, value in itertools.pairwise(command) if option == "-o")
        self.options.append(dict(value.split("=", 1) for value in given))
        if words[0] == "update" and self.index_error:
            return subprocess.CompletedProcess(command, 100, "", self.index_error)
        if words[0] == "show" and self.show_fails:
            return subprocess.CompletedProcess(command, *self.show_fails)
        if words[0] == "show" and "tool" not in words:
            return subprocess.CompletedProcess(command, 100, "", "E: No packages found\n")
        if words[0] == "show":
            text = (
                f"Package: tool\nVersion: {self.version}\nFilename: pool/tool_{self.version[2:]}_amd64.deb\n"
                f"Size: {len(self.content)}\nSHA256: {hashlib.sha256(self.content).hexdigest()}\n"
            )
            return subprocess.CompletedProcess(command, 0, text, "")
        if words[0] == "download":
            if words[1:] != [f"tool={self.version}"]:
                return subprocess.CompletedProcess(command, 100, "", f"E: Version for {words[1]} was not found")
            assert cwd is not None
            (cwd / f"tool_{self.version.replace(':', '%3a')}_amd64.deb").write_bytes(self.delivered)
        return subprocess.CompletedProcess(command, 0, "", "")


@pytest.fixture
def apt(monkeypatch: pytest.MonkeyPatch) -> FakeApt:
    fake = FakeApt(b"a package" * 1000)
    monkeypatch.setattr(packages, "_call", fake)
    return fake


def collect(root: Path, messages: list[str] | None = None, name: str = "tool") -> Path:
    cache = Cache(root, progress=(messages if messages is not None else []).append)
    with cache.lock():
        return cache.collect("bookworm", lambda at: at.packages("bookworm", [name]))[name]


def test_a_second_run_fetches_nothing(apt: FakeApt, tmp_path: Path) -> None:
    first = collect(tmp_path)
    assert apt.calls == ["apt-get update", "apt-cache show tool", "apt-get download tool=1:2.0-1"]
    assert collect(tmp_path) == first
    assert first.read_bytes() == apt.content
    assert len(apt.calls) == 3


@pytest.mark.parametrize("damage", [b"", b"a package" * 999, b"b" + b"a package" * 1000])
def test_a_broken_package_in_the_cache_is_found_reported_and_fetched_again(
    apt: FakeApt, tmp_path: Path, damage: bytes
) -> None:
    path = collect(tmp_path)
    path.write_bytes(damage)
    messages: list[str] = []
    assert collect(tmp_path, messages).read_bytes() == apt.content
    assert messages[0] == "tool_2.0-1_amd64.deb in the cache is broken (its SHA-256 is wrong): fetching it again"


def test_damage_that_keeps_size_and_time_is_found(apt: FakeApt, tmp_path: Path) -> None:
    import os

    path = collect(tmp_path)
    before = path.stat()
    path.write_bytes(b"A" + apt.content[1:])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert collect(tmp_path).read_bytes() == apt.content


def test_a_truncated_download_is_not_accepted(apt: FakeApt, tmp_path: Path) -> None:
    apt.delivered = apt.content[:-1]
    with pytest.raises(LabError, match="not what the signed index of bookworm describes") as raised:
        collect(tmp_path)
    assert not isinstance(raised.value, PackageGone)
    assert list((tmp_path / "packages").iterdir()) == []
    apt.delivered = apt.content
    assert collect(tmp_path).read_bytes() == apt.content


def test_a_package_that_the_index_lacks_is_gone(apt: FakeApt, tmp_path: Path) -> None:
    with pytest.raises(PackageGone, match="the index of bookworm has no other") as raised:
        collect(tmp_path, name="other")
    assert raised.value.__context__ is None  # as tests/conftest.py has it
    cache = Cache(tmp_path)  # apt-cache's status is 0 where it knows one of them
    with cache.lock(), pytest.raises(PackageGone, match="the index of bookworm has no other"):
        cache.collect("bookworm", lambda at: at.packages("bookworm", ["tool", "other"]))


@pytest.mark.parametrize(
    ("failed", "words"),
    [
        ((100, "", "E: Write error - write (28: No space left on device)"), "status 100: E: Write error"),
        ((-9, "", ""), "status -9: it printed no record and no reason"),
        ((100, RECORDS, "E: Could not get lock /l/lock - open (11: Resource temporarily unavailable)"), "get lock"),
        ((100, "", "E: No packages found\nE: The package lists or status file could not be parsed"), "not be parsed"),
        ((0, "", ""), "status 0: it printed no record"),
    ],
)
def test_a_failure_of_apt_cache_itself_is_ours(
    apt: FakeApt, tmp_path: Path, failed: tuple[int, str, str], words: str
) -> None:
    apt.show_fails = failed
    with pytest.raises(LabError, match=words) as raised:
        collect(tmp_path)
    assert type(raised.value) is LabError and "\n" not in str(raised.value)
    assert apt.calls.count("apt-cache show tool") == 1  # the index was fresh
    apt.show_fails = None
    assert collect(tmp_path).read_bytes() == apt.content


def test_apt_is_given_nothing_of_the_machines_own_to_write_to(apt: FakeApt, tmp_path: Path) -> None:
    collect(tmp_path)
    folder = tmp_path / "suites/bookworm"
    assert [call.split()[1] for call in apt.calls] == ["update", "show", "download"]
    for options in apt.options:
        assert {name: value for name, value in options.items() if name.startswith("Dir::")} == {
            "Dir::Etc::SourceList": f"{folder}/sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::State": f"{folder}/state",
            "Dir::State::Lists": f"{folder}/lists",
            "Dir::State::status": f"{folder}/status",
            "Dir::Cache": f"{folder}/cache",
        }


def test_a_suite_that_left_the_mirror_is_gone(apt: FakeApt, tmp_path: Path) -> None:
    apt.index_error = "E: The repository 'http://m.example bookworm Release' does not have a Release file."
    with pytest.raises(PackageGone, match="fetching the package index of bookworm") as raised:
        collect(tmp_path)
    assert raised.value.__context__ is None
    apt.index_error = ""  # and is not remembered as fetched
    assert collect(tmp_path).read_bytes() == apt.content


def test_an_older_index_is_fetched_again_when_its_version_is_gone(apt: FakeApt, tmp_path: Path) -> None:
    collect(tmp_path).unlink()
    apt.version, apt.content = "1:2.0-2", b"newer"
    apt.delivered = apt.content
    assert collect(tmp_path).name == "tool_2.0-2_amd64.deb"


def test_a_broken_record_is_asked_for_again(apt: FakeApt, tmp_path: Path) -> None:
    collect(tmp_path)
    (tmp_path / "suites/bookworm/packages.json").write_text('[{"name": "tool"')
    messages: list[str] = []
    assert collect(tmp_path, messages).read_bytes() == apt.content
    assert "packages.json is broken" in messages[0]


def test_two_runs_do_not_fill_the_cache_at_once(apt: FakeApt, tmp_path: Path) -> None:
    import threading

    messages: list[str] = []
    with Cache(tmp_path).lock():
        other = threading.Thread(target=collect, args=(tmp_path, messages))
        other.start()
        other.join(0.5)
        assert other.is_alive()
        assert messages == ["waiting for another run that is filling the cache"]
    other.join(10)
    assert (tmp_path / "packages/tool_2.0-1_amd64.deb").read_bytes() == apt.content
