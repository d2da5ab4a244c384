from fax.data._cohort import Client as Client
from fax.data._cohort import Cohort as Cohort
from fax.data._cohort import Gathered as Gathered
from fax.data._cohorts import Cohorts as Cohorts
from fax.data._cohorts import cohorts as cohorts
from fax.data._memory import InMemory as InMemory
from fax.data._protocol import DataError as DataError
