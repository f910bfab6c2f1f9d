"""Runs that the page asked for: their steps, kept for questions as long as there is room."""

from __future__ import annotations

import logging
import secrets
import threading
from collections import OrderedDict, deque
from collections.abc import Iterator
from concurrent.futures import Future
from time import perf_counter
from typing import Any, Literal
from weakref import WeakSet

import torch
from torch import Tensor

from ..bank import Bank
from ..denoise import METHODS, Denoiser, denoiser
from ..errors import GolddiffError, unknown
from ..noise import SCHEDULES, schedule_named
from ..posterior import Posterior
from ..sample import SAMPLERS, Step, levels_from, sampler_named, trajectory
from .feed import Feed
from .models import ClassInfo, Compared, End, RunInfo, RunSettings, Sources, StepEvent, Support, Without
from .show import Screen
from .sources import at_once, in_turns
from .work import Ending, Task, Worker

__all__ = ["Explorer", "Gone", "Run"]

KEPT_BYTES = 2**29
KEPT_RUNS = 64
KEPT_VIEWS = 4
EXPIRED = 4096  # ids that are remembered after their runs are not

PATCHES = ("els", "bbels")  # methods whose weights are not over whole images

State = Literal["waiting", "running", "finished", "cancelled", "failed"]


class Gone(Exception):
    """A run that is not there (any more). `expired`: it once was."""

    def __init__(self, expired: bool) -> None:
        self.expired = expired
        super().__init__(
            "this run has made room for newer ones: run it again" if expired else "there is no such run: run it again"
        )


class Run:
    """A trajectory of one seed, computed while somebody follows it.

    Attributes:
        steps: those that are done, with their posteriors.
        feed: what its followers are told.
        bank: the rows that it may use. model: its denoiser.
    """

    def __init__(self, settings: RunSettings, bank: Bank, model: Denoiser, rows: int, screen: Screen) -> None:
        self.id = secrets.token_urlsafe(9)
        self.settings, self.bank, self.model, self.rows, self.screen = settings, bank, model, rows, screen
        self.state: State = "waiting"
        self.steps: list[Step] = []
        self.bytes = 0
        self._sources: dict[tuple[int, bool | None], Sources] = {}
        self._asking: Task | None = None
        self.task: Task | None = None
        self.feed = Feed(self.cancel)

    def info(self) -> RunInfo:
        return RunInfo(id=self.id, state=self.state, steps_done=len(self.steps), settings=self.settings, rows=self.rows)

    def begin(self, worker: Worker) -> None:
        """Starts computing, if that has not been done."""
        if self.state == "waiting":
            self.task = worker.start(self._compute(), self._keep, self._end)
            self.state = "running"

    def cancel(self) -> None:
        """Ends the run before its next step."""
        if self.task is not None:
            self.task.cancel()
        elif self.state == "waiting":
            self._end("cancelled", None)

    def _compute(self) -> Iterator[tuple[Step, float]]:
        chosen = self.settings
        began = perf_counter()
        for step in trajectory(
            self.model,
            [chosen.seed],
            steps=chosen.steps,
            schedule=schedule_named(chosen.schedule),
            sampler=sampler_named(chosen.sampler),
            labels=chosen.label,
        ):
            yield step, perf_counter() - began
            began = perf_counter()

    def _keep(self, item: tuple[Step, float]) -> None:
        step, seconds = item
        event = described(step, seconds, self.screen)
        self.steps.append(step)
        self.bytes += bytes_of(step) + 2 * len(event.noisy)
        self.feed.add(event)

    def _end(self, ending: Ending, error: Exception | None) -> None:
        self.state = ending
        self.feed.add(End(state=ending, message=explained(error)), last=True)

    def step(self, index: int) -> Step:
        """A step that is done.

        Raises:
            GolddiffError: it is not.
        """
        if not 0 <= index < len(self.steps):
            raise GolddiffError(f"step {index} is not there: {len(self.steps)} steps are done, counted from 0")
        return self.steps[index]

    def posterior(self, index: int) -> Posterior:
        """The posterior of a step that is done.

        Raises:
            GolddiffError: there is no such step, or it has no weights over whole images.
        """
        step = self.step(index)
        if self.settings.method in PATCHES:
            raise GolddiffError(
                f"{self.settings.method} has weights over patches, not over images: choose optimal, pca or golddiff"
            )
        return step.posterior

    def sources(self, index: int, with_map: bool) -> Sources:
        """The rows that made the mean of a step, at once; remembered."""
        posterior = self.posterior(index)
        if (index, with_map) not in self._sources:
            self._sources[index, with_map] = at_once(self.bank, posterior, with_map=with_map)
        return self._sources[index, with_map]

    def all_sources(self, index: int, worker: Worker) -> Future[Sources]:
        """The same from all pixels, in turns with other work; a new question of this kind cancels the one before."""
        answer: Future[Sources] = Future()
        posterior = self.posterior(index)
        if (index, None) in self._sources:
            answer.set_result(self._sources[index, None])
            return answer

        def item(found: Sources | None) -> None:
            if found is not None:
                self._sources[index, None] = found

        def end(ending: Ending, error: Exception | None) -> None:
            if error is not None:
                answer.set_exception(error)
            elif (index, None) in self._sources:
                answer.set_result(self._sources[index, None])
            else:
                answer.set_exception(GolddiffError("another question came before this answer: ask again"))

        if self._asking is not None:
            self._asking.cancel()
        self._asking = worker.start(in_turns(self.bank, posterior), item, end)
        return answer

    def compare(self) -> Iterator[Compared]:
        """The posterior of every step beside that of all rows in the same locality."""
        options = {**options_of(self.settings), "retrieval": "full"}
        full = denoiser(self.settings.method, self.bank, **options)
        for step in list(self.steps):
            timed = []
            for model in (self.model, full):
                began = perf_counter()
                mean = model(step.x_t, step.noise, self.settings.label, seed=self.settings.seed).mean
                timed.append((perf_counter() - began, mean))
            (seconds, mean), (seconds_full, exact) = timed
            rms = float((mean.double() - exact.double()).square().mean().sqrt())
            yield Compared(index=step.index, count=len(self.steps), rms=rms, seconds=seconds, seconds_full=seconds_full)


