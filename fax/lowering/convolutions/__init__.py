"""Convolutions that are fast in loops: one step of the lowering of a map."""

from fax.lowering.convolutions._rewrite import rewrite as rewrite
