"""What decides how many participants a device should work on at once: the size of one of them.

It is read from the client function's jaxpr. Only values that differ between participants count,
because only these are multiplied when participants are vectorized.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from jax.core import ShapedArray
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Var, jaxprs_in_params
from jax.extend.core.primitives import (
    conv_general_dilated_p,
    dot_general_p,
    scan_p,
    while_p,
)

from fax import _compat
from fax.primitives._jaxpr import opened
from fax.primitives._round import Round


@dataclasses.dataclass
class ClientCost:
    """The size of a client function, for one participant.

    Attributes:
      state: the bytes that its largest loop carries from step to step or, if these are more, the
        bytes of its results. In local training this is the model with the optimizer's state.
      numbers: how many numbers these are.
      products: how many matrix products each step of that loop computes, those of inner loops
        included. For a loop of unknown length, those of one step.
      temporary: the bytes of all intermediate results of one step: more than it needs at a time.
      images: the bytes of the results of convolutions whose kernels differ between participants.
    """

    state: int = 0
    numbers: int = 0
    products: int = 0
    temporary: int = 0
    images: int = 0

    @staticmethod
    def of(this: Round) -> ClientCost:
        cost = ClientCost()
        varies = [i.mode == "placed" for i in this.inputs]
        outs, products = cost._visit(this.jaxpr, varies)
        values = zip(this.value_avals, outs, strict=False)
        cost._carry([aval for aval, v in values if v], products)
        return cost

    def _carry(self, avals: Sequence[Any], products: int) -> None:
        state = sum(map(_bytes, avals))
        if state > self.state:
            self.state, self.products = state, products
            self.numbers = sum(math.prod(aval.shape) for aval in avals)

    def _visit(self, jaxpr: ClosedJaxpr | Jaxpr, varies: Sequence[bool]) -> tuple[list[bool], int]:
        """Which outputs differ between participants, and how many matrix products there are."""
        inner = opened(jaxpr)
        known = dict(zip(inner.invars, varies, strict=True))
        made = total = 0

        def differs(atom: Any) -> bool:
            return isinstance(atom, Var) and known.get(atom, False)

        for eqn in inner.eqns:
            flags = list(map(differs, eqn.invars))
            total += self._equation(eqn, flags)
            known.update(dict.fromkeys(eqn.outvars, any(flags)))
            if any(flags):
                made += sum(_bytes(var.aval) for var in eqn.outvars)
        self.temporary = max(self.temporary, made)
        return list(map(differs, inner.outvars)), total

    def _equation(self, eqn: JaxprEqn, flags: list[bool]) -> int:
        """How many matrix products an equation computes."""
        if eqn.primitive is dot_general_p:
            return 1
        if eqn.primitive is conv_general_dilated_p:
            if all(flags):
                self.images += _bytes(eqn.outvars[0].aval)
            return 1
        if eqn.primitive is scan_p:
            fixed, carried = _compat.scan_sizes(eqn)
            return eqn.params["length"] * self._loop(eqn, "jaxpr", flags, fixed, carried)
        if eqn.primitive is while_p:
            skipped, fixed = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
            carried = len(flags) - skipped - fixed
            return self._loop(eqn, "body_jaxpr", flags[skipped:], fixed, carried)
        products = 0
        for jaxpr in jaxprs_in_params(eqn.params):
            count = len(opened(jaxpr).invars)
            # The first operand of a branch says which one it is.
            own = flags[-count:] if count and count <= len(flags) else [any(flags)] * count
            products = max(products, self._visit(jaxpr, own)[1])
        return products

    def _loop(self, eqn: JaxprEqn, name: str, flags: list[bool], fixed: int, carried: int) -> int:
        """How many matrix products a step of a loop computes.

        What a loop carries counts as different as soon as any of its operands is.
        """
        inside = [*flags[:fixed], *[any(flags)] * carried, *flags[fixed + carried :]]
        _, products = self._visit(eqn.params[name], inside)
        if any(flags):
            self._carry([var.aval for var in eqn.outvars[:carried]], products)
        return products


def _bytes(aval: Any) -> int:
    if not isinstance(aval, ShapedArray):
        return 0
    return math.prod(aval.shape) * getattr(aval.dtype, "itemsize", 0)
