"""Data sets that need no download: scikit-learn's digits, and Python's standard library."""

from __future__ import annotations

import string
import sys
import sysconfig
from pathlib import Path

import numpy as np

import fax.data
from fax import _extras
from fax.data import DataError, FederatedData
from fax.tasks._tokens import Characters

Split = tuple[FederatedData, FederatedData]

PYTHON_CHARACTERS = Characters(
    (string.digits + string.ascii_letters + string.punctuation + " \n\t").encode()
)
_HELD_OUT = 32  # sequences of a module, at most
# Modules that some distributions leave out, or put into separate packages.
_LEFT_OUT = {
    *("distutils", "ensurepip", "idlelib", "lib2to3", "test", "tkinter", "turtle", "turtledemo")
}


def digits(clients: int, alpha: float, seed: int) -> Split:
    """1,797 images of 8 x 8 pixels, of which a fifth, stratified by digit, is held out.

    The rest is divided in Dirichlet proportions of the digits. The test data are one client.
    """
    _extras.require("fax.tasks.load('digits')", "sklearn", "tasks")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    arrays = {"x": (images / 16).astype(np.float32), "y": labels.astype(np.int32)}
    order = np.arange(len(labels))
    ours, out = train_test_split(order, test_size=0.2, stratify=labels, random_state=seed)
    train = fax.data.partition.dirichlet(
        {name: x[ours] for name, x in arrays.items()}, clients, alpha=alpha, seed=seed
    )
    return train, fax.data.InMemory({"held out": {name: x[out] for name, x in arrays.items()}})


def pystdlib(length: int) -> Split:
    """The source of Python's standard library: a client for each top-level module.

    The last tenth of a module, but at most 32 sequences, is held out. Modules of a single sequence
    are left out. The data depend only on the version of Python.
    """
    train, test = {}, {}
    for name, texts in _modules().items():
        sequences = PYTHON_CHARACTERS.sequences(texts, length)
        count = len(sequences["x"])
        if count > 1:
            last = count - min(max(count // 10, 1), _HELD_OUT)
            train[name] = {feature: x[:last] for feature, x in sequences.items()}
            test[name] = {feature: x[last:] for feature, x in sequences.items()}
    return fax.data.InMemory(train), fax.data.InMemory(test)


def _modules() -> dict[str, list[bytes]]:
    """The texts of each module's files, without its tests."""
    library, modules = Path(sysconfig.get_path("stdlib")), {}
    for name in sorted(sys.stdlib_module_names - _LEFT_OUT):
        folder = library / name
        within = [
            path
            for path in sorted(folder.rglob("*.py"), key=lambda path: path.parts)
            if not {"test", "tests"} & {*path.relative_to(folder).parts[:-1]}
        ]
        paths = [path for path in (library / f"{name}.py", *within) if path.is_file()]
        if paths:
            modules[name] = [path.read_bytes().replace(b"\r\n", b"\n") for path in paths]
    if len(modules) < 50:
        raise DataError(
            f"fax.tasks: {library} has the source of {len(modules)} modules of Python's standard "
            "library, expected more than 100. This Python has none of it. Use another one."
        )
    return modules
