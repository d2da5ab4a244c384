"""The parameters of a `federated_map`, and functions to make and bind one."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Primitive, Var
from jax.extend.core.primitives import conv_general_dilated_p, select_and_scatter_add_p

from fax._placement import Placement
from fax.primitives import _jaxpr
from fax.primitives._jaxpr import Atom
from fax.sharding._types import placed_aval, row_aval

federated_map_p = Primitive("federated_map")
federated_map_p.multiple_results = True

# How convolutions are computed.
CONVOLUTIONS = ("auto", "xla", "matmul")


class Vectorize(enum.Enum):
    """How many participants a device works on at once, for fax's own maps that have no number.

    Such a map runs like the map that it is fused with. Alone it runs

      ALL        for all participants at once: the few element-wise operations of an operator.
      INHERITED  like users' maps by default: what aggregators do with every update.
    """

    ALL = "all"
    INHERITED = "inherited"

    def __str__(self) -> str:
        return self.value


@dataclasses.dataclass(frozen=True)
class AtMost:
    """At most so many participants at once, and otherwise what is best for the device."""

    number: int

    def __str__(self) -> str:
        return f"at most {self.number}"


class In(NamedTuple):
    """The mode of an input, and whether it is the tangent or cotangent of another value."""

    mode: str
    tangent: bool = False

    def __str__(self) -> str:
        return f"d {self.mode}" if self.tangent else self.mode


SERVER, PLACED = In("server"), In("placed")


class Out(NamedTuple):
    """The mode of an output and, if it is masked, which of the masks applies to it."""

    mode: str
    mask: int | None = None

    def __str__(self) -> str:
        return self.mode if self.mask is None else f"{self.mode} where {self.mask}"


class Modes(tuple):
    """A tuple that a printed jaxpr shows without quotation marks."""

    def __repr__(self) -> str:
        return f"({', '.join(map(str, self))})"


class Contribution(NamedTuple):
    """What a participant adds to an output: variables of the client function's jaxpr."""

    value: Atom
    mode: str
    mask: Atom | None = None


@dataclasses.dataclass(frozen=True)
class Round:
    """The parameters of one `federated_map`.

    Attributes:
      group: the participants.
      vectorize: how many participants a device works on at once: a number, None for the
        device's default, an `AtMost` to bound that, or a `Vectorize`, for fax's own maps.
      inputs: an `In` for each operand.
      outputs: an `Out` for each result.
      jaxpr: the client function, from one participant's view of the operands to its
        contributions to the results, followed by the masks, which are scalar bools.
      convolutions: how convolutions are computed, one of `CONVOLUTIONS`. A printed equation shows
        it if it is not ``"auto"``.
    """

    group: Placement
    vectorize: int | AtMost | Vectorize | None
    inputs: tuple[In, ...]
    outputs: tuple[Out, ...]
    jaxpr: ClosedJaxpr
    convolutions: str = "auto"

    @staticmethod
    def of(params: dict[str, Any]) -> Round:
        return Round(
            Placement.of(params),
            params["vectorize"],
            params["in"],
            params["out"],
            params["jaxpr"],
            params.get("convolutions", "auto"),
        )

    @property
    def params(self) -> dict[str, Any]:
        modes = {"in": Modes(self.inputs), "out": Modes(self.outputs)}
        chosen = {} if self.convolutions == "auto" else dict(convolutions=self.convolutions)
        run = dict(vectorize=self.vectorize, jaxpr=self.jaxpr) | chosen
        return self.group.params | run | modes

    def bind(self, *operands: Any) -> list[Any]:
        return federated_map_p.bind(*operands, **self.params)

    def replace(self, **changes: Any) -> Round:
        return dataclasses.replace(self, **changes)

    @property
    def value_avals(self) -> list[ShapedArray]:
        """The types of one participant's contributions, without masks."""
        return self.jaxpr.out_avals[: len(self.outputs)]

    @property
    def result_avals(self) -> list[ShapedArray]:
        """The types of the results, on the mesh in scope."""
        return [
            placed_aval(aval, self.group) if out.mode == "placed" else aval
            for out, aval in zip(self.outputs, self.value_avals, strict=True)
        ]

    @property
    def mask_count(self) -> int:
        return len(self.jaxpr.out_avals) - len(self.outputs)

    @property
    def is_mask(self) -> list[bool]:
        """Which outputs of the client function are masks."""
        return [False] * len(self.outputs) + [True] * self.mask_count

    def contributions(self, outvars: Sequence[Atom] | None = None) -> list[Contribution]:
        """What a participant contributes, in the jaxpr's output variables or in ``outvars``."""
        outvars = self.jaxpr.jaxpr.outvars if outvars is None else outvars
        masks = outvars[len(self.outputs) :]
        return [
            Contribution(value, out.mode, None if out.mask is None else masks[out.mask])
            for value, out in zip(outvars, self.outputs, strict=False)
        ]

    def assemble(
        self,
        inputs: Iterable[In],
        invars: Iterable[Var],
        contributions: Iterable[Contribution],
        eqns: Iterable[JaxprEqn],
    ) -> Round:
        """This round with another client function."""
        parts = list(contributions)
        masks = {id(part.mask): part.mask for part in parts if part.mask is not None}
        numbers = {key: number for number, key in enumerate(masks)}
        outputs = tuple(Out(part.mode, numbers.get(id(part.mask))) for part in parts)
        outvars = [*(part.value for part in parts), *masks.values()]
        jaxpr = _jaxpr.rebuild(self.jaxpr, invars, outvars, eqns)
        return self.replace(inputs=tuple(inputs), outputs=outputs, jaxpr=jaxpr)

    def masks(self, rows: Sequence[Any]) -> list[Any]:
        """One participant's masks, computed again, without effects that they do not need.

        Rows on which they do not depend can be anything.
        """
        count = len(self.outputs)
        numbers = range(count, count + self.mask_count)
        _, (jaxpr, used) = _jaxpr.parts(self.jaxpr, [[], numbers])  # effects are in the first
        return _jaxpr.evaluate(jaxpr, *(rows[i] for i in used))

    def keep(self, wanted: Sequence[bool]) -> tuple[Round, list[bool]]:
        """Drops outputs, and returns which operands the others need."""
        inner = self.jaxpr.jaxpr
        kept = self.assemble(
            self.inputs, inner.invars, pick(wanted, self.contributions()), inner.eqns
        )
        jaxpr, used = _jaxpr.prune(kept.jaxpr, [True] * len(kept.jaxpr.out_avals))
        return kept.replace(inputs=tuple(pick(used, self.inputs)), jaxpr=jaxpr), used

    def bind_pruned(self, operands: Sequence[Any]) -> list[Any]:
        """Binds the round without the operands and equations that no output needs."""
        kept, used = self.keep([True] * len(self.outputs))
        if not kept.outputs and not kept.jaxpr.effects:
            return []
        return kept.bind(*pick(used, operands))


