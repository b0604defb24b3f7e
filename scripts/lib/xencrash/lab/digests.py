"""Digests of files, each computed once in a process until the file is written to."""

from __future__ import annotations

import functools
import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path

from xencrash.lab.sparse import blocks

_RECENT = 2.0  # seconds within which a file's times may not show another write


def sha256_of(path: Path) -> str:
    """The SHA-256 of the content."""
    return _known(_sha256, path)


def sparse_digest(path: Path) -> str:
    """A SHA-256 of the blocks that are not all zeros, with their offsets: fast for a file that is mostly holes."""
    return _known(_sparse, path)


def _known(digest: Callable[[Path], str], path: Path) -> str:
    found = path.stat()
    if time.time() - found.st_ctime < _RECENT:
        return digest(path)
    return _made(digest, path, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@functools.cache
def _made(digest: Callable[[Path], str], path: Path, identity: tuple[int, ...]) -> str:
    return digest(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sparse(path: Path) -> str:
    with path.open("rb") as stream:
        digest = hashlib.sha256(os.fstat(stream.fileno()).st_size.to_bytes(8, "little"))
        for at, block in blocks(stream.fileno()):
            digest.update(at.to_bytes(8, "little"))
            digest.update(block)
    return digest.hexdigest()
