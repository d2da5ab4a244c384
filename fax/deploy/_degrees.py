"""The degrees of values in sums over clients, which say what changes if some clients fail.

Without some clients, a sum is smaller. What the server computes is not biased by that if it stays
the same when all sums are multiplied by a number: then it is a function of ratios of sums, such as
a weighted mean. So each of the server's values has a degree d: with all sums multiplied by a > 0,
the value is multiplied by a^d. Sums have degree 1. What does not come from clients has degree 0.

    x y          adds degrees         x + y, max(x, y)    need equal degrees
    x / y        subtracts them       f(x)                needs degree 0

The same holds for what clients compute with what they receive. What decides branches and loops must
have degree 0. Results of a program may have degree 1: they are sums over the clients that are
there. A sum that is divided by the number of clients is an error, as by `fax.mean` without weights.

A divisor may be guarded against zero: `x + (x == 0)`, or `where(x == 0, 1, x)`. Of sums as clients
sent them, `max(x, 1)` and `where(x > 0, x, 1)` are taken for guards of counts, too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from jax.extend.core import JaxprEqn
from jax.extend.core import primitives as p

from fax._compat import Named
from fax.deploy._values import CutError, aval_of, line_of
from fax.primitives import _jaxpr
from fax.primitives._broadcast import broadcast_p
from fax.primitives._reduce import mean_p


@dataclasses.dataclass(frozen=True)
class Degree:
    """The degree of a value.

    Attributes:
      of: the degree, None for any, as zeros have.
      known: the number that all elements are known to be.
      clients: how many clients a sum is over, if the value is a sum.
      sent: whether its elements are sums as clients sent them.
      over: of a number of the server, what a factor of it is divided by; of a sum, the number of
        clients, if what they send has such a factor.
      tells: another value's degree, and whether this is true where that value is zero, or where it
        is not. Each value has a degree of its own, so the degree says which value it is.
    """

    of: Fraction | None = Fraction(0)
    known: float | None = None
    clients: int | None = None
    sent: bool = False
    over: float | None = None
    tells: tuple[Degree, bool] | None = dataclasses.field(default=None, compare=False)


ZERO, _ANY = Degree(), Degree(None, 0.0)
# Some elements of the first operand, or sums of them, or their negatives.
_STRUCTURE = {
    *(p.reshape_p, p.broadcast_in_dim_p, p.transpose_p, p.squeeze_p, p.slice_p, p.rev_p, p.copy_p),
    *(p.reduce_sum_p, p.reduce_max_p, p.reduce_min_p, p.cumsum_p),
    *(p.cummax_p, p.cummin_p, p.neg_p, p.abs_p, p.stop_gradient_p, p.reduce_precision_p),
    *(p.gather_p, p.dynamic_slice_p, broadcast_p),
}
_SUMS = {p.add_p, p.sub_p, p.add_jaxvals_p, p.concatenate_p, p.pad_p}
_CHOICES = {p.max_p, p.min_p, p.clamp_p}
_COMPARISONS = {p.eq_p, p.ne_p, p.lt_p, p.le_p, p.gt_p, p.ge_p}
_PRODUCTS = {p.mul_p, p.dot_general_p, p.conv_general_dilated_p}
_POWERS: dict[Any, Callable[[JaxprEqn], Fraction]] = {
    p.sqrt_p: lambda eqn: Fraction(1, 2),
    p.rsqrt_p: lambda eqn: Fraction(-1, 2),
    p.square_p: lambda eqn: Fraction(2),
    p.integer_pow_p: lambda eqn: Fraction(eqn.params["y"]),
}
_SCALE_FREE = {p.sign_p, p.is_finite_p, p.argmax_p, p.argmin_p}


def equation(eqn: JaxprEqn, given: Sequence[Degree]) -> Sequence[Degree]:
    """The degrees of the results of an equation."""
    if eqn.primitive is mean_p and given[0].clients is not None:
        raise static_error(given[0].clients, eqn)
    if eqn.primitive.name == Named.OPTIMIZATION_BARRIER:
        return list(map(dataclasses.replace, given))
    inner = _jaxpr.called(eqn)
    if inner is not None:
        return _jaxpr.interpret(inner, given, equation, of_constant)
    found = _result(eqn, given) if eqn.outvars else ZERO  # without results it prints
    return [found, *map(dataclasses.replace, [found] * len(eqn.outvars))][: len(eqn.outvars)]


def _result(eqn: JaxprEqn, given: Sequence[Degree]) -> Degree:
    kind = eqn.primitive
    if kind is p.convert_element_type_p:
        return _converted(eqn, given[0])
    if kind in _STRUCTURE:
        need_zero(given[1:], "it is the number of an element", eqn)
        known = given[0].known if kind in (p.broadcast_in_dim_p, p.reshape_p) else None
        sent = given[0].sent and kind not in (p.neg_p, p.abs_p)
        return dataclasses.replace(given[0], known=known, sent=sent, tells=None)
    if kind in _SUMS:
        adds = kind not in (p.concatenate_p, p.pad_p)
        return alike([d for d in given if not (adds and _is_guard(d, given))] or given, eqn)
    if kind is p.select_n_p:
        return _selected(eqn, *given)
    if kind in _CHOICES:
        count = kind is p.max_p and any(d.sent for d in given)
        limits = [d for d in given if _is_limit(d, count)]
        return alike([d for d in given if d not in limits] or given, eqn)
    if kind in _COMPARISONS:
        alike(given, eqn)
        return _compared(kind, *given)
    if kind in _PRODUCTS or kind is p.div_p:
        return _product(eqn, *given)
    if kind in _POWERS:
        (own,), power = given, _POWERS[kind](eqn)
        if own.of is None:
            return _ANY if power > 0 else ZERO
        return Degree(own.of * power)
    if kind not in _SCALE_FREE:
        need_zero(given, f"{kind.name} is applied to it", eqn)
    return ZERO


def _converted(eqn: JaxprEqn, own: Degree) -> Degree:
    old, new = aval_of(eqn.invars[0]).dtype, np.dtype(eqn.params["new_dtype"])
    if new == old:
        return own
    if new.kind == "b":
        return Degree(tells=(own, False) if own.of else None)
    if new.kind in "iu" and old.kind not in "biu":
        need_zero([own], "it is truncated to an integer", eqn)
    return own


def _compared(kind: Any, one: Degree, other: Degree) -> Degree:
    """A comparison, which may tell where a value is zero."""
    if not one.of:  # the value is on the left
        one, other, kind = other, one, _MIRRORED.get(kind, kind)
    if not one.of or other.known != 0:
        return Degree()
    if kind in (p.eq_p, p.ne_p) or (one.sent and kind in (p.gt_p, p.le_p)):
        return Degree(tells=(one, kind in (p.eq_p, p.le_p)))
    return Degree()


_MIRRORED = {p.lt_p: p.gt_p, p.gt_p: p.lt_p, p.le_p: p.ge_p, p.ge_p: p.le_p}


def _is_guard(own: Degree, given: Sequence[Degree]) -> bool:
    """Whether it is one where another of the values is zero, and zero elsewhere."""
    return own.tells is not None and own.tells[1] and any(d is own.tells[0] for d in given)


def _is_limit(own: Degree, count: bool) -> bool:
    """Whether it is infinite, or the least that a count other than zero can be."""
    return own.known is not None and (np.isinf(own.known) or (count and 0 < own.known <= 1))


def _selected(eqn: JaxprEqn, which: Degree, *cases: Degree) -> Degree:
    need_zero([which], "it decides between values", eqn)
    if which.tells is not None and len(cases) == 2:
        value, at_zero = which.tells
        guard, other = cases[at_zero], cases[not at_zero]
        if guard.known is not None and other is value:
            return alike([other], eqn)
    return alike(cases, eqn)


def _product(eqn: JaxprEqn, one: Degree, other: Degree) -> Degree:
    divides = eqn.primitive is p.div_p
    for total, factor in ((one, other), (other, one))[: 1 if divides else 2]:
        if total.clients is not None and factor.known:
            number = factor.known if divides else 1 / factor.known
            if np.isclose(number, total.clients, rtol=1e-6):
                raise static_error(total.clients, eqn)
    if one.of is None or (other.of is None and not divides):
        return _ANY
    if other.of is None:
        return Degree(one.of)
    of = one.of - other.of if divides else one.of + other.of
    over = next((d.over for d in (one, other) if d.over and bool(d.of) == bool(of)), None)
    over = over or (other.known if divides and not of and not one.of else None)
    if divides and of and np.issubdtype(aval_of(eqn.outvars[0]).dtype, np.integer):
        need_zero([one, other], "it is divided without a remainder", eqn)
    clients = one.clients if other.known is not None else None
    return Degree(of, clients=clients, over=over)


def static_error(clients: int, eqn: JaxprEqn | None) -> CutError:
    return CutError(
        f"A sum over clients is divided by their number, {clients}{_at(eqn)}. If some clients "
        "fail, the result would be too small. Divide by a sum over clients: pass weights= or "
        "where= to fax.mean, for example weights of one."
    )


def alike(given: Iterable[Degree], eqn: JaxprEqn | None) -> Degree:
    """The degree that values have, if they have the same."""
    definite = [d for d in given if d.of is not None]
    degrees = {d.of for d in definite}
    if len(degrees) > 1:
        shown = " and ".join(map(str, sorted(d for d in degrees if d is not None)))
        raise CutError(
            f"If some clients fail, sums over clients are smaller, and values of degrees "
            f"{shown} in the sums are combined{_at(eqn)}. Use means whose weights are summed, too."
        )
    if not definite:
        return _ANY
    clients = {d.clients for d in definite}
    return Degree(
        definite[0].of,
        clients=clients.pop() if len(clients) == 1 else None,
        sent=all(d.sent for d in definite),
        over=next((d.over for d in definite if d.over), None),
    )


def need_zero(given: Iterable[Degree], why: str, eqn: JaxprEqn | None) -> None:
    for own in given:
        if own.of:
            raise CutError(
                "If some clients fail, a sum over clients is smaller, and it is used as it is: "
                f"{why}{_at(eqn)}. Use means whose weights are summed, too."
            )


def of_constant(x: Any) -> Degree:
    values = np.asarray(x) if not hasattr(x, "dtype") or x.dtype.kind in "biufc" else None
    if values is None or not values.size or not (values == values.flat[0]).all():
        return ZERO
    return Degree(Fraction(0), float(values.flat[0].real)) if values.flat[0] else _ANY


def _at(eqn: JaxprEqn | None) -> str:
    return "" if eqn is None else f", at {line_of(eqn)}"
