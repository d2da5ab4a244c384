"""Whether a plan's results are right if some clients fail, by the degrees of its values."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from fax.deploy._degrees import ZERO, Degree, alike, equation, need_zero, of_constant, static_error
from fax.deploy._steps import (
    Block,
    Branch,
    OnClients,
    OnServer,
    Pull,
    Scan,
    Send,
    Set,
    Step,
    Take,
    While,
)
from fax.deploy._values import CutError, Value
from fax.primitives import _jaxpr


def check_absence(block: Block) -> None:
    """Checks that results are right without some of the clients.

    Raises:
      CutError: if they may not be. It names the line.
    """
    for own in _Checker().block(block, [ZERO] * len(block.inputs)):
        if own.of == 1 and own.over is not None:
            raise static_error(int(own.over), None)
        if own.of not in (None, 0, 1):
            raise CutError(
                "Without clients that fail, sums over clients are smaller. A result has degree "
                f"{own.of} in them, so it is neither a sum nor a ratio of sums. Use means whose "
                "weights are summed, too."
            )


class _Checker:
    def block(self, block: Block, degrees: Sequence[Degree]) -> list[Degree]:
        """The degrees of a block's results."""
        env = {value: of_constant(x) for value, x in block.constants.items()}
        env.update(zip(block.inputs, map(dataclasses.replace, degrees), strict=True))
        for step in block.steps:
            given = [env[value] for value in step.operands]
            if isinstance(step, OnServer):
                self._server(step, env)
                continue
            env.update(zip(step.results, self._step(step, given), strict=True))
        return [env[value] for value in block.outputs]

    def _step(self, step: Step, given: list[Degree]) -> Sequence[Degree]:
        match step:
            case OnClients():
                return self._stage(step, given)
            case Take() | Pull() | Send():
                return [dataclasses.replace(given[0])]
            case Set():
                return [alike([given[0], given[2]], None)]
            case Branch():
                need_zero(given[:1], "a branch depends on it", None)
                found = [self.block(b, given[1:]) for b in step.branches]
                return [alike(each, None) for each in zip(*found, strict=True)]
            case While():
                one, other = step.reads
                seen, read, carry = given[:one], given[one : one + other], given[one + other :]
                carry = self._stable(carry, lambda now: self.block(step.body, [*read, *now]))
                condition = self.block(step.condition, [*seen, *carry])
                need_zero(condition, "the condition of a loop depends on it", None)
                return carry
            case Scan():
                return self._scan(step, given)
        return [ZERO] * len(step.results)

    def _stage(self, step: OnClients, given: list[Degree]) -> list[Degree]:
        stage = step.stage
        degrees = [dataclasses.replace(x, known=None, clients=None, sent=False) for x in given]
        found: Sequence[Degree] = [ZERO] * len(stage.outputs)
        if any(own.of or own.over for own in degrees):
            found = _jaxpr.interpret(stage.jaxpr, degrees, equation, of_constant)
        return [
            self._sent(step, aval, own) if mode == "sum" else own
            for mode, aval, own in zip(stage.outputs, stage.jaxpr.out_avals, found, strict=True)
        ]

    def _sent(self, step: OnClients, aval: Any, own: Degree) -> Degree:
        if np.issubdtype(aval.dtype, np.unsignedinteger):
            raise CutError(
                f"Stage {step.stage.name!r} sends unsigned integers to be summed, as a masked sum "
                "does. Their masks cancel only if all clients take part. Sum signed integers, as "
                "secure_sum(..., masked=False) does."
            )
        over = own.over if own.over == step.size else None
        clients = None if own.of else step.size
        return Degree(1 + (own.of or Fraction(0)), clients=clients, sent=True, over=over)

    def _scan(self, step: Scan, given: list[Degree]) -> list[Degree]:
        read = given[: step.reads]
        carry = given[step.reads : step.reads + step.carries]
        now = given[step.reads + step.carries :]
        stacked: list[Degree] = []

        def once(carried: list[Degree]) -> list[Degree]:
            found = self.block(step.body, [*read, *carried, *now])
            stacked[:] = found[step.carries :]
            return found[: step.carries]

        return [*self._stable(carry, once), *stacked]

    def _stable(self, carry: list[Degree], once: Callable) -> list[Degree]:
        """The degrees of what a loop carries, which are those at its start, or any for zeros."""
        while True:
            pairs = zip(carry, once(carry), strict=True)
            found = [alike([a, dataclasses.replace(b, known=None)], None) for a, b in pairs]
            if found == carry:
                return carry
            carry = found

    def _server(self, step: OnServer, env: dict[Value, Degree]) -> None:
        for part in step.equations:
            given = [env[value] for value in part.operands]
            env.update(zip(part.results, equation(part.eqn, given), strict=True))
