"""A virtual environment for each peer, with pinned versions, created once.

The peers cannot share one: FedJAX needs Python 3.10 and does not work with jax newer than 0.4.30.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import shutil
import subprocess
import sys

ROOT = pathlib.Path(__file__).parent.parent
FOLDER = ROOT / ".venv-bench"
LIMIT = 900  # seconds for an installation


class MissingError(Exception):
    """An environment cannot be created."""


@dataclasses.dataclass(frozen=True)
class Environment:
    """A version of Python, and the packages to install with pip."""

    name: str
    python: str
    requirements: tuple[str, ...]

    @functools.cached_property
    def executable(self) -> pathlib.Path:
        """The environment's Python. Creates the environment if it is missing or outdated."""
        folder = FOLDER / self.name
        executable, stamp = folder / "bin" / "python", folder / "installed"
        wanted = "\n".join([self.python, *self.requirements])
        if "--editable" in self.requirements:
            wanted += (ROOT / "pyproject.toml").read_text()
        if not (stamp.exists() and stamp.read_text() == wanted):
            python = find_python(self.python)
            print(f"setting up {self.name}", flush=True)
            shutil.rmtree(folder, ignore_errors=True)
            run([python, "-m", "venv", str(folder)])
            pip = [str(executable), "-m", "pip", "install", "--quiet"]
            run([*pip, "--disable-pip-version-check", *self.requirements])
            stamp.write_text(wanted)
        return executable


ENVIRONMENTS = {
    environment.name: environment
    for environment in (
        Environment("fax", "3.12", ("--editable", f"{ROOT}[algorithms]", "flax>=0.12.8")),
        Environment(
            "fedjax",
            "3.10",
            ("fedjax==0.0.17", "jax==0.4.30", "jaxlib==0.4.30", "dm-haiku==0.0.12", "numpy<2"),
        ),
        Environment("drjax", "3.12", ("drjax==0.2.1", "jax", "optax")),
        Environment("pfl", "3.11", ("torch==2.13.0", "pfl==0.6.0")),
        Environment("flower", "3.11", ("flwr[simulation]==1.41.0", "jax", "optax", "psutil")),
    )
}


def find_python(version: str) -> str:
    """Finds a Python version on the PATH or in pyenv, and returns its path."""
    for candidate in (sys.executable, f"python{version}", "python3", *from_pyenv(version)):
        code = "import sys; print('%d.%d' % sys.version_info[:2], sys.executable)"
        try:
            done = subprocess.run([candidate, "-c", code], capture_output=True, text=True)
        except OSError:
            continue
        if done.stdout.startswith(version + " "):
            return done.stdout.split(maxsplit=1)[1].strip()
    raise MissingError(f"Python {version} is missing")


def from_pyenv(version: str) -> list[str]:
    if not shutil.which("pyenv"):
        return []
    listed = subprocess.run(["pyenv", "versions", "--bare"], capture_output=True, text=True)
    found = [line for line in listed.stdout.split() if line.rpartition(".")[0] == version]
    found.sort(key=lambda line: int(line.rpartition(".")[2]) if line[-1].isdigit() else -1)
    prefixes = (
        subprocess.run(["pyenv", "prefix", line], capture_output=True, text=True).stdout.strip()
        for line in reversed(found)
    )
    return [f"{prefix}/bin/python" for prefix in prefixes if prefix]


def run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
    except subprocess.TimeoutExpired:
        raise MissingError(f"installation took more than {LIMIT} s") from None
    if done.returncode:
        said = [line for line in (done.stderr or done.stdout).splitlines() if "ERROR" in line]
        raise MissingError(said[0] if said else f"{' '.join(command)} failed")
