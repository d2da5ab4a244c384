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
        package = module.replace("_", "-").replace(".", "-")
        raise ModuleNotFoundError(
            f"{caller} needs the package {package}, which is not installed. "
            f"Install it with pip install 'fax-jax[{name}]'.",
            name=module,
        ) from error
