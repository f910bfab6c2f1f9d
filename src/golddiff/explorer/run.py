"""A run: a trajectory of one seed, and the questions about its steps."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterator
from concurrent.futures import Future
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor

from ..denoise import METHODS
from ..errors import GolddiffError, unknown
from ..noise import SCHEDULES, Noise, schedule_named
from ..posterior import Posterior
from ..sample import SAMPLERS, Step, levels_from, sampler_named, trajectory
from .feed import Feed
from .models import Compared, End, RunInfo, RunSettings, Sources, StepEvent, Support
from .show import Screen
from .sources import image_of, pixel_of
from .stock import Stock
from .work import Busy, Ending, Task, Worker

__all__ = ["PATCHES", "Run", "explained"]

PATCHES = ("els", "bbels")  # methods whose weights are not over whole images

State = Literal["waiting", "running", "finished", "cancelled", "failed"]


class Run:
    """A trajectory of one seed, computed while somebody follows it.

    What computes (`_compute`, `posterior`, `sources`, `compare`) is called in the thread of the worker.

    Attributes:
        stock: banks and denoisers. screen: how images are shown.
        rows: how many rows of the bank the run may use.
        steps: `x_t` and noise level of those that are done; their posteriors can be had again.
        feed: what its followers are told.
    """

    def __init__(self, settings: RunSettings, stock: Stock, screen: Screen) -> None:
        check(settings)
        bank = stock.bank(settings.without)
        eligible = bank.rows_of(settings.label)
        self.retrieval = stock.denoiser(settings).options.get("retrieval")
        self.id = secrets.token_urlsafe(9)
        self.settings, self.stock, self.screen = settings, stock, screen
        self.rows = len(bank) if eligible is None else len(eligible)
        self.state: State = "waiting"
        self.steps: list[tuple[Tensor, Noise]] = []
        self._sources: dict[tuple[int, bool], Sources] = {}
        self._asking: Task | None = None
        self.task: Task | None = None
        self.feed = Feed(self.cancel)

    def info(self) -> RunInfo:
        return RunInfo(id=self.id, state=self.state, steps_done=len(self.steps), settings=self.settings, rows=self.rows)

    def begin(self, worker: Worker) -> None:
        """Starts computing, if that has not been done."""
        if self.state != "waiting":
            return
        self.state = "running"
        try:
            self.task = worker.start(self._compute(), self._keep, self._end)
        except Busy:
            self.state = "waiting"
            raise

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
            self.stock.denoiser(chosen),
            [chosen.seed],
            steps=chosen.steps,
            schedule=schedule_named(chosen.schedule),
            sampler=sampler_named(chosen.sampler, clip=not self.stock.whole.is_latent),
            labels=chosen.label,
        ):
            yield step, perf_counter() - began
            began = perf_counter()

    def _keep(self, item: tuple[Step, float]) -> None:
        step, seconds = item
        event = described(step, seconds, self.screen)
        self.stock.keep((self.id, step.index), step.posterior)
        self.steps.append((step.x_t, step.noise))
        self.feed.add(event)

    def _end(self, ending: Ending, error: Exception | None) -> None:
        self.state = ending
        self.feed.add(End(state=ending, message=explained(error)), last=True)

    @property
    def bytes(self) -> int:
        """About what the run takes while it is remembered."""
        pictures = sum(map(len, self.feed.events)) + sum(len(found.map or "") for found in list(self._sources.values()))
        return pictures + sum(x_t.nbytes for x_t, _ in self.steps)

    def posterior(self, index: int) -> Posterior:
        """The posterior of a step that is done.

        Raises:
            GolddiffError: there is no such step, or it has no weights over whole images.
        """
        self.check_step(index)
        x_t, noise = self.steps[index]
        return self.stock.posterior((self.id, index), self.settings, x_t, noise)

    def check_step(self, index: int) -> None:
        """Refuses a step that is not done, and methods without weights over whole images, before any work."""
        if not 0 <= index < len(self.steps):
            raise GolddiffError(f"step {index} is not there: {len(self.steps)} steps are done, counted from 0")
        if self.settings.method in PATCHES:
            raise GolddiffError(
                f"{self.settings.method} has weights over patches, not over images: choose optimal, pca or golddiff"
            )

    def pixel(self, index: int, y: int, x: int) -> Sources:
        """The rows that made a pixel of a step."""
        return pixel_of(self.stock.whole, self.posterior(index), y, x)

    def sources(self, index: int, every: bool, worker: Worker) -> Future[Sources | None]:
        """The rows that made the mean of a step, in turns with other work; remembered.

        Another question of this kind cancels the one before, whose answer is then None.

        Arguments:
            every: from all pixels, with a source map; otherwise from as many as do not take long.
        """
        answer: Future[Sources | None] = Future()
        self.check_step(index)

        def item(found: Sources | None) -> None:
            if found is not None:
                self._sources[index, every] = found

        def end(ending: Ending, error: Exception | None) -> None:
            if answer.cancelled():  # who asked has gone
                return
            if error is not None:
                answer.set_exception(error)
            else:
                answer.set_result(self._sources.get((index, every)))

        if (index, every) in self._sources:
            end("finished", None)
            return answer
        before, self._asking = self._asking, worker.start(self._image(index, every), item, end)
        if before is not None:
            before.cancel()
        return answer

    def _image(self, index: int, every: bool) -> Iterator[Sources | None]:
        yield from image_of(self.stock.whole, self.posterior(index), every)

    def compare(self) -> Iterator[Compared]:
        """The posterior of every step beside that of all rows in the same locality."""
        full = self.stock.denoiser(self.settings.model_copy(update={"retrieval": "full"}))
        golden = self.stock.denoiser(self.settings)
        for index, (x_t, noise) in enumerate(list(self.steps)):
            timed = []
            for model in (golden, full):
                began = perf_counter()
                mean = model(x_t, noise, self.settings.label, seed=self.settings.seed).mean
                timed.append((perf_counter() - began, mean))
            (seconds, mean), (seconds_full, exact) = timed
            rms = float((mean.double() - exact.double()).square().mean().sqrt())
            yield Compared(index=index, count=len(self.steps), rms=rms, seconds=seconds, seconds_full=seconds_full)


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


def explained(error: Exception | None) -> str:
    """What to tell a viewer of an error: what the library says of it, and no more than the kind of any other."""
    if error is None:
        return ""
    if isinstance(error, GolddiffError):
        return str(error)
    logging.getLogger(__name__).error("a run failed", exc_info=error)
    return f"the server failed ({type(error).__name__}): its log says more"
