"""Divides a jaxpr into steps of the server and of the clients.

A value is held if it is a client's data, or if clients made it. Equations on the server's values
stay with the server. Every `federated_map` is a stage that clients run. So is an equation on held
values that treats all rows alike. Loops and branches are repeated and taken by the server, with
blocks of steps inside. Everything else would need the rows themselves at the server.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.extend.core import primitives as p

from fax._arithmetic import accumulator_dtype
from fax._compat import Named
from fax.deploy import _control
from fax.deploy._rows import of_rows, replaces_rows, rows_of_numbers, takes_rows
from fax.deploy._stages import Stages
from fax.deploy._steps import Block, Equation, OnClients, OnServer, Pull, Set, Step, Take
from fax.deploy._values import CutError, Value, aval_of, differs, line_of, row_of
from fax.deploy._values import of_rows as type_of_rows
from fax.primitives import _jaxpr
from fax.primitives._collect import collect_p, distribute_p
from fax.primitives._fusion import is_operator
from fax.primitives._mask import apply_masks
from fax.primitives._reduce import max_p, mean_p, min_p, sum_p
from fax.primitives._round import Round, federated_map_p

_REDUCTIONS = {sum_p: "sum", mean_p: "sum", max_p: "max", min_p: "min"}

_RAGGED = "Leave out ragged=, so that all clients have the same number of steps, with padding."


class Cutter:
    """Makes blocks. All blocks of a plan share their stages.

    Args:
      pull: whether rows may be fetched where the server needs them.
    """

    def __init__(self, pull: bool):
        self.pull = pull
        self.stages = Stages()

    def block(self, jaxpr: ClosedJaxpr, axes: Sequence[int | None]) -> Block:
        """The steps of a jaxpr, if the rows of its operands are along these axes."""
        inputs = list(map(Value, jaxpr.in_avals, axes))
        return Writer(self).write(jaxpr, inputs)


class Writer:
    """Writes the steps of one block."""

    def __init__(self, cutter: Cutter):
        self.cutter = cutter
        self.steps: list[Step] = []
        self.constants: dict[Value, Any] = {}

    def write(self, jaxpr: ClosedJaxpr, inputs: list[Value]) -> Block:
        outputs = self._interpret(jaxpr, inputs)
        return self.block(inputs, outputs)

    def block(self, inputs: list[Value], outputs: list[Value]) -> Block:
        return Block(inputs, self._only_needed(outputs), outputs, self.constants)

    def _interpret(self, jaxpr: ClosedJaxpr, operands: Sequence[Value]) -> list[Value]:
        return _jaxpr.interpret(jaxpr, operands, self.equation, self._constant)

    def _constant(self, value: Any) -> Value:
        known = Value(jax.typeof(value))
        self.constants[known] = value
        return known

    def equation(self, eqn: JaxprEqn, operands: list[Value]) -> Sequence[Value]:
        """Adds steps for an equation, and returns its results."""
        if eqn.primitive is federated_map_p:
            return self._map(eqn, operands)
        if eqn.primitive.name == Named.OPTIMIZATION_BARRIER:
            return operands  # stages are compiled by themselves
        inside = _jaxpr.any_inside(eqn, is_operator)
        held = any(value.held for value in operands)
        if not held and not inside and eqn.primitive is not distribute_p:
            return self.on_server(functools.partial(_jaxpr.bind, eqn), operands, eqn.outvars, eqn)
        called = _jaxpr.called(eqn)
        if called is not None:
            return self._interpret(called, operands)
        if eqn.primitive in _control.RULES:
            return _control.RULES[eqn.primitive](self, eqn, operands)
        if eqn.primitive in _REDUCTIONS:
            return [self._reduce(eqn, operands[0])]
        if eqn.primitive is distribute_p:
            return operands
        if eqn.primitive is collect_p:
            return [self.pulled(operands[0], eqn)]
        if not held:
            raise CutError(
                f"{eqn.primitive.name} calls operators of fax, at {line_of(eqn)}. In a plan, these "
                "may be in functions, loops, branches and gradients only."
            )
        found = self._renamed(eqn, operands) or self._on_rows(eqn, operands)
        if found is None:
            operands = [self.pulled(value, eqn) for value in operands]
            return self.equation(eqn, operands)
        return found

    def on_server(
        self,
        fn: Callable,
        operands: Sequence[Value],
        results: Sequence[Any],
        eqn: JaxprEqn,
    ) -> list[Value]:
        """Adds what the server computes, to the last step if that is the server's, too."""
        made = [Value(aval_of(var)) for var in results]
        if eqn.primitive.name == Named.DIMENSION or any(differs(x.aval) for x in made):
            raise CutError(
                f"The server uses a number of steps, which differs between clients, at "
                f"{line_of(eqn)}. {_RAGGED}"
            )
        part = Equation(fn, tuple(operands), tuple(made), eqn)
        last = self.steps[-1] if self.steps else None
        if not isinstance(last, OnServer):
            last = OnServer((), (), [])
            self.steps.append(last)
        last.equations.append(part)
        return made

    def on_clients(
        self,
        what: str,
        fn: Callable,
        operands: Sequence[Value],
        axes: Sequence[int | None],
        results: Sequence[Value],
        modes: Sequence[str],
        size: int,
    ) -> OnClients:
        """A step that runs a function of one client's operands."""
        for value in results:
            if differs(value.aval) and not value.held:
                raise CutError(
                    f"{what} sends {value.aval.str_short()} to be combined, whose size "
                    f"differs between clients. {_RAGGED}"
                )
        avals = [x.aval if a is None else row_of(x.aval, a) for x, a in zip(operands, axes)]
        inputs = ["server" if axis is None else "placed" for axis in axes]
        stage = self.cutter.stages.of(what, fn, avals, inputs, modes)
        return OnClients(tuple(operands), tuple(results), stage, what, size, tuple(axes))

    def pulled(self, value: Value, eqn: JaxprEqn, why: str = "") -> Value:
        """A value at the server."""
        if not value.held:
            return value
        reason = why or f"{eqn.primitive.name} uses the rows of several clients"
        if not self.cutter.pull:
            fix = "Reduce them with an operator, such as fax.sum, fax.mean or fax.max"
            if eqn.primitive is p.scatter_p:  # rows of state that the server has
                fix = "If they are of state that clients should keep, add its name to held="
            raise CutError(
                f"The server would need the rows of {value.aval.str_short()} from all clients: "
                f"{reason}, at {line_of(eqn)}. {fix}, or pass pull=True to let the server fetch "
                "them."
            )
        result = Value(value.aval)
        self.steps.append(Pull((value,), (result,), f"{reason}, at {line_of(eqn)}"))
        return result

    def _map(self, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
        this = Round.of(eqn.params)
        axes: list[int | None] = []
        given = []
        for value, mode in zip(operands, this.inputs, strict=True):
            if mode.mode == "server":
                why = "each client of a map uses the rows of all clients"
                value = self.pulled(value, eqn, why)
            elif value.axis not in (None, 0):
                value = self.moved(value, eqn)
            given.append(value)
            axes.append(0 if mode.mode == "placed" else None)
        results = [
            Value(aval_of(var), 0 if out.mode == "placed" else None)
            for var, out in zip(eqn.outvars, this.outputs, strict=True)
        ]
        step = self.on_clients(
            this.group.name,
            lambda *rows: apply_masks(this, _jaxpr.evaluate(this.jaxpr, *rows)),
            given,
            axes,
            results,
            [out.mode for out in this.outputs],
            this.group.size,
        )
        self.steps.append(step)
        return results

    def moved(self, value: Value, eqn: JaxprEqn) -> Value:
        """A held value whose rows are along axis 0. Only their numbering changes."""
        assert value.axis is not None
        size = value.aval.shape[value.axis]
        result = Value(type_of_rows(row_of(value.aval, value.axis), size, 0), 0)
        step = self.on_clients(
            "rows", lambda row: [row], [value], [value.axis], [result], ["placed"], size
        )
        self.steps.append(step)
        return result

    def _reduce(self, eqn: JaxprEqn, value: Value) -> Value:
        if value.axis != 0:
            value = self.moved(value, eqn)
        size, name = eqn.params["size"], eqn.params["placement"]
        aval = aval_of(eqn.outvars[0])
        if eqn.primitive is mean_p:
            aval = aval.update(dtype=accumulator_dtype(aval.dtype))
        total = Value(aval)
        mode = _REDUCTIONS[eqn.primitive]
        step = self.on_clients(name, lambda row: [row], [value], [0], [total], [mode], size)
        self.steps.append(step)
        if eqn.primitive is not mean_p:
            return total

        def divide(xs: list[Any]) -> list[Any]:
            return [(xs[0] / size).astype(value.aval.dtype)]

        return self.on_server(divide, [total], eqn.outvars, eqn)[0]

    def _renamed(self, eqn: JaxprEqn, operands: list[Value]) -> list[Value] | None:
        """Rows taken or replaced by numbers that the server knows."""
        if eqn.primitive is p.gather_p and takes_rows(eqn, operands):
            axis = rows_of_numbers(operands[1])
            if axis is None:
                return None
            result = Value(aval_of(eqn.outvars[0]), 0)
            clips = eqn.params["mode"] == lax.GatherScatterMode.CLIP
            self.steps.append(Take(tuple(operands), (result,), clips))
            return [result]
        if eqn.primitive is p.scatter_p and replaces_rows(eqn, operands):
            held, numbers, rows = operands
            if not rows.held:  # each goes to the client whose row it replaces
                replaced = Value(rows.aval, 0)
                self.steps.append(Take((held, numbers), (replaced,), True))
                rows = _control.sent(self, rows, 0, replaced)
            result = Value(held.aval, 0)
            self.steps.append(Set((held, numbers, rows), (result,)))
            return [result]
        return None

    def _on_rows(self, eqn: JaxprEqn, operands: list[Value]) -> list[Value] | None:
        """An equation that treats all rows alike."""
        first = next(value for value in operands if value.held)
        assert first.axis is not None
        size = first.aval.shape[first.axis]
        if any(x.axis is not None and x.aval.shape[x.axis] != size for x in operands):
            return None
        found = of_rows(eqn, [value.axis for value in operands], size)
        if found is None:
            return None
        axis = first.axis

        # The server's arrays with that axis are sent row by row, and others as they are.
        def has_rows(x: Value) -> bool:
            return x.aval.ndim == first.aval.ndim and x.aval.shape[axis] == size

        axes = [axis if x.held or has_rows(x) else None for x in operands]
        like = eqn.replace(params=found.params)

        def fn(*rows: Any) -> list[Any]:
            given = [x if a is None else jnp.expand_dims(x, a) for x, a in zip(rows, axes)]
            return [jnp.squeeze(y, found.axis) for y in _jaxpr.bind(like, given)]

        results = [Value(aval_of(var), found.axis) for var in eqn.outvars]
        modes = ["placed"] * len(results)
        self.steps.append(
            self.on_clients(eqn.primitive.name, fn, operands, axes, results, modes, size)
        )
        return results

    def _only_needed(self, outputs: Sequence[Value]) -> list[Step]:
        """The steps that outputs need. Clients do not compute anything else."""
        needed: set[Value] = set(outputs)
        kept: list[Step] = []
        for step in reversed(self.steps):
            if isinstance(step, OnServer):
                step = _needed_equations(step, needed)
            if needed.isdisjoint(step.results) and not _has_effects(step):
                continue
            if isinstance(step, OnClients):
                step = self._needed_results(step, needed)
            needed.update(step.operands)
            kept.append(step)
        return kept[::-1]

    def _needed_results(self, step: OnClients, needed: set[Value]) -> OnClients:
        wanted = [value in needed for value in step.results]
        if all(wanted):
            return step
        stage, used = self.cutter.stages.keep(step.stage, wanted)
        return dataclasses.replace(
            step,
            operands=tuple(itertools.compress(step.operands, used)),
            results=tuple(itertools.compress(step.results, wanted)),
            stage=stage,
            axes=tuple(itertools.compress(step.axes, used)),
        )


def _has_effects(step: Step) -> bool:
    """Whether the server prints, or calls back, in a step."""
    return isinstance(step, OnServer) and any(part.eqn.effects for part in step.equations)


def _needed_equations(step: OnServer, needed: set[Value]) -> OnServer:
    wanted, equations = set(needed), []
    made: list[Value] = []
    for part in reversed(step.equations):
        if wanted.isdisjoint(part.results) and not part.eqn.effects:
            continue
        equations.append(part)
        wanted.update(part.operands)
        made += part.results
    own = set(made)
    used = dict.fromkeys(v for part in equations for v in part.operands if v not in own)
    results = tuple(value for value in made if value in needed)
    return OnServer(tuple(used), results, equations[::-1])
