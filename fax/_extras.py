"""Optional packages, and the extras of fax that install them."""

from __future__ import annotations

import importlib


def require(caller: str, module: str, name: str) -> None:
    """Imports an optional package. If it is missing, the error names fax's extra to install."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name not in (module, module.partition(".")[0]):
            raise
        raise missing(caller, module, name) from error


def missing(caller: str, module: str, name: str) -> ModuleNotFoundError:
    """The error for an optional package that is missing, which names fax's extra to install."""
    package = module.replace("_", "-").replace(".", "-")
    return ModuleNotFoundError(
        f"{caller} needs the package {package}, which is not installed. "
        f"Install it with pip install 'fax-jax[{name}]'.",
        name=module,
    )