class Explorer:
    """A bank, the thread that computes, and the runs that are remembered.

    Arguments:
        bank: the training images.
        room: bytes that the runs may take together; the oldest are forgotten first.
    """

    def __init__(self, bank: Bank, *, room: int = KEPT_BYTES, prepare: bool = True) -> None:
        self.bank, self.screen, self.room = bank, Screen(bank), room
        self.classes = classes_of(bank)
        self.instance = secrets.token_hex(4)
        self.worker = Worker()
        self.prepared = not prepare
        self._runs: OrderedDict[str, Run] = OrderedDict()
        self._expired: deque[str] = deque(maxlen=EXPIRED)
        self._views: OrderedDict[tuple[Any, ...], Bank] = OrderedDict()
        self._checks: WeakSet[Feed] = WeakSet()
        self._lock = threading.RLock()  # a signal may come while it is held
        if prepare:
            self.worker.start(self._prepare(), on_end=self._ready)

    def _prepare(self) -> Iterator[Step]:
        """Masks, statistics and compiled loops of the method and steps that the page begins with."""
        return trajectory(denoiser("golddiff", self.bank), [0], steps=10)

    def _ready(self, ending: Ending, error: Exception | None) -> None:
        self.prepared = True

    def open(self, settings: RunSettings) -> Run:
        """A new run, not yet begun; in the thread of the worker, because a view of the bank may have to be made.

        Raises:
            GolddiffError: an unknown name, a label without rows, options that do not go together.
        """
        check(settings)
        bank = self._without(settings.without)
        eligible = bank.rows_of(settings.label)
        model = denoiser(settings.method, bank, **options_of(settings))
        count = len(bank) if eligible is None else len(eligible)
        run = Run(settings, bank, model, count, self.screen)
        with self._lock:
            self._runs[run.id] = run
        self.tidy()
        return run

    def _without(self, left_out: Without | None) -> Bank:
        """The bank, or a view of it that lacks some rows; the last few views are kept."""
        if left_out is None or not (left_out.rows or left_out.labels):
            return self.bank
        rows, labels = sorted(set(left_out.rows)), sorted(set(left_out.labels))
        key = (tuple(rows), tuple(labels), left_out.statistics)
        if key not in self._views:
            self._views[key] = self.bank.without(rows=rows, labels=labels, statistics=left_out.statistics)
            if len(self._views) > KEPT_VIEWS:
                self._views.popitem(last=False)
        self._views.move_to_end(key)
        return self._views[key]

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
        if run.model.options.get("retrieval") is None:
            raise GolddiffError(f"{run.settings.method} has no golden subset: choose golddiff, pca, ls or optimal")
        if not run.steps:
            raise GolddiffError("this run has no steps yet: follow it first")

        def end(ending: Ending, error: Exception | None) -> None:
            feed.add(End(state=ending, message=explained(error)), last=True)

        feed = Feed(lambda: task.cancel())
        task = self.worker.start(run.compare(), feed.add, end)
        self._checks.add(feed)
        return feed


