"""Federated algorithms: pure functions of a server's state and a cohort."""

from fax.algorithms._agnostic import AgnosticState as AgnosticState
from fax.algorithms._agnostic import agnostic_fedavg as agnostic_fedavg
from fax.algorithms._algorithm import Algorithm as Algorithm
from fax.algorithms._algorithm import many_rounds as many_rounds
from fax.algorithms._apfl import APFLState as APFLState
from fax.algorithms._apfl import Personal as Personal
from fax.algorithms._apfl import apfl as apfl
from fax.algorithms._averaging import FedAvgState as FedAvgState
from fax.algorithms._clusters import hyp_cluster_choice as hyp_cluster_choice
from fax.algorithms._clusters import hyp_cluster_start as hyp_cluster_start
from fax.algorithms._fedavg import fedavg as fedavg
from fax.algorithms._hyp_cluster import HypClusterState as HypClusterState
from fax.algorithms._hyp_cluster import hyp_cluster as hyp_cluster
from fax.algorithms._store import ClientStore as ClientStore
