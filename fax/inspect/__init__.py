"""What a program will cost, before it is run."""

from fax.inspect._collectives import Collective as Collective
from fax.inspect._padding import Padding as Padding
from fax.inspect._report import Memory as Memory
from fax.inspect._report import Report as Report
from fax.inspect._report import report as report
