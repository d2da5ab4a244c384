"""Federated algorithms: pure functions of a server's state and a cohort."""

from fax.algorithms._algorithm import Algorithm as Algorithm
from fax.algorithms._algorithm import many_rounds as many_rounds
from fax.algorithms._averaging import FedAvgState as FedAvgState
from fax.algorithms._fedavg import fedavg as fedavg
