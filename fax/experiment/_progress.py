"""The progress bar of a run."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from tqdm import tqdm

from fax.experiment import _shown

if TYPE_CHECKING:
    from fax.experiment._run import Run


class Progress:
    """A bar with the loss, rounds and examples a second, and the time left.

    It also shows how many shapes of cohorts the round has been compiled for, and the share of the
    computed steps that are padding. Nothing is printed if the standard error is not a terminal.
    """

    def start(self, run: Run) -> None:
        """Shows the bar, which starts at the round that the run is at."""
        self._bar = tqdm(
            total=run.rounds,
            initial=run.round,
            unit="round",
            dynamic_ncols=True,
            disable=None,  # unless it is a terminal
        )
        self._shown: dict[str, str] = {}
        self._mark = (time.perf_counter(), run.cohorts.examples)

    def after_round(self, run: Run) -> None:
        """Moves the bar."""
        if self._bar.disable:
            return
        # From the history, since to ask for run.metrics would be to wait for the devices.
        known = {**run.history[-1], **run.results} if run.history else run.results
        kinds = _shown.kinds(known)
        for name, value in known.items():
            if _shown.kind_of(name) in kinds:
                self._shown[name] = f"{value:.4g}"
        cohorts, now, (then, before) = run.cohorts, time.perf_counter(), self._mark
        if now - then >= 1 or "examples/s" not in self._shown:
            self._shown["examples/s"] = f"{(cohorts.examples - before) / (now - then):,.0f}"
            self._mark = (now, cohorts.examples)
        self._shown["compilations"] = f"{len(cohorts.shapes)}"
        self._shown["padding"] = f"{cohorts.padding:.0%}"
        self._bar.set_postfix(self._shown, refresh=False)
        self._bar.update(run.round - self._bar.n)

    def close(self) -> None:
        """Leaves the bar as it is, on a line of its own."""
        self._bar.close()
