"""Programs as plans, which run where the data are: in other processes, and on devices."""

from fax import _extras

_extras.require("fax.deploy", "flatbuffers", "deploy")

from fax.deploy._audit import Audit as Audit
from fax.deploy._audit import Exchange as Exchange
from fax.deploy._audit import Message as Message
from fax.deploy._backend import Backend as Backend
from fax.deploy._backend import ClientError as ClientError
from fax.deploy._backend import InProcess as InProcess
from fax.deploy._backend import combine as combine
from fax.deploy._beam import Beam as Beam
from fax.deploy._elastic import Elastic as Elastic
from fax.deploy._elastic import ElasticState as ElasticState
from fax.deploy._elastic import Grace as Grace
from fax.deploy._elastic import Send as Send
from fax.deploy._flower import Flower as Flower
from fax.deploy._flower_files import write_flower_client as write_flower_client
from fax.deploy._flower_learners import FlowerLearners as FlowerLearners
from fax.deploy._learner import Learner as Learner
from fax.deploy._learners import Learners as Learners
from fax.deploy._plan import Plan as Plan
from fax.deploy._plan import cut as cut
from fax.deploy._processes import Processes as Processes
from fax.deploy._secure_sums import SecureSums as SecureSums
from fax.deploy._stages import Stage as Stage
from fax.deploy._updates import Merge as Merge
from fax.deploy._values import CutError as CutError
from fax.deploy._values import Held as Held
from fax.deploy._values import Row as Row