def check(settings: RunSettings) -> None:
    """Refuses names that are unknown, and samplers that do not go with the schedule."""
    for key, name, known in (
        ("method", settings.method, METHODS),
        ("schedule", settings.schedule, SCHEDULES),
        ("sampler", settings.sampler, SAMPLERS),
    ):
        if name not in known:
            raise unknown(key, name, known)
    sampler_named(settings.sampler).check(levels_from(schedule_named(settings.schedule), settings.steps))


def options_of(settings: RunSettings) -> dict[str, str]:
    """The options of the denoiser."""
    return {} if settings.retrieval is None else {"retrieval": settings.retrieval}


def described(step: Step, seconds: float, screen: Screen) -> StepEvent:
    """A step as the page is told of it."""
    alpha, sigma = float(step.noise.alpha), float(step.noise.sigma)
    posterior = step.posterior
    return StepEvent(
        index=step.index,
        count=step.count,
        time=step.time,
        alpha=alpha,
        sigma=sigma,
        rho=sigma / alpha if alpha > 0 else None,
        seconds=seconds,
        noisy=screen.picture(step.x_t[0] / (alpha**2 + sigma**2) ** 0.5),
        mean=screen.picture(posterior.mean[0]),
        ess=support_of(posterior),
        golden=posterior.support.size if posterior.support else None,
        eligible=int(posterior.support.eligible[0]) if posterior.support else None,
    )


def support_of(posterior: Posterior) -> Support | None:
    """Quantiles of the effective number of rows over the pixels."""
    if posterior.ess is None:
        return None
    ess = posterior.ess[0].double().flatten()
    low, median, high = torch.quantile(ess, ess.new_tensor([0.1, 0.5, 0.9])).tolist()
    return Support(low=low, median=median, high=high)


def bytes_of(step: Step) -> int:
    """About what a step takes while it is remembered."""
    posterior = step.posterior
    held: list[Tensor | None] = [step.x_t, step.x_next, posterior.mean, posterior.log_evidence, posterior.ess]
    if posterior.support is not None:
        held += [posterior.support.rows, posterior.support.log_q]
    return sum(t.numel() * t.element_size() for t in held if t is not None)


def explained(error: Exception | None) -> str:
    """What to tell a viewer of an error: what the library says of it, and no more than the kind of any other."""
    if error is None:
        return ""
    if isinstance(error, GolddiffError):
        return str(error)
    logging.getLogger(__name__).error("a run failed", exc_info=error)
    return f"the server failed ({type(error).__name__}): its log says more"


def classes_of(bank: Bank) -> list[ClassInfo]:
    """The classes of a bank, with how many rows each has."""
    labels, counts = bank.labels[bank.labels >= 0].unique(return_counts=True)
    names = bank.classes
    return [
        ClassInfo(label=label, name=names[label] if label < len(names) else str(label), rows=count)
        for label, count in zip(labels.tolist(), counts.tolist(), strict=True)
    ]
