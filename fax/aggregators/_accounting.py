"""Accounting: what privacy a mechanism's rounds cost, by the package `dp-accounting`.

Neighbours are populations that differ in one client, who is in the one and not in the other.
An epsilon says that with and without the client all that the server publishes, the models of all
rounds, is as likely up to a factor of exp(epsilon), but for events of probability delta. It holds
if updates are added up by someone who tells nobody: the server itself, or secure aggregation.
"""

from __future__ import annotations

import functools
import math
from typing import Any

from fax import _arguments

MECHANISMS, SAMPLINGS = ("gaussian", "laplace"), ("uniform", "poisson")


def epsilon(
    noise_multiplier: float,
    rounds: int,
    delta: float,
    *,
    clients: float | None = None,
    population: int | None = None,
    sampling: str = "uniform",
    mechanism: str = "gaussian",
) -> float:
    """The epsilon of so many rounds of `gaussian` or `laplace`, for a given delta.

    It is an upper bound, close to the exact value, from privacy loss distributions.

    Without ``clients`` and ``population`` nothing is assumed about who takes part, but that nobody
    is in more than ``rounds`` rounds. So it is for cohorts of all clients, and for those that
    follow a fixed order if ``rounds`` counts how often the same client comes. With both, the cohort
    of a round is random, independent of other rounds', and kept secret:

    - ``"uniform"``: ``clients`` different ones of ``population``, any set as likely as any other;
      the default of `fax.data.cohorts`. Where a client is missing another one takes its place, so
      the sum changes by up to two clip norms. A round is as private as with Poisson sampling of
      the rate clients / population and half the noise (Zhu et al., Theorem 11).
    - ``"poisson"``: each client independently with the probability clients / population. Cohorts
      of `fax.data.cohorts` are not drawn like this. Published results often assume it where they
      sample uniformly, and come to a smaller epsilon.

    Args:
      noise_multiplier: z, of the noise with which the rounds were run.
      rounds: how many releases: one a round with `fax.algorithms.fedavg`, with others more;
        `fax.aggregators.releases` counts them.
      delta: above 0 and below 1; below 1 / population to mean much.
      clients: how many take part in a round, with Poisson sampling on average.
      population: how many there are.
      sampling: ``"uniform"`` or ``"poisson"``.
      mechanism: ``"gaussian"`` or ``"laplace"``.

    Returns:
      Epsilon, infinite without noise.

    Raises:
      ValueError: if an argument is out of range.
      ImportError: if `dp-accounting` is not installed.

    References:
      Zhu et al., Optimal accounting of differential privacy via characteristic function,
      arXiv:2106.08567.

    Example:

      >>> round(fax.aggregators.epsilon(10.0, rounds=30, delta=1e-4), 2)
      1.89
      >>> sampled = dict(clients=50, population=10_000)
      >>> round(fax.aggregators.epsilon(2.0, rounds=1000, delta=1e-5, **sampled), 2)
      0.86
    """
    _arguments.number("fax.aggregators.epsilon", "delta", delta, above=0, below=1)
    rounds = _arguments.count("fax.aggregators.epsilon", "rounds", rounds, least=0)
    setting = setting_of(
        "fax.aggregators.epsilon", noise_multiplier, clients, population, sampling, mechanism
    )
    return epsilon_of(*setting, rounds, float(delta))


