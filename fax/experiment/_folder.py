"""The folder of a run: one process group at a time, its settings, and its log."""

from __future__ import annotations

import contextlib
import fnmatch
import logging
import os
import platform
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

from fax._lock import locked
from fax.experiment._tables import read
from fax.experiment._toml import dumps

CONFIG, METRICS, CLIENTS, CHECKPOINTS = "config.toml", "metrics.csv", "clients.csv", "checkpoints"
log = logging.getLogger("fax.experiment")
# It is for the file alone. What users should see is a warning, too.
log.addHandler(logging.NullHandler())
log.setLevel(logging.INFO)
log.propagate = False
_WHERE = "fax.experiment.run"
_PACKAGES = ("fax-jax", "jax", "jaxlib", "numpy", "optax", "orbax-checkpoint")


class FolderInUseError(RuntimeError):
    """Another run is using the folder.

    Example:

      >>> issubclass(fax.experiment.FolderInUseError, RuntimeError)
      True
    """


@contextlib.contextmanager
def opened(folder: Path, unused: Callable[[], bool]) -> Iterator[None]:
    """Makes the folder, and keeps other runs out of it. Messages go to its ``log.txt``.

    The system removes the lock when the process ends, however it ends. If there is an error, a
    folder that was made here is removed again if it is ``unused``.

    Raises:
      FolderInUseError: if another run is using it.
      ValueError: if it has files of something else with the names of a run's files, or a path in
        which orbax cannot write checkpoints, or not read them again.
      OSError: if nothing can be written there.
    """
    path = os.fspath(folder.absolute())
    if not fnmatch.fnmatchcase(path, path) or (os.sep == "/" and "\\" in path):
        raise ValueError(
            f"{_WHERE}: folder={path!r} has brackets or backslashes. orbax would take them for a "
            "pattern, and could not read checkpoints there. Choose another folder."
        )
    if path.encode("utf-8", "replace").decode() != path:
        raise ValueError(
            f"{_WHERE}: folder={path!r} is not UTF-8, so orbax cannot write checkpoints there. "
            "Choose another folder."
        )
    with contextlib.ExitStack() as stack:
        try:
            new = not folder.exists()
            folder.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context(open(folder / ".lock", "a"))
        except OSError as error:
            raise OSError(
                error.errno,
                f"{_WHERE}: nothing can be written to folder ({error.strerror}). Choose another "
                "one, or allow writing there",
                os.fspath(folder),
            ) from error
        try:
            free = locked(lock)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{_WHERE}: no file in folder can be locked ({error.strerror}). Choose a folder on "
                "a disk that supports locks",
                os.fspath(folder),
            ) from error
        if not free:
            raise FolderInUseError(
                f"{_WHERE}: another run is using folder={os.fspath(folder)!r}. Choose another "
                "folder, or wait until it ends."
            )
        others = [name for name in (METRICS, CHECKPOINTS) if (folder / name).exists()]
        if others and not (folder / CONFIG).exists():
            raise ValueError(
                f"{_WHERE}: folder={os.fspath(folder)!r} has {others[0]} but no {CONFIG}, so it "
                "is not the folder of a run. Choose another one."
            )
        handler = logging.FileHandler(folder / "log.txt", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        log.addHandler(handler)
        stack.callback(handler.close)
        stack.callback(log.removeHandler, handler)
        try:
            yield
        except Exception:
            if new and unused():
                shutil.rmtree(folder, ignore_errors=True)
            raise


class Comparison(NamedTuple):
    """How a run compares with that in its folder.

    Attributes:
      text: for ``config.toml``.
      new: whether there is no run in the folder.
      same: whether its settings, versions, devices and programs are the same.
    """

    text: str
    new: bool
    same: bool


def compare(
    folder: Path,
    settings: Mapping[str, Any],
    run: Mapping[str, Any],
    times: Mapping[str, int],
    *,
    force: bool,
) -> Comparison:
    """Compares settings with those in the folder.

    Args:
      folder: of the run.
      settings: the user's settings.
      run: what `run` was called with.
      times: after how many rounds what happens. They may differ.
      force: whether settings may differ.

    Raises:
      ValueError: if settings differ. The message lists the differences.
    """
    new = {**settings, "run": dict(run)}
    clash = {"run", "environment"} & settings.keys()
    if clash:
        raise ValueError(f"{_WHERE}: config has {min(clash)!r}, which {CONFIG} needs. Rename it.")
    now = environment() | {"times": dict(times)}
    text = dumps({**new, "environment": now})
    path = folder / CONFIG
    if not path.exists():
        return Comparison(text, new=True, same=False)
    old = read(path)
    before = old.pop("environment", {})
    changes = _changes(flat(old), flat(tomllib.loads(dumps(new))))
    if changes and not force:
        raise ValueError(
            f"{_WHERE}: folder={os.fspath(folder)!r} has a run with other settings:\n  "
            + "\n  ".join(changes)
            + "\nChoose another folder, undo the changes, or pass force=True to continue with them."
        )
    for change in changes:
        log.warning("a setting has changed: %s", change)
    # Rounds in one program are rounded differently than each by itself.
    blocks = ("times",) if times["rounds_per_call"] > 1 else ()
    parts = ("versions", "devices", *blocks)
    unchanged = all(before.get(part) == now[part] for part in parts)
    return Comparison(text, new=False, same=unchanged and not changes)


def flat(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a table and of the tables in it, by path."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        own = (
            flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
        )
        found |= own
    return found


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """A line for each setting that differs. More rounds are no change: they continue a run."""
    names = [
        name
        for name in sorted({**old, **new})
        # As text, NaN is the same as NaN.
        if old.get(name) != new.get(name) and repr(old.get(name)) != repr(new.get(name))
    ]
    planned, now = old.get("rounds", 0), new.get("rounds", 0)
    if isinstance(planned, int) and isinstance(now, int) and planned < now:
        names.remove("rounds")

    def shown(table: Mapping[str, Any], name: str) -> str:
        return repr(table[name]) if name in table else "not set"

    return [f"{name} was {shown(old, name)}, and is {shown(new, name)}" for name in names]


def environment() -> dict[str, Any]:
    """The versions, the devices, and the commit of the working directory, if it has one."""
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    devices = jax.devices()
    found: dict[str, Any] = {
        "command": " ".join(sys.argv),
        "versions": versions,
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
            "mesh": {name: int(n) for name, n in jax.sharding.get_mesh().shape.items()},
        },
    }
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        done = subprocess.run(commit, capture_output=True, text=True, timeout=10, check=True)
        found["commit"] = done.stdout.strip()
    return found
