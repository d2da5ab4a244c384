"""Loops and branches around what clients do: the server decides, with blocks of steps inside.

A value that is carried, or that branches return, is either held always or never. Where one branch
or the start of a loop has it at the server, each client is sent its row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jax import lax
from jax.extend.core import ClosedJaxpr, JaxprEqn
from jax.extend.core import primitives as p

from fax import _compat
from fax.deploy._steps import Block, Branch, OnClients, Scan, Send, While
from fax.deploy._values import CutError, Value, aval_of, of_rows, row_of

if TYPE_CHECKING:
    from fax.deploy._cut import Writer


def sent(writer: Writer, value: Value, axis: int, like: Value | None) -> Value:
    """The server's value, with each row at its client: at those that hold ``like``, if given."""
    if value.axis == axis:
        return value
    if value.held:
        raise CutError(
            f"The rows of {value.aval.str_short()} are along axis {value.axis} in one place and "
            f"along axis {axis} in another, but a loop or a branch needs them along the same axis."
        )
    result = Value(value.aval, axis)
    operands = (value,) if like is None else (value, like)
    writer.steps.append(Send(operands, (result,)))
    return result


def _joined(one: Sequence[int | None], other: Sequence[int | None]) -> list[int | None]:
    return [b if a is None else a for a, b in zip(one, other, strict=True)]


def _axes(values: Sequence[Value]) -> list[int | None]:
    return [value.axis for value in values]


def _returning(writer: Writer, block: Block, axes: Sequence[int | None]) -> Block:
    """The block, which returns held values wherever there is an axis."""
    outputs = list(block.outputs)
    if _axes(outputs) == list(axes):
        return block
    rest = type(writer)(writer.cutter)
    rest.steps, rest.constants = list(block.steps), dict(block.constants)
    like = {v.aval.shape[v.axis]: v for v in block.inputs if v.held and v.axis is not None}
    for i, axis in enumerate(axes):
        if axis is not None:
            size = outputs[i].aval.shape[axis]
            outputs[i] = sent(rest, outputs[i], axis, like.get(size))
    return rest.block(block.inputs, outputs)


def _cond(writer: Writer, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    which, *rest = operands
    which = writer.pulled(which, eqn, "a branch depends on it")
    blocks = [writer.cutter.block(b, _axes(rest)) for b in eqn.params["branches"]]
    axes: list[int | None] = [None] * len(eqn.outvars)
    for block in blocks:
        axes = _joined(axes, _axes(block.outputs))
    blocks = [_returning(writer, block, axes) for block in blocks]
    results = [Value(aval_of(var), axis) for var, axis in zip(eqn.outvars, axes, strict=True)]
    writer.steps.append(Branch((which, *rest), tuple(results), tuple(blocks)))
    return results


def _loop(
    writer: Writer, body: ClosedJaxpr, before: Sequence[int | None], carry: list[Value], after: Any
) -> tuple[Block, list[Value]]:
    """The body of a loop, and what it carries at first, both held in the same places."""
    axes = _axes(carry)
    while True:
        block = writer.cutter.block(body, [*before, *axes, *after])
        found = _joined(axes, _axes(block.outputs)[: len(axes)])
        if found == axes:
            break
        axes = found
    rest = _axes(block.outputs)[len(axes) :]
    block = _returning(writer, block, [*axes, *rest])
    started = [x if a is None else sent(writer, x, a, None) for x, a in zip(carry, axes)]
    return block, started


def _while(writer: Writer, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    one, other = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    seen, read, carry = operands[:one], operands[one : one + other], operands[one + other :]
    body, carry = _loop(writer, eqn.params["body_jaxpr"], _axes(read), carry, [])
    condition = writer.cutter.block(eqn.params["cond_jaxpr"], [*_axes(seen), *_axes(carry)])
    if condition.outputs[0].held:
        raise CutError("The condition of a loop depends on the rows of clients.")
    results = [Value(x.aval, x.axis) for x in carry]
    given = (*seen, *read, *carry)
    writer.steps.append(While(given, tuple(results), condition, body, (one, other)))
    return results


def _scan(writer: Writer, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    reads, carries = _compat.scan_sizes(eqn)
    read, carry = operands[:reads], operands[reads : reads + carries]
    sequences = [
        writer.pulled(x, eqn, "a scan goes through the clients") if x.axis == 0 else x
        for x in operands[reads + carries :]
    ]
    length = eqn.params["length"]
    inside = [None if x.axis is None else x.axis - 1 for x in sequences]
    jaxpr = eqn.params["jaxpr"]
    body, carry = _loop(writer, jaxpr, _axes(read), carry, inside)
    at = [None if x.axis is None else _element(writer, x, x.axis) for x in sequences]
    stack, results = [], [Value(x.aval, x.axis) for x in carry]
    for value, var in zip(body.outputs[carries:], eqn.outvars[carries:], strict=True):
        results.append(Value(aval_of(var), None if value.axis is None else value.axis + 1))
        stack.append(_stack(writer, value, results[-1], length) if value.held else None)
    if not length and stack:
        raise CutError("A loop without iterations stacks results; leave it out.")
    writer.steps.append(
        Scan(
            (*read, *carry, *sequences),
            tuple(results),
            body,
            length,
            eqn.params["reverse"],
            reads,
            carries,
            tuple(at),
            tuple(stack),
        )
    )
    return results


def _element(writer: Writer, value: Value, axis: int) -> OnClients:
    """Takes one element along the leading axis of a held value, whose rows are along another."""
    size, row = value.aval.shape[axis], row_of(value.aval, axis)
    of_one = row.update(shape=row.shape[1:])
    result = Value(of_rows(of_one, size, axis - 1), axis - 1)
    number = Value(jnp.int32(0).aval)
    return writer.on_clients(
        "element",
        lambda x, i: [lax.dynamic_index_in_dim(x, i, 0, keepdims=False)],
        [value, number],
        [axis, None],
        [result],
        ["placed"],
        size,
    )


def _stack(writer: Writer, value: Value, result: Value, length: int) -> OnClients:
    assert value.axis is not None
    return writer.on_clients(
        "stack",
        lambda *rows: [jnp.stack(rows)],
        [value] * length,
        [value.axis] * length,
        [result],
        ["placed"],
        value.aval.shape[value.axis],
    )


RULES: dict[Any, Callable[..., list[Value]]] = {
    p.cond_p: _cond,
    p.scan_p: _scan,
    p.while_p: _while,
}