def calibrate(
    epsilon: float,
    rounds: int,
    delta: float,
    *,
    clients: float | None = None,
    population: int | None = None,
    sampling: str = "uniform",
    mechanism: str = "gaussian",
) -> float:
    """The noise multiplier with which so many rounds cost epsilon: the inverse of `epsilon`.

    Args:
      epsilon: above 0.
      rounds, delta, clients, population, sampling, mechanism: see `epsilon`.

    Returns:
      The noise multiplier. It costs no more than ``epsilon``, and at least 99.8 % of it.

    Raises:
      ValueError: if an argument is out of range.
      ImportError: if `dp-accounting` is not installed.

    Example:

      >>> round(fax.aggregators.calibrate(2.0, rounds=30, delta=1e-4), 1)
      9.5
    """
    caller = "fax.aggregators.calibrate"
    _arguments.number(caller, "epsilon", epsilon, above=0)
    _arguments.number(caller, "delta", delta, above=0, below=1)
    rounds = _arguments.count(caller, "rounds", rounds, least=1)
    setting = functools.partial(
        setting_of,
        caller,
        clients=clients,
        population=population,
        sampling=sampling,
        mechanism=mechanism,
    )

    def cost(z: float) -> float:
        return epsilon_of(*setting(z), rounds, float(delta))

    # About enough without sampling: from above, as small epsilons are quicker to compute.
    high = max((2 * rounds * math.log(2 / delta)) ** 0.5, 1.0) / epsilon
    while (least := cost(high)) > epsilon:
        high *= 2
    low = high / 2
    while (most := cost(low)) <= epsilon:
        low, high, least = low / 2, low, most
    while least < 0.998 * epsilon:
        at = 0.5
        if least > epsilon / 10:  # between them the curve is close to a power of z
            at = math.log(0.999 * epsilon / most) / math.log(least / most)
        middle = low * (high / low) ** at
        found = cost(middle)
        if found <= epsilon:
            high, least = middle, found
        else:
            low, most = middle, found
    return high


def setting_of(
    caller: str,
    noise_multiplier: float,
    clients: float | None,
    population: int | None,
    sampling: str,
    mechanism: str,
) -> tuple[float, float | None, str, str]:
    """The checked noise multiplier, sampling rate, sampling and mechanism."""
    _arguments.number(caller, "noise_multiplier", noise_multiplier, least=0)
    for name, value, known in (
        ("sampling", sampling, SAMPLINGS),
        ("mechanism", mechanism, MECHANISMS),
    ):
        if value not in known:
            raise ValueError(
                f"{caller}: {name} is {value!r}, expected one of {', '.join(map(repr, known))}."
            )
    if (clients is None) != (population is None):
        raise ValueError(
            f"{caller}: clients is {clients!r} and population is {population!r}, expected both, "
            "how many take part in a round and how many there are, or neither."
        )
    if clients is None or population is None:
        return float(noise_multiplier), None, sampling, mechanism
    population = _arguments.count(caller, "population", population, least=1)
    _arguments.number(caller, "clients", clients, above=0)
    if clients > population:
        raise ValueError(
            f"{caller}: clients={clients} is more than the population of {population}."
        )
    rate = None if clients == population else clients / population
    return float(noise_multiplier), rate, sampling, mechanism


@functools.lru_cache(maxsize=256)
def epsilon_of(
    noise_multiplier: float,
    rate: float | None,
    sampling: str,
    mechanism: str,
    rounds: int,
    delta: float,
) -> float:
    """Epsilon of checked arguments. ``rate`` None: nobody is sampled."""
    dp, pld = _dp_accounting()
    if rounds == 0:
        return 0.0
    if noise_multiplier == 0:
        return float("inf")
    half = rate is not None and sampling == "uniform"
    z = noise_multiplier / 2 if half else noise_multiplier
    event = dp.GaussianDpEvent(z) if mechanism == "gaussian" else dp.LaplaceDpEvent(z)
    if rate is not None:
        event = dp.PoissonSampledDpEvent(rate, event)
    accountant = pld.PLDAccountant(
        dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_interval(z, 1 if rate else rounds, mechanism),
    )
    return float(accountant.compose(event, rounds).get_epsilon(delta))


def _interval(z: float, rounds: int, mechanism: str) -> float:
    """The resolution of privacy losses: that of `dp-accounting`, or a coarser one of large losses.

    The result is an upper bound whatever it is. Losses of thousands, which nobody should take
    for private, would take minutes and gigabytes at the usual resolution.
    """
    mu = rounds**0.5 / z
    largest = mu * mu / 2 + 5 * mu if mechanism == "gaussian" else rounds / z
    return 1e-4 * max(1.0, largest / 100)


def _dp_accounting() -> tuple[Any, Any]:
    _arguments.extra("Accounting for privacy", "dp_accounting", "privacy")
    import dp_accounting
    from dp_accounting import pld

    return dp_accounting, pld
