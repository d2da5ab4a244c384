"""Federated algorithms: pure functions of a server's state and a cohort."""

from fax.algorithms._algorithm import Algorithm as Algorithm
from fax.algorithms._algorithm import many_rounds as many_rounds
from fax.algorithms._averaging import FedAvgState as FedAvgState
from fax.algorithms._branch_train_merge import BranchTrainMerge as BranchTrainMerge
from fax.algorithms._branch_train_merge import BranchTrainMergeState as BranchTrainMergeState
from fax.algorithms._branch_train_merge import branch_train_merge as branch_train_merge
from fax.algorithms._diloco import DiLoCoState as DiLoCoState
from fax.algorithms._diloco import diloco as diloco
from fax.algorithms._fedavg import fedavg as fedavg
from fax.algorithms._local_sgd import local_sgd as local_sgd
from fax.algorithms._papa import PAPAState as PAPAState
from fax.algorithms._papa import papa as papa
from fax.algorithms._papa import papa_2 as papa_2
from fax.algorithms._papa import papa_all as papa_all
from fax.algorithms._streaming_diloco import StreamingDiLoCoState as StreamingDiLoCoState
from fax.algorithms._streaming_diloco import streaming_diloco as streaming_diloco
