"""Writing files so that a kill leaves the old version or the new one, never half of one."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def _destination(path: str | Path) -> tuple[Path, bool]:
    """What is written for `path`, and whether it is a pipe or a device, which cannot be replaced."""
    path = Path(path)
    if path.exists() and not path.is_file() and not path.is_dir():
        return path, True
    return path.resolve() if path.is_symlink() else path, False


def is_replaceable(path: str | Path) -> bool:
    """Whether `path` can be written again and again, as a pipe or a device cannot."""
    return not _destination(path)[1]


@contextlib.contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary file to write, moved to `path` if no exception ends the context. Missing parent folders are created.

    It lies beside `path` and keeps its suffix, which some writers choose their format by. A symbolic link stays one:
    the file that it names is replaced. What is no file, a pipe or a device, is written to as it is.
    """
    path, as_it_is = _destination(path)
    if as_it_is:
        yield path
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:50]}.{os.getpid()}{path.suffix}")  # names end at 255 bytes
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: str | Path) -> None:
    """Make the folder of a file to be written later; raises OSError if that fails or nothing can be written there."""
    path, as_it_is = _destination(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected the name of a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not (os.access(path, os.W_OK) if as_it_is else os.access(path.parent, os.W_OK | os.X_OK)):
        raise PermissionError(f"{path} cannot be written: permission denied")


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call ``write(temporary)`` and move the result to `path`, see `replacing`."""
    with replacing(path) as temporary:
        write(temporary)


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON, atomically."""
    write_atomically(path, lambda p: p.write_text(json.dumps(content, indent=1) + "\n"))