def bind_traced(fn: Callable, operands: Sequence[Any], like: Round) -> list[Any]:
    """Binds ``like`` with the jaxpr of ``fn``, a function of what one participant sees."""
    jaxpr, consts = _jaxpr.trace(fn, seen_avals(operands, like.inputs))
    this = like.replace(inputs=(SERVER,) * len(consts) + tuple(like.inputs), jaxpr=jaxpr)
    return this.bind_pruned([*consts, *operands])


def map_elementwise(
    fn: Callable[..., Sequence[jax.Array]],
    operands: Sequence[Any],
    inputs: Sequence[In],
    outputs: Sequence[Out],
    group: Placement,
) -> list[Any]:
    """Maps a few element-wise operations; the map fuses with any other."""
    like = Round(group, Vectorize.ALL, tuple(inputs), tuple(outputs), _jaxpr.empty())
    return bind_traced(fn, operands, like)


def seen_avals(operands: Sequence[Any], inputs: Sequence[In]) -> list[ShapedArray]:
    """The types of operands as one participant sees them."""
    avals = map(jax.typeof, operands)
    return [row_aval(a) if i.mode == "placed" else a for a, i in zip(avals, inputs, strict=True)]


def select(mask: jax.Array, value: jax.Array, otherwise: Any = 0) -> jax.Array:
    """A participant's value where its mask is true."""
    return lax.select(mask, value, lax.full_like(value, otherwise))


def pick(which: Iterable[bool], items: Iterable[Any]) -> list[Any]:
    return [item for item, wanted in zip(items, which, strict=True) if wanted]


def expand(which: Iterable[bool], items: Iterable[Any]) -> list[Any]:
    """The items at the marked places, and None at the others."""
    rest = iter(items)
    return [next(rest) if wanted else None for wanted in which]


def is_convolution(eqn: JaxprEqn) -> bool:
    """Whether the setting for convolutions applies to an equation. It includes max pooling."""
    return eqn.primitive in (conv_general_dilated_p, select_and_scatter_add_p)


def has_convolutions(jaxpr: ClosedJaxpr | Jaxpr) -> bool:
    """Whether there are convolutions, at any depth. Nested maps have their own settings."""
    return _jaxpr.any_equation(
        jaxpr, is_convolution, inside=lambda eqn: eqn.primitive is not federated_map_p
    )
