"""What decides how many participants a device should work on at once: the size of one of them.

It is read from the client function's jaxpr. Only values that differ between participants count,
because only these are multiplied when participants are vectorized.
"""

from __future__ import annotations

import dataclasses
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
from fax._arithmetic import elements
from fax.primitives._jaxpr import opened
from fax.primitives._round import Round


@dataclasses.dataclass
class ClientCost:
    """The size of a client function, for one participant.

    Attributes:
      state: the bytes that a step of its largest loop works on: what the loop carries from step to
        step, the rows of this step, and what all steps read. If these are more, the bytes of its
        results. In local training this is about the model with the optimizer's state.
      numbers: how many numbers the largest loop carries, or are in its results.
      products: how many matrix products a step of a loop computes, those of inner loops included,
        for the loop that has most. For an inner loop of unknown length, those of one step.
      largest: the bytes of the operands and results of its largest operation.
      temporary: the bytes of all intermediate results of one step: more than it needs at a time.
      images: the bytes of the results of convolutions whose kernels differ between participants.
    """

    state: int = 0
    numbers: int = 0
    products: int = 0
    largest: int = 0
    temporary: int = 0
    images: int = 0

    @staticmethod
    def of(this: Round) -> ClientCost:
        cost = ClientCost()
        varies = [i.mode == "placed" for i in this.inputs]
        outs, products = cost._visit(this.jaxpr, varies)
        values = zip(this.value_avals, outs, strict=False)
        cost._hold([aval for aval, v in values if v], [], 0 if cost.products else products)
        return cost

    def _hold(self, carried: Sequence[Any], read: Sequence[Any], products: int) -> None:
        """Notes what a loop, or the whole function, works on."""
        self.state = max(self.state, sum(map(_bytes, [*carried, *read])))
        self.products = max(self.products, products)
        self.numbers = max(self.numbers, sum(elements(aval.shape) for aval in carried))

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
        inner = list(jaxprs_in_params(eqn.params))
        if not inner and any(flags):
            operands = [atom.aval for atom, flag in zip(eqn.invars, flags, strict=True) if flag]
            size = sum(map(_bytes, [*operands, *(var.aval for var in eqn.outvars)]))
            self.largest = max(self.largest, size)
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
        for jaxpr in inner:
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
            own = [var.aval for var in opened(eqn.params[name]).invars]
            end = fixed + carried
            read = zip([*own[:fixed], *own[end:]], [*flags[:fixed], *flags[end:]], strict=True)
            self._hold(own[fixed:end], [aval for aval, flag in read if flag], products)
        return products


def _bytes(aval: Any) -> int:
    if not isinstance(aval, ShapedArray):
        return 0
    return elements(aval.shape) * getattr(aval.dtype, "itemsize", 0)
