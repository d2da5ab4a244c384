"""One program for each peer, run by `simulation.py` in the peer's own environment."""
