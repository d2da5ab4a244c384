"""Federated algorithms: pure functions of a server's state and a cohort."""

from fax import _extras

_extras.require("fax.algorithms", "optax", "algorithms")

from fax.algorithms._agnostic import Domains as Domains
from fax.algorithms._agnostic import agnostic_fedavg as agnostic_fedavg
from fax.algorithms._algorithm import Algorithm as Algorithm
from fax.algorithms._algorithm import many_rounds as many_rounds
from fax.algorithms._apfl import Personal as Personal
from fax.algorithms._apfl import apfl as apfl
from fax.algorithms._branch_train_merge import BranchTrainMerge as BranchTrainMerge
from fax.algorithms._branch_train_merge import BranchTrainMergeState as BranchTrainMergeState
from fax.algorithms._branch_train_merge import branch_train_merge as branch_train_merge
from fax.algorithms._clients import gather_rows as gather_rows
from fax.algorithms._clients import scatter_rows as scatter_rows
from fax.algorithms._clusters import hyp_cluster_choice as hyp_cluster_choice
from fax.algorithms._clusters import hyp_cluster_start as hyp_cluster_start
from fax.algorithms._diloco import DiLoCoState as DiLoCoState
from fax.algorithms._diloco import diloco as diloco
from fax.algorithms._diloco import local_sgd as local_sgd
from fax.algorithms._ditto import DittoClient as DittoClient
from fax.algorithms._ditto import ditto as ditto
from fax.algorithms._exchange import ClientResult as ClientResult
from fax.algorithms._exchange import Received as Received
from fax.algorithms._exchange import Server as Server
from fax.algorithms._exchange import State as State
from fax.algorithms._fedavg import fedavg as fedavg
from fax.algorithms._fedavg import fedopt as fedopt
from fax.algorithms._fedavg import fedprox as fedprox
from fax.algorithms._fedavg import reptile as reptile
from fax.algorithms._feddyn import feddyn as feddyn
from fax.algorithms._federated import federated as federated
from fax.algorithms._fednova import fednova as fednova
from fax.algorithms._fedper import fedbn as fedbn
from fax.algorithms._fedper import fedper as fedper
from fax.algorithms._hyp_cluster import hyp_cluster as hyp_cluster
from fax.algorithms._layers import layer_fragments as layer_fragments
from fax.algorithms._local import Trained as Trained
from fax.algorithms._local import local_gradient as local_gradient
from fax.algorithms._local import local_steps as local_steps
from fax.algorithms._loss import batch_gradient as batch_gradient
from fax.algorithms._loss import batch_loss as batch_loss
from fax.algorithms._maml import maml as maml
from fax.algorithms._maml import personalize as personalize
from fax.algorithms._mime import mime as mime
from fax.algorithms._mime import mime_lite as mime_lite
from fax.algorithms._papa import PAPAState as PAPAState
from fax.algorithms._papa import papa as papa
from fax.algorithms._papa import papa_2 as papa_2
from fax.algorithms._papa import papa_all as papa_all
from fax.algorithms._personal import Parts as Parts
from fax.algorithms._personal import PersonalParts as PersonalParts
from fax.algorithms._personal import personal_parts as personal_parts
from fax.algorithms._personal import personal_state as personal_state
from fax.algorithms._qfedavg import qfedavg as qfedavg
from fax.algorithms._scaffold import scaffold as scaffold
from fax.algorithms._server_optimizers import server_adagrad as server_adagrad
from fax.algorithms._server_optimizers import server_adam as server_adam
from fax.algorithms._server_optimizers import server_momentum as server_momentum
from fax.algorithms._server_optimizers import server_yogi as server_yogi
from fax.algorithms._store import ClientStore as ClientStore
from fax.algorithms._streaming_diloco import StreamingDiLoCoState as StreamingDiLoCoState
from fax.algorithms._streaming_diloco import streaming_diloco as streaming_diloco
