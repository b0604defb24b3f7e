"""Debian packages in a cache, fetched with apt's own client.

For each suite apt gets separate sources, state and cache, so that the machine's configuration is neither
needed nor changed; only the mirror (and apt's proxy settings) are the machine's own. apt checks the
signatures; the SHA-256 of the signed index is kept, and every package is compared with it whenever it is read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from xencrash.lab.digests import sha256_of
from xencrash.lab.errors import LabError, PackageGone
from xencrash.lab.rows import SUITES, Suite

Progress = Callable[[str], None]

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_LIBRARY = re.compile(r"lib|zlib1g$")  # how Debian names the packages of shared libraries
_GONE = re.compile(r"404\s+Not Found|410\s+Gone|does not have a Release file|no longer has a Release file")
_NONE_OF_THEM = ["E: No packages found"]  # apt-cache's whole output, with status 100, if no name is in the index


@dataclass(frozen=True)
class Package:
    """One package as the signed index describes it; `depends` holds the first alternative of each dependency."""

    name: str
    version: str
    file: str  # the file's name in the pool, without its folder
    size: int
    sha256: str
    depends: tuple[str, ...]


def default_root() -> Path:
    """The cache: $XENCRASH_CACHE, else where the XDG base directory specification puts caches."""
    if given := os.environ.get("XENCRASH_CACHE"):
        return Path(given).absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xencrash"


def parse_records(text: str) -> dict[str, Package]:
    """Packages from `apt-cache show`: RFC 822 paragraphs; the first paragraph of a name is the candidate."""
    packages: dict[str, Package] = {}
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        fields = dict(re.findall(r"^([A-Za-z0-9-]+):[ \t]*(.*(?:\n[ \t].*)*)", paragraph, re.MULTILINE))
        if "SHA256" not in fields or "Filename" not in fields:
            continue
        depends = ", ".join(filter(None, (fields.get("Pre-Depends"), fields.get("Depends"))))
        names = [match[1] for part in depends.split(",") if (match := re.match(r"\s*([a-z0-9][a-z0-9+.-]*)", part))]
        package = Package(
            fields["Package"],
            fields["Version"],
            Path(fields["Filename"]).name,
            int(fields["Size"]),
            fields["SHA256"],
            tuple(dict.fromkeys(names)),
        )
        packages.setdefault(package.name, package)
    return packages


def parse_mirrors(text: str) -> dict[str, str]:
    """The machine's own mirrors, by label, from `apt-get indextargets` lines ORIGIN|LABEL|URI."""
    mirrors: dict[str, str] = {}
    for line in text.splitlines():
        origin, _, rest = line.partition("|")
        label, _, uri = rest.partition("|")
        if origin == "Debian" and uri:
            mirrors.setdefault(label, uri)
    return mirrors


def sources_list(suite: Suite, mirrors: dict[str, str], keyring: Path | None) -> str:
    """The text of a sources.list: one line for each of the suite's sources that the machine has a mirror of."""
    options = "arch=amd64 target=Packages" + (f" signed-by={keyring}" if keyring else "")
    lines = [f"deb [{options}] {mirrors[label]} {name} main\n" for label, name in suite.sources if label in mirrors]
    if not lines:
        raise LabError(
            "packages: this machine's apt knows no Debian mirror (apt-get indextargets lists none): "
            "run apt-get update as root, then try again"
        )
    return "".join(lines)


