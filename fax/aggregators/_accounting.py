"""Accounting: how much privacy the rounds of a mechanism cost, by the package `dp-accounting`.

Neighbors are two sets of clients that differ in one client, which is in one of them and not in the
other. With epsilon and delta, everything that the server publishes, the models of all rounds, is as
likely with the client as without it, up to a factor of exp(epsilon), except for events of
probability delta. This holds if updates are added up by someone who reveals nothing else: the
server itself, or secure aggregation.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

from fax import _arguments, _extras

# Beyond these nothing is protected: an epsilon that takes too long to compute closely, and a loss
# in a single round whose exponential is almost infinite.
_MOST, _MOST_LOSS = 1e6, 700.0
MECHANISMS, SAMPLINGS = ("gaussian", "laplace"), ("uniform", "poisson")


def epsilon(
    noise_multiplier: float,
    rounds: int,
    delta: float,
    *,
    sampling_rate: float | None = None,
    sampling: str = "uniform",
    mechanism: str = "gaussian",
) -> float:
    """The epsilon of a number of rounds with `gaussian` or `laplace`, for a given delta.

    It is an upper bound, close to the exact value, from privacy loss distributions. For a delta
    below 1e-15, or an epsilon that protects no one, it is a bound in closed form, which takes no
    account of sampling: ``rounds`` / z for `laplace`, and that of concentrated privacy
    (arXiv:1605.02065) for `gaussian`.

    Without ``sampling_rate`` the only assumption is that no client takes part in more than
    ``rounds`` rounds. So it is for rounds of all clients, and for cohorts in a fixed order if
    ``rounds`` is the number of rounds of a single client. With ``sampling_rate``, the cohort of a
    round is random, independent of other rounds, and secret:

    - ``"uniform"``: a fixed number of different clients, and all sets of this size are equally
      likely. This is the default of `fax.data.cohorts`. If a client is missing, another takes its
      place, so that the sum changes by up to two clip norms. A round is as private as with Poisson
      sampling at the same rate and half the noise (Zhu et al., Theorem 11).
    - ``"poisson"``: each client independently, with probability ``sampling_rate``. The cohorts of
      `fax.data.cohorts` are not drawn like this. Published results often assume Poisson sampling
      although they sample uniformly, and then report a smaller epsilon.

    Args:
      noise_multiplier: z, of the noise in these rounds.
      rounds: the number of releases: one for each round of `fax.algorithms.fedavg`, and more for
        some algorithms. `fax.aggregators.releases` counts them.
      delta: above 0 and below 1. To be meaningful, it should be below 1 / the number of clients.
      sampling_rate: the number of clients in a round over the number of clients of the data, above
        0 and at most 1. With Poisson sampling, the expected number.
      sampling: ``"uniform"`` or ``"poisson"``.
      mechanism: ``"gaussian"`` or ``"laplace"``.

    Returns:
      Epsilon. Infinity without noise.

    Raises:
      ValueError: if an argument is out of range.
      ImportError: if `dp-accounting` is not installed.

    References:
      Zhu et al., Optimal accounting of differential privacy via characteristic function,
      arXiv:2106.08567.

    Example:

      >>> round(fax.aggregators.epsilon(10.0, rounds=30, delta=1e-4), 2)
      1.89
      >>> rate = 50 / 10_000
      >>> round(fax.aggregators.epsilon(2.0, rounds=1000, delta=1e-5, sampling_rate=rate), 2)
      0.86
    """
    caller = "fax.aggregators.epsilon"
    _arguments.number(caller, "delta", delta, above=0, below=1)
    rounds = _arguments.count(caller, "rounds", rounds, least=0)
    setting = Setting.of(caller, noise_multiplier, sampling_rate, sampling, mechanism)
    return setting.epsilon(rounds, float(delta))


def calibrate(
    epsilon: float,
    rounds: int,
    delta: float,
    *,
    sampling_rate: float | None = None,
    sampling: str = "uniform",
    mechanism: str = "gaussian",
) -> float:
    """The noise multiplier for which a number of rounds costs epsilon: the inverse of `epsilon`.

    Args:
      epsilon: above 0.
      rounds, delta, sampling_rate, sampling, mechanism: see `epsilon`.

    Returns:
      The noise multiplier. The rounds cost at most ``epsilon``, and at least 99.8 % of it, unless
      ``epsilon`` is so large that it protects no one.

    Raises:
      ValueError: if an argument is out of range, or ``delta`` is so large that no noise is needed:
        at least the probability that a client takes part in any round.
      ImportError: if `dp-accounting` is not installed.

    Example:

      >>> round(fax.aggregators.calibrate(2.0, rounds=30, delta=1e-4), 1)
      9.5
    """
    caller = "fax.aggregators.calibrate"
    epsilon = float(_arguments.number(caller, "epsilon", epsilon, above=0))
    delta = float(_arguments.number(caller, "delta", delta, above=0, below=1))
    rounds = _arguments.count(caller, "rounds", rounds, least=1)
    setting = Setting.of(caller, 1.0, sampling_rate, sampling, mechanism)
    if setting.rate is not None:
        ever = -math.expm1(rounds * math.log1p(-setting.rate))
        if delta >= ever:
            raise ValueError(
                f"{caller}: delta is {delta:g}, expected less than {ever:g}, the probability that "
                "a client takes part in any round, as otherwise no noise is needed. Choose a delta "
                "below 1 / the number of clients."
            )

    def cost(z: float) -> float:
        return setting._replace(noise_multiplier=z).epsilon(rounds, delta)

    # About enough without sampling. The search comes from above: small epsilons are faster.
    high = max((2 * rounds * math.log(2 / delta)) ** 0.5, 1.0) / epsilon
    while (least := cost(high)) > epsilon:
        high *= 2
    low = high / 2
    while (most := cost(low)) <= epsilon:
        low, high, least = low / 2, low, most
    # Where the bound in closed form begins, the curve jumps, and has no point near epsilon.
    while least < 0.998 * epsilon and high > (1 + 1e-6) * low:
        at = 0.5
        if least > epsilon / 10:  # between the two the curve is close to a power of z
            at = math.log(0.999 * epsilon / most) / math.log(least / most)
        middle = low * (high / low) ** at
        found = cost(middle)
        if found <= epsilon:
            high, least = middle, found
        else:
            low, most = middle, found
    return high


class Setting(NamedTuple):
    """What the epsilon of a release depends on.

    Attributes:
      noise_multiplier: z.
      rate: the probability of a client to take part. None if cohorts are not random.
      sampling: how cohorts are drawn.
      mechanism: the distribution of the noise.
    """

    noise_multiplier: float
    rate: float | None
    sampling: str
    mechanism: str

    @classmethod
    def of(
        cls,
        caller: str,
        noise_multiplier: float,
        sampling_rate: float | None,
        sampling: str,
        mechanism: str,
    ) -> Setting:
        """The setting of these arguments, which are checked."""
        _arguments.number(caller, "noise_multiplier", noise_multiplier, least=0)
        _arguments.choice(caller, "sampling", sampling, SAMPLINGS)
        _arguments.choice(caller, "mechanism", mechanism, MECHANISMS)
        if sampling_rate is not None:
            _arguments.number(caller, "sampling_rate", sampling_rate, above=0, most=1)
        rate = None if sampling_rate is None or sampling_rate == 1 else float(sampling_rate)
        return cls(float(noise_multiplier), rate, sampling, mechanism)

    def epsilon(self, rounds: int, delta: float) -> float:
        """The epsilon of a number of rounds."""
        return _epsilon(self, rounds, delta)


@functools.lru_cache(maxsize=256)
def _epsilon(setting: Setting, rounds: int, delta: float) -> float:
    z, rate, sampling, mechanism = setting
    dp, pld = _dp_accounting()
    if rounds == 0:
        return 0.0
    if z == 0:
        return float("inf")
    if rate is not None and sampling == "uniform":
        z = z / 2
    most = _without_sampling(z, rounds, delta, mechanism)
    if most > _MOST or (mechanism == "laplace" and 1 / z > _MOST_LOSS):
        return most
    event = dp.GaussianDpEvent(z) if mechanism == "gaussian" else dp.LaplaceDpEvent(z)
    if rate is not None:
        event = dp.PoissonSampledDpEvent(rate, event)
    accountant = pld.PLDAccountant(
        dp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        value_discretization_interval=_interval(z, 1 if rate else rounds, mechanism),
    )
    return min(float(accountant.compose(event, rounds).get_epsilon(delta)), most)


def _without_sampling(z: float, rounds: int, delta: float, mechanism: str) -> float:
    """A bound in closed form. It also holds for sampled cohorts, which cost less."""
    if mechanism == "laplace":
        return rounds / z
    rho = rounds / 2 / z / z
    return rho + 2 * math.sqrt(rho * -math.log(delta))


def _interval(z: float, rounds: int, mechanism: str) -> float:
    """The resolution of privacy losses: that of `dp-accounting`, or coarser for large losses.

    The result is an upper bound at any resolution. Losses of thousands, which do not protect
    anyone, would take minutes and gigabytes at the usual one.
    """
    mu = rounds**0.5 / z
    largest = mu * mu / 2 + 5 * mu if mechanism == "gaussian" else rounds / z
    return 1e-4 * max(1.0, largest / 100)


def _dp_accounting() -> tuple[Any, Any]:
    _extras.require("Accounting for privacy", "dp_accounting", "privacy")
    import dp_accounting
    from dp_accounting import pld

    return dp_accounting, pld
