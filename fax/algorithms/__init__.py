"""Federated algorithms: pure functions of a server's state and a cohort."""

from fax.algorithms._algorithm import Algorithm as Algorithm
from fax.algorithms._algorithm import many_rounds as many_rounds
from fax.algorithms._averaging import FedAvgState as FedAvgState
from fax.algorithms._fedavg import fedavg as fedavg
from fax.algorithms._fedopt import fedopt as fedopt
from fax.algorithms._fedopt import server_adagrad as server_adagrad
from fax.algorithms._fedopt import server_adam as server_adam
from fax.algorithms._fedopt import server_momentum as server_momentum
from fax.algorithms._fedopt import server_yogi as server_yogi
from fax.algorithms._fedprox import fedprox as fedprox
from fax.algorithms._maml import maml as maml
from fax.algorithms._maml import personalize as personalize
from fax.algorithms._maml import reptile as reptile
from fax.algorithms._mime import mime as mime
from fax.algorithms._mime import mime_lite as mime_lite
from fax.algorithms._scaffold import ScaffoldState as ScaffoldState
from fax.algorithms._scaffold import scaffold as scaffold
