"""One thread that computes: long work in turns of one step, quick questions first."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, Literal

from .limits import QUESTIONS, TASKS

__all__ = ["Busy", "Ending", "Task", "Worker"]


Ending = Literal["finished", "cancelled", "failed"]
OnEnd = Callable[[Ending, Exception | None], None]


class Busy(Exception):
    """As much as allowed is under way; the message says what to do."""


class Task:
    """Work under way: an iterator, whose items go to `on_item` and whose end goes to `on_end`.

    Both are called in the thread of the worker. `on_end` gets how it ended, and the error if it failed.
    """

    def __init__(self, work: Iterator[Any], on_item: Callable[[Any], None], on_end: OnEnd) -> None:
        self.work, self.on_item, self.on_end = work, on_item, on_end
        self.cancelled = False

    def cancel(self) -> None:
        """Ends the task before its next step."""
        self.cancelled = True

    def turn(self) -> bool:
        """One step of the work; False when it has ended."""
        try:
            if not self.cancelled:
                self.on_item(next(self.work))
                return True
            error = None
        except StopIteration:
            error = None
        except Exception as raised:
            error = raised
        with suppress(Exception):
            self.work.close()  # type: ignore[attr-defined]  # a generator frees what it holds
        try:
            self.on_end("failed" if error else "cancelled" if self.cancelled else "finished", error)
        except Exception:  # nothing may end the one thread that computes
            logging.getLogger(__name__).exception("the end of a task failed")
        return False


class Worker:
    """Runs everything that computes in one thread, because compiled loops may not run in two at once.

    Tasks take turns of one item each, so two users see their steps alternate. Questions (`ask`) go before the next
    turn, so a click waits for one step at most.

    Arguments:
        most: tasks at once; more are refused. questions: that may wait.
    """

    def __init__(self, most: int = TASKS, questions: int = QUESTIONS) -> None:
        self.most, self.questions = most, questions
        self._tasks: deque[Task] = deque()
        self._patient: deque[Task] = deque()
        self._questions: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._news = threading.Condition()
        self.stopped = False
        self._count = 0
        self._thread = threading.Thread(target=self._loop, name="golddiff-worker", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Tasks under way."""
        return self._count

    def ask(self, question: Callable[[], Any]) -> Future[Any]:
        """Answers a question between two steps.

        Raises:
            Busy: too many are waiting.
        """
        answer: Future[Any] = Future()
        with self._news:
            if self.stopped:
                answer.cancel()
            elif len(self._questions) >= self.questions:
                raise Busy("too many questions are waiting: ask again in a moment")
            else:
                self._questions.append((answer, question))
                self._news.notify()
        return answer

    def start(
        self,
        work: Iterator[Any],
        on_item: Callable[[Any], None] = lambda item: None,
        on_end: OnEnd = lambda ending, error: None,
        patient: bool = False,
    ) -> Task:
        """Begins a task; a patient one gets a turn only when no other wants it.

        Raises:
            Busy: there are `most` already.
        """
        task = Task(work, on_item, on_end)
        with self._news:
            if self._count >= self.most or self.stopped:
                raise Busy("too many runs are under way: wait for one to end")
            self._count += 1
            (self._patient if patient else self._tasks).append(task)
            self._news.notify()
        return task

    def stop(self, patience: float = 0.0) -> bool:
        """Cancels everything; whether the thread has ended within `patience` seconds."""
        with self._news:
            self.stopped = True
            for task in (*self._tasks, *self._patient):
                task.cancel()
            for answer, _ in self._questions:
                answer.cancel()
            self._questions.clear()
            self._news.notify()
        self._thread.join(patience)
        return not self._thread.is_alive()

    def _loop(self) -> None:
        while True:
            with self._news:
                self._news.wait_for(lambda: self.stopped or self._questions or self._tasks or self._patient)
                queue = self._tasks or self._patient
                if self.stopped and not queue:
                    return
                question = self._questions.popleft() if self._questions else None
                task = queue.popleft() if question is None else None
                if task and self.stopped:
                    task.cancel()
            if question:
                _answer(*question)
            if task:
                going_on = task.turn()
                with self._news:
                    if going_on:
                        queue.append(task)
                    else:
                        self._count -= 1


def _answer(answer: Future[Any], question: Callable[[], Any]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(question())
    except Exception as error:
        answer.set_exception(error)
