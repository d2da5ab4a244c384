"""The settings of the tasks, as plain numbers and names that a configuration can hold."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import optax

from fax import _arguments
from fax.tasks._optimizers import optimizer


@dataclass(frozen=True)
class Settings:
    """Settings of federated averaging.

    Attributes:
      clients: how many take part in a round.
      batch_size: examples in a batch.
      epochs: how often a client goes through its examples in a round.
      max_steps: the most batches that a client has in a round, or None.
      rounds: the number of rounds after which results are usually reported.
      client: the clients' optimizer: ``"optimizer"``, its name in optax, ``"rate"``, its learning
        rate, and its other options.
      server: the server's optimizer, in the same form.

    Example:

      >>> settings = fax.tasks.load("digits", clients=20).settings
      >>> settings.clients, settings.batch_size, settings.epochs, settings.rounds
      (20, 5, 5, 300)
      >>> settings.client
      {'optimizer': 'sgd', 'rate': 0.1}
    """

    clients: int
    batch_size: int
    epochs: int
    max_steps: int | None
    rounds: int
    client: Mapping[str, Any]
    server: Mapping[str, Any]

    @property
    def client_optimizer(self) -> optax.GradientTransformation:
        """The clients' optimizer, made by optax."""
        return optimizer("client", self.client)

    @property
    def server_optimizer(self) -> optax.GradientTransformation:
        """The server's optimizer, made by optax."""
        return optimizer("server", self.server)


def _of(name: str, rate: float, **options: Any) -> dict[str, Any]:
    return {"optimizer": name, "rate": rate, **options}


_ADAM = _of("adam", 1.0, b1=0.9, b2=0.99, eps=0.01)
_YOGI = _of("yogi", 0.1, b1=0.9, b2=0.999, eps=0.01)
# By task and, where a task has several, by model.
_TUNED: dict[str, Settings | dict[str, Settings]] = {
    "digits": Settings(20, 5, 5, None, 300, _of("sgd", 0.1), _of("sgd", 0.2, momentum=0.9)),
    "pystdlib": Settings(16, 8, 1, 32, 300, _of("adam", 2e-3), _of("sgd", 1.0)),
    "flights": Settings(50, 16, 1, None, 300, _of("sgd", 0.1), _of("adam", 0.01)),
    "bible": Settings(16, 8, 1, 32, 300, _of("adam", 8e-3), _of("sgd", 1.0)),
    "photographs": Settings(10, 16, 1, 8, 100, _of("sgd", 0.3, momentum=0.9), _of("adam", 0.01)),
    "emnist": {
        "conv": Settings(10, 10, 1, None, 1500, _of("sgd", 0.001), _ADAM),
        "dense": Settings(340, 20, 1, None, 500, _of("sgd", 0.001), _ADAM),
        "logistic": Settings(
            10, 10, 1, None, 1500, _of("sgd", 10**-0.5), _of("adagrad", 1.0, eps=1e-7)
        ),
    },
    "cifar100": {
        "logistic": Settings(10, 20, 1, None, 4000, _of("sgd", 0.01), _YOGI),
        # A first guess after Reddi et al., arXiv:2003.00295, which is not tuned.
        "resnet18": Settings(
            10, 20, 1, None, 4000, _of("sgd", 10**-1.5), _of("sgd", 1.0, momentum=0.9)
        ),
    },
    "shakespeare": Settings(10, 10, 1, None, 1500, _of("sgd", 10**-1.5), _of("sgd", 1.0)),
    "stackoverflow": Settings(50, 16, 1, 500, 1500, _of("sgd", 0.5), _of("adam", 0.02)),
}


def tuned(task: str, model: Any = None) -> Settings:
    """The settings of a task, and of the chosen model if it has several. Needs no data."""
    found = _TUNED[task]
    if isinstance(found, Settings):
        return found
    return found[_arguments.choice(f"fax.tasks.load({task!r})", "model", model, list(found))]
