"""Convolutions that are fast in loops: one step of the lowering of a map."""