class Cache:
    """Packages that were fetched and checked, in a folder that several runs may share."""

    def __init__(self, root: Path | None = None, progress: Progress = lambda text: None) -> None:
        self.root = root or default_root()
        self.progress = progress
        self._fresh: set[str] = set()  # suites whose index this process has asked for

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Held while the cache changes: a second run waits for the first."""
        self.root.mkdir(parents=True, exist_ok=True)
        with (self.root / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.progress("waiting for another run that is filling the cache")
                fcntl.flock(stream, fcntl.LOCK_EX)
            yield

    def refresh(self) -> None:
        """Forget which versions were chosen: the next fetch asks the package source again."""
        self._fresh.clear()
        for suite in SUITES:
            self._forget(suite)

    def collect(self, suite: str, choose: Callable[[Cache], list[Package]]) -> dict[str, Path]:
        """The files, by package name, of what `choose` picks with `packages` and `with_libraries`.

        An index that is kept from an earlier day may name versions that the source has replaced since:
        then it is fetched again, once.
        """
        while True:
            try:
                packages = choose(self)
                return {package.name: path for package, path in zip(packages, self.fetch(suite, packages), strict=True)}
            except LabError:
                if suite in self._fresh:
                    raise
                self._forget(suite)

    def _forget(self, suite: str) -> None:
        for name in ("updated", "packages.json"):
            (self._folder(suite) / name).unlink(missing_ok=True)

    def packages(self, suite: str, names: Iterable[str]) -> list[Package]:
        """What the index says about each name, from the record of an earlier run if there is one."""
        wanted = list(names)
        known = self._known(suite)
        missing = [name for name in wanted if name not in known]
        if missing:
            known |= self._ask(suite, missing)
            self._record(suite, known)
        return [known[name] for name in wanted]

    def with_libraries(self, suite: str, names: Iterable[str]) -> list[Package]:
        """The named packages and, through their dependencies, every library package that they need."""
        found: dict[str, Package] = {}
        todo = list(names)
        while todo:
            packages = self.packages(suite, todo)
            found |= {package.name: package for package in packages}
            needs = {name for package in packages for name in package.depends if _LIBRARY.match(name)}
            todo = sorted(needs - found.keys())
        return list(found.values())

    def fetch(self, suite: str, packages: Iterable[Package]) -> list[Path]:
        """The packages' files, each compared with the signed index's SHA-256; fetched if missing or broken."""
        folder = self.root / "packages"
        folder.mkdir(parents=True, exist_ok=True)
        wanted = list(packages)
        missing = []
        for package in wanted:
            path = folder / package.file
            if not path.exists():
                missing.append(package)
            elif sha256_of(path) != package.sha256:
                self.progress(f"{package.file} in the cache is broken (its SHA-256 is wrong): fetching it again")
                path.unlink()
                missing.append(package)
        if missing:
            size = sum(package.size for package in missing) / 1e6
            names = ", ".join(package.name for package in missing[:4]) + (", …" if len(missing) > 4 else "")
            self.progress(f"fetching {len(missing)} packages from {suite} ({size:.1f} MB): {names}")
            self._download(suite, missing, folder)
        return [folder / package.file for package in wanted]

    def _download(self, suite: str, packages: list[Package], folder: Path) -> None:
        partial = self.root / "partial"
        partial.mkdir(parents=True, exist_ok=True)
        for leftover in partial.iterdir():
            leftover.unlink()
        self._update(suite)
        specs = [f"{package.name}={package.version}" for package in packages]
        self._apt(suite, "apt-get", "download", *specs, cwd=partial, step="fetching packages")
        for package in packages:
            # apt escapes the epoch's colon in the names of its files; the pool's names have no epoch.
            prefix = f"{package.name}_{package.version.replace(':', '%3a')}_"
            found = [path for path in partial.iterdir() if path.name.startswith(prefix)]
            if len(found) != 1 or sha256_of(found[0]) != package.sha256:
                raise LabError(
                    f"fetching packages: what arrived as {package.name} {package.version} is not what the signed index "
                    f"of {suite} describes; it was discarded: try again"
                )
            found[0].rename(folder / package.file)

    def _known(self, suite: str) -> dict[str, Package]:
        record = self._folder(suite) / "packages.json"
        try:
            rows = json.loads(record.read_text())
            return {row["name"]: Package(**{**row, "depends": tuple(row["depends"])}) for row in rows}
        except FileNotFoundError:
            return {}
        except (ValueError, TypeError, KeyError):
            self.progress(f"{record} is broken: asking the package source again")
            record.unlink()
            return {}

    def _record(self, suite: str, known: dict[str, Package]) -> None:
        record = self._folder(suite) / "packages.json"
        temporary = record.with_suffix(".tmp")
        temporary.write_text(json.dumps([asdict(package) for package in known.values()], indent=1))
        temporary.rename(record)

    def _ask(self, suite: str, names: list[str]) -> dict[str, Package]:
        self._update(suite)
        shown = self._run(suite, "apt-cache", "show", "--no-all-versions", *names)
        found = parse_records(shown.stdout)
        missing = next((name for name in names if name not in found), None)
        if missing is None and not shown.returncode:
            return {name: found[name] for name in names}
        errors = [line for line in shown.stderr.splitlines() if line.startswith("E:")]
        # Status 0 without any record means a name that other packages provide: it is not known to be gone.
        if missing and (errors == _NONE_OF_THEM if shown.returncode else found):
            raise PackageGone(
                f"packages: the index of {suite} has no {missing}: the suite may have dropped it; "
                "xencrash lab fetch --refresh asks again"
            )
        said = " ".join((errors or shown.stderr.splitlines() or ["it printed no record and no reason"])[-1].split())
        raise LabError(
            f"packages: apt-cache show {' '.join(names)} failed with status {shown.returncode}: {said}; "
            "check the disk and the memory, then try again"
        )

    def _update(self, suite: str) -> None:
        """Fetch the suite's signed index, once in the life of a cache (or of a refresh)."""
        folder = self._folder(suite)
        marker = folder / "updated"
        if marker.exists():
            return
        row = SUITES[suite]
        for name in ("state", "lists/partial", "cache"):
            (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / "status").touch()
        keyring = KEYRING if KEYRING.exists() else None
        (folder / "sources.list").write_text(sources_list(row, machine_mirrors(), keyring))
        self.progress(f"fetching the package index of {suite}")
        self._fresh.add(suite)
        self._apt(suite, "apt-get", "update", "--error-on=any", step=f"fetching the package index of {suite}")
        marker.touch()

    def _apt(self, suite: str, *command: str, step: str, cwd: Path | None = None) -> str:
        done = self._run(suite, *command, cwd=cwd)
        if done.returncode:
            raise apt_failure(step, suite, done.stdout + done.stderr)
        return done.stdout

    def _run(self, suite: str, *command: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
        folder = self._folder(suite)
        options = {
            "Dir::Etc::SourceList": folder / "sources.list",
            "Dir::Etc::SourceParts": "/dev/null",
            "Dir::Etc::Preferences": "/dev/null",
            "Dir::Etc::PreferencesParts": "/dev/null",
            "Dir::State": folder / "state",
            "Dir::State::Lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder / "cache",
            "APT::Architecture": "amd64",
            "APT::Default-Release": SUITES[suite].default_release or "",
            "APT::Sandbox::User": "",
            "Acquire::Languages": "none",
            "Acquire::Retries": "3",
        }
        arguments = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
        return _call([command[0], "-q", *arguments, *command[1:]], cwd)

    def _folder(self, suite: str) -> Path:
        return self.root / "suites" / suite


def apt_failure(step: str, suite: str, output: str) -> LabError:
    """The error in apt's output: the source no longer has it, or something else went wrong."""
    reasons = [line for line in output.splitlines() if line.startswith(("E:", "Err:", "W:"))] or output.splitlines()
    reason = " ".join((reasons or ["apt said nothing"])[-1].split())
    if gone := _GONE.search(output):
        return PackageGone(f"{step}: the source of {suite} answered {' '.join(gone[0].split())}: {reason}")
    return LabError(f"{step}: {reason}; check the network and the machine's apt configuration, then try again")


def machine_mirrors() -> dict[str, str]:
    """Debian's mirrors in the machine's own apt configuration, by the label of their Release files."""
    wanted = ("--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)", "Created-By: Packages")
    return parse_mirrors(_call(["apt-get", "indextargets", *wanted], None).stdout)


def _call(command: list[str], cwd: Path | None) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | {"LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
    except FileNotFoundError as error:
        raise LabError(f"packages: {command[0]} is missing: the lab needs a Debian with apt") from error
