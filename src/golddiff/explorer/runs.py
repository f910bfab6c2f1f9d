"""The explorer: a bank, the thread that computes, and the runs that the page asked for."""

from __future__ import annotations

import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from weakref import WeakSet

from ..bank import Bank
from ..errors import GolddiffError
from ..sample import Step, trajectory
from .feed import Feed
from .models import ClassInfo, End, RunSettings
from .run import Run, explained
from .show import Screen
from .stock import Stock
from .work import Ending, Worker

__all__ = ["Explorer", "Gone"]

KEPT_BYTES = 2**28
KEPT_RUNS = 64
EXPIRED = 4096  # ids that are remembered after their runs are not


class Gone(Exception):
    """A run that is not there (any more). `expired`: it once was."""

    def __init__(self, expired: bool) -> None:
        self.expired = expired
        super().__init__(
            "this run has made room for newer ones: run it again" if expired else "there is no such run: run it again"
        )


class Explorer:
    """A bank, the thread that computes, and the runs that are remembered.

    Arguments:
        bank: the training images.
        room: bytes that the runs may take together; the oldest are forgotten first.
    """

    def __init__(self, bank: Bank, *, room: int = KEPT_BYTES, prepare: bool = True) -> None:
        self.bank, self.screen, self.room = bank, Screen(bank), room
        self.classes = classes_of(bank)
        self.stock = Stock(bank)
        self.instance = secrets.token_hex(4)
        self.worker = Worker()
        self.prepared = not prepare
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._expired: deque[str] = deque(maxlen=EXPIRED)
        self._checks: WeakSet[Feed] = WeakSet()
        self._lock = threading.RLock()  # a signal may come while it is held
        if prepare:
            self.worker.start(self._prepare(), on_end=self._ready, patient=True)

    def _prepare(self) -> Iterator[Step]:
        """Masks, statistics and compiled loops of the method and steps that the page begins with."""
        return trajectory(self.stock.denoiser(RunSettings()), [0], steps=10)

    def _ready(self, ending: Ending, error: Exception | None) -> None:
        self.prepared = True

    def open(self, settings: RunSettings) -> Run:
        """A new run, not yet begun; in the thread of the worker.

        Raises:
            GolddiffError: an unknown name, a label without rows, options that do not go together.
        """
        run = Run(settings, self.stock, self.screen)
        with self._lock:
            self._runs[run.id] = run
        self.tidy()
        return run

    def run(self, name: str) -> Run:
        """A run by its id.

        Raises:
            Gone: it is not there.
        """
        with self._lock:
            if name not in self._runs:
                raise Gone(name in self._expired)
            self._runs.move_to_end(name)
            return self._runs[name]

    def tidy(self) -> None:
        """Forgets runs that nobody follows, least recently used first, until the others fit."""
        with self._lock:
            for name in list(self._runs)[:-1]:
                if len(self._runs) <= KEPT_RUNS and sum(run.bytes for run in self._runs.values()) <= self.room:
                    return
                run = self._runs[name]
                if run.state != "running" and not run.feed.followers:
                    del self._runs[name]
                    self._expired.append(name)

    def close(self) -> None:
        """Ends the feeds of all runs, so that who follows them is told."""
        with self._lock:
            feeds = [run.feed for run in self._runs.values()]
        for feed in (*feeds, *self._checks):
            feed.add(End(state="cancelled", message="the server is stopping"), last=True)

    def checking(self, run: Run) -> Feed:
        """Begins to compare a run with the exact scan; ends when nobody follows.

        Raises:
            GolddiffError: a method without a golden subset, or no steps yet. Busy: too much is under way.
        """
        if run.retrieval is None:
            raise GolddiffError(f"{run.settings.method} has no golden subset: choose golddiff, pca, ls or optimal")
        if not run.steps:
            raise GolddiffError("this run has no steps yet: follow it first")

        def end(ending: Ending, error: Exception | None) -> None:
            feed.add(End(state=ending, message=explained(error)), last=True)

        feed = Feed(lambda: task.cancel())
        task = self.worker.start(run.compare(), feed.add, end)
        self._checks.add(feed)
        return feed


def classes_of(bank: Bank) -> list[ClassInfo]:
    """The classes of a bank, with how many rows each has."""
    own = bank.labels[bank.rows]
    labels, counts = own[own >= 0].unique(return_counts=True)
    names = bank.classes
    return [
        ClassInfo(label=label, name=names[label] if label < len(names) else str(label), rows=count)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
    ]
