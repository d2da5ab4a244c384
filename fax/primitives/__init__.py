"""The primitives with all of their rules, and the fusion pass."""

from fax.primitives import _tools as _tools
