"""Stages: what each client computes in one step of a plan."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import re
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import export
from jax.core import ShapedArray
from jax.extend import mlir
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.extend.mlir import ir
from jax.extend.mlir.dialects import stablehlo
from jax.interpreters.mlir import make_ir_context

from fax.deploy._values import CutError, OfThisProcess, differs
from fax.primitives import _jaxpr
from fax.primitives._compile_key import Structure

PLATFORMS = ("cpu", "cuda", "tpu")
_STABLEHLO = (1, 17, 0)  # what jax 0.10.2 reads, the oldest version that fax supports


@dataclasses.dataclass(frozen=True, eq=False)
class Stage(OfThisProcess):
    """A function of what one client has and receives.

    Attributes:
      name: differs between the stages of a plan.
      jaxpr: the function.
      inputs: for each operand ``server``, the same for all clients, or ``placed``, its own row.
      outputs: for each result ``placed``, which stays with the client, or how the server combines
        what clients send: ``sum``, ``max`` or ``min``.
    """

    name: str
    jaxpr: ClosedJaxpr
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    _artifacts: dict[tuple[str, ...], tuple[str, bytes]] = dataclasses.field(
        default_factory=dict, init=False, repr=False
    )

    _instead = "exported() gives the bytes of a function that runs with JAX alone."

    @functools.cached_property
    def run(self) -> Any:
        """The jitted function. It returns a list."""
        if any(map(differs, self.jaxpr.in_avals)):
            return jax.jit(self._export([jax.default_backend()]).call)
        return jax.jit(self._evaluate)

    def _evaluate(self, *operands: Any) -> list[Any]:
        return _jaxpr.evaluate(self.jaxpr, *operands)

    def _export(self, platforms: Sequence[str]) -> export.Exported:
        types = [jax.ShapeDtypeStruct(aval.shape, aval.dtype) for aval in self.jaxpr.in_avals]
        return export.export(jax.jit(self._evaluate), platforms=tuple(platforms))(*types)

    @property
    def sent(self) -> list[tuple[tuple[int, ...], Any]]:
        """The shape and dtype of each result that clients send."""
        outputs = zip(self.jaxpr.out_avals, self.outputs, strict=True)
        return [(aval.shape, aval.dtype) for aval, mode in outputs if mode != "placed"]

    @functools.cached_property
    def digest(self) -> str:
        """A hash of what it computes, the same whenever it is traced again."""
        text = f"{self.inputs} {self.outputs} {self.jaxpr}"
        text = re.sub(r"0x[0-9a-f]+", "", text)  # addresses of functions
        found = hashlib.sha256(text.encode())
        for value in _constants(self.jaxpr):  # of which the text has no more than types
            x = np.asarray(value)
            found.update(f"{x.dtype} {x.shape} ".encode() + x.tobytes())
        return found.hexdigest()

    def exported(self, platforms: Sequence[str] = PLATFORMS) -> bytes:
        """The function in StableHLO, which runs with JAX alone, as `jax.export` serializes it."""
        return self.artifact(platforms)[1]

    def artifact(self, platforms: Sequence[str]) -> tuple[str, bytes]:
        """The SHA-256 hash of the exported function, by which clients know it, and the function."""
        key = tuple(platforms)
        if key not in self._artifacts:
            blob = bytes(_for_all_versions(self._export(key)).serialize())
            self._artifacts[key] = hashlib.sha256(blob).hexdigest(), blob
        return self._artifacts[key]


def _constants(jaxpr: ClosedJaxpr | Jaxpr) -> Iterator[Any]:
    """The arrays that a jaxpr or one inside it, as of a jitted function, has closed over."""
    for value in getattr(jaxpr, "consts", ()):
        is_key = jax.dtypes.issubdtype(getattr(value, "dtype", None), jax.dtypes.prng_key)
        yield jax.random.key_data(value) if is_key else value
    inside: list[ClosedJaxpr | Jaxpr] = []  # with their constants, which JAX's own function drops

    def note(inner: ClosedJaxpr | Jaxpr) -> ClosedJaxpr | Jaxpr:
        inside.append(inner)
        return inner

    for eqn in _jaxpr.opened(jaxpr).eqns:
        _jaxpr.map_jaxprs(note, eqn)
    for inner in inside:
        yield from _constants(inner)


def _for_all_versions(exported: export.Exported) -> export.Exported:
    """The same, in a format that all supported versions of JAX can load.

    JAX writes the format of some weeks ago, which older versions refuse. If a program cannot be
    written in their format, it is returned as it is.
    """
    recent = stablehlo.get_version_from_compatibility_requirement(
        stablehlo.StablehloCompatibilityRequirement.WEEK_4
    )
    if tuple(map(int, recent.split("."))) <= _STABLEHLO:
        return exported
    version = ".".join(map(str, _STABLEHLO))
    with make_ir_context():
        module = ir.Module.parse(exported.mlir_module())
        try:
            written = mlir.serialize_portable_artifact(module, version, True)
        except (RuntimeError, ValueError):
            return exported
    return dataclasses.replace(exported, mlir_module_serialized=written)


class Stages:
    """The stages of a plan. Functions that compute the same are one stage."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Stage] = {}

    def of(
        self,
        what: str,
        fn: Callable[..., Sequence[Any]],
        avals: Sequence[ShapedArray],
        inputs: Sequence[str],
        outputs: Sequence[str],
    ) -> Stage:
        """The stage of a function of one client's operands, whose types are ``avals``."""
        jaxpr, consts = _jaxpr.trace(lambda *xs: list(fn(*xs)), avals)
        if consts:
            raise CutError(f"{what} closes over arrays; pass them as arguments.")
        if jaxpr.effects:
            raise CutError(
                f"{what} has effects, such as a callback or printing, which clients cannot carry "
                "out for the server. Remove them, for example jax.debug.print."
            )
        return self._known_as(what, jaxpr, tuple(inputs), tuple(outputs))

    def keep(self, stage: Stage, wanted: Sequence[bool]) -> tuple[Stage, list[bool]]:
        """A stage with only some of its results, and which of the operands it needs."""
        jaxpr, used = _jaxpr.prune(stage.jaxpr, wanted)
        inputs = itertools.compress(stage.inputs, used)
        outputs = itertools.compress(stage.outputs, wanted)
        what = stage.name.rpartition(" ")[0]
        return self._known_as(what, jaxpr, tuple(inputs), tuple(outputs)), used

    def _known_as(
        self, what: str, jaxpr: ClosedJaxpr, inputs: tuple[str, ...], outputs: tuple[str, ...]
    ) -> Stage:
        key = (Structure(jaxpr), tuple(jaxpr.in_avals), inputs, outputs)
        name = f"{what} {len(self._known) + 1}"
        return self._known.setdefault(key, Stage(name, jaxpr, inputs, outputs))
