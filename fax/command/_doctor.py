"""``fax doctor``: what fax finds on this machine."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import sys

import fax

_SHOWN = ("jax", "jaxlib", "numpy", "optax", "flax", "orbax-checkpoint", "libtpu")
# The extras of users, and not those of fax's own tests and benchmarks.
_EXTRAS = ("algorithms", "models", "tasks", "privacy", "deploy", "experiment", "tpu")


def command(args: argparse.Namespace) -> int:
    """Prints what is installed, and what is missing."""
    print(f"fax {fax.__version__}, Python {platform.python_version()} at {sys.executable}")
    for name in _SHOWN:
        print(f"  {name:18}{_version(name) or 'not installed'}")
    _devices()
    _caches()
    try:
        required = importlib.metadata.requires("fax-jax") or []
    except importlib.metadata.PackageNotFoundError:
        print("fax itself is not installed: run pip install '.[experiment]' in its folder.")
        return 0
    missing = _missing(required)
    print("Missing:" if missing else "Nothing is missing.")
    for extra, packages in missing.items():
        print(f"  {', '.join(packages)}: pip install 'fax-jax[{extra}]'")
    return 0


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _devices() -> None:
    import jax

    try:
        devices = jax.devices()
    except RuntimeError as error:
        print(f"Devices: JAX finds none: {error}")
        return
    kinds = sorted({device.device_kind for device in devices})
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    print(f"Devices: {len(devices)} ({', '.join(kinds)}), {cores} processor cores")
    if jax.default_backend() == "cpu":
        print("  On CPU, fax run makes each core a device of its own.")


def _caches() -> None:
    import jax

    try:
        from fax.tasks._download import cache_folder
    except ModuleNotFoundError:  # what tasks need is listed as missing
        return
    folder = cache_folder()
    size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if folder.exists() else 0
    where = folder
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    print(
        f"Data of tasks: {folder}, {size / 2**30:.2f} GiB, {free / 2**30:.1f} GiB free (FAX_CACHE)"
    )
    compiled = jax.config.jax_compilation_cache_dir
    print(f"Compiled programs: {compiled or 'not kept'} (JAX_COMPILATION_CACHE_DIR)")


def _missing(required: list[str]) -> dict[str, list[str]]:
    """The packages of each extra that are not installed."""
    found: dict[str, list[str]] = {}
    for line in required:
        extra = re.search(r"""extra == ['"](\w+)['"]""", line)
        name = re.split(r"[^\w.-]", line)[0]
        if extra and extra[1] in _EXTRAS and name != "fax-jax" and not _version(name):
            found.setdefault(extra[1], []).append(name)
    return found
