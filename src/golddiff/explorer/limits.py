"""How much of the server one visitor may take, and for how long."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable

__all__ = [
    "ADDRESSES",
    "BURST",
    "CONNECTIONS",
    "KEPT",
    "LARGEST_BODY",
    "LARGEST_HEAD",
    "QUESTIONS",
    "RATE",
    "TASKS",
    "TO_ASK",
    "TO_READ",
    "TO_SEND",
    "Allowance",
]

# Sizes, in bytes. The largest request of the page, 1,000 removed images, takes 17 kB.
LARGEST_HEAD = 2**14
LARGEST_BODY = 2**16
KEPT = 2**30  # of masks and the like, beside the bank: visitors choose the noise levels

# Times, in seconds. Who does not ask, send or read in them holds a connection that another could use.
TO_ASK = 10.0  # from being connected, or answered, to the end of the head of the next request
TO_SEND = 10.0  # for the body of a request
TO_READ = 20.0  # without taking anything of an answer

# At once.
CONNECTIONS = 400  # as many again are told to come back; a process commonly has 1,024 files
TASKS = 12  # each keeps the state of a run, and makes a turn of the others so much later
QUESTIONS = 64  # that wait for the thread that computes

# Requests of one address: a token bucket. A page asks for 60 files when it opens, and for 24 pictures at each of two
# steps a second while it plays, so some pages can do that at the same time.
RATE = 200.0  # a second
BURST = 800
ADDRESSES = 1024  # that are remembered


class Allowance:
    """How many requests an address may still make: `burst` at once, and `rate` a second in the long run.

    Arguments:
        most: addresses that are remembered; one that is forgotten begins anew.
        clock: seconds.
    """

    def __init__(self, rate: float, burst: float, most: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.rate, self.burst, self.most, self.clock = rate, burst, most, clock
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # how many, and when that was

    def take(self, address: str) -> float:
        """Takes one request of an address: 0, or the seconds after which there will be one to take."""
        now = self.clock()
        left, then = self._left.pop(address, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.rate)
        self._left[address] = (left - (left >= 1), now)
        if len(self._left) > self.most:
            self._left.popitem(last=False)
        return 0.0 if left >= 1 else (1 - left) / self.rate
