"""The primitives with all of their rules, and the fusion pass."""

# It imports all other primitives over placements, and so registers their rules.
from fax.primitives import _tools as _tools
