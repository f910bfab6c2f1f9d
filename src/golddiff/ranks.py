"""Several processes at one piece of work, by torch.distributed: gloo on CPUs, NCCL on GPUs.

They are started by torchrun, or by Slurm's srun. Images can be spread over them, or the rows of the bank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed.rendezvous import rendezvous

from .errors import GolddiffError

__all__ = ["ALONE", "Ranks", "joined", "own_device", "parse_shard"]

STRIPE = 64  # neighbouring rows that go to the same rank
MEETING = timedelta(minutes=10)  # until all ranks have been started
PATIENCE = timedelta(days=7)  # a rank that dies is noticed at once; one that works may take its time


@dataclass(frozen=True)
class Ranks:
    """This process among others.

    Arguments:
        rank: 0, 1, ... of `size`.
        linked: whether they can speak to each other; those of `--shard i/n` cannot.
    """

    rank: int = 0
    size: int = 1
    linked: bool = False

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def owns(self, rows: Tensor) -> Tensor:
        """Which of some rows are this rank's, bool of the same shape; every row is some rank's."""
        return rows // STRIPE % self.size == self.rank

    def wait(self) -> None:
        """Waits for the others to come here."""
        if self.linked:
            self.gathered(torch.zeros(1))

    def gathered(self, tensor: Tensor) -> list[Tensor]:
        """The tensors of all ranks, in their order: the same on all of them, to the last bit."""
        if not self.linked:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        try:
            dist.all_gather(parts, tensor.contiguous())
        except RuntimeError as error:
            raise GolddiffError(
                f"rank {self.rank} of {self.size} has lost another rank, which says why; finished images are kept: "
                "start all of them again to go on"
            ) from error
        return parts

    def merged(self, mean: Tensor, log_total: Tensor, ess: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        r"""Mean, `logsumexp` of the logits and ess over the rows of all ranks, from those over the rows of each.

        .. math:: Z = \sum_r Z_r, \quad mean = \sum_r Z_r mean_r / Z, \quad ess = Z^2 / \sum_r Z_r^2 / ess_r

        Arguments:
            mean: `(B, D)`. log_total, ess: `(B,)` or `(B, D)`, float64.
        """
        if not self.linked:
            return mean, log_total, ess
        wide = log_total.ndim < mean.ndim
        logs = torch.stack(self.gathered(log_total.double()))
        each = (logs - logs.amax(0)).exp()
        means, sizes = (torch.stack(self.gathered(tensor.double())) for tensor in (mean, ess))
        total = each.sum(0)
        shares = each / total
        return (
            ((shares[..., None] if wide else shares) * means).sum(0),
            logs.amax(0) + total.log(),
            1 / (shares.square() / sizes).sum(0),
        )


ALONE = Ranks()


def parse_shard(text: str) -> Ranks:
    """`"2/5"`: the second of five processes that know nothing of each other.

    Raises:
        GolddiffError: not of this form, or not from 1 to n.
    """
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text.strip())
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise GolddiffError(f"shard is {text!r}: write i/n with i from 1 to n, as 2/5 for the second of five")
    return Ranks(int(found[1]) - 1, int(found[2]))


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """This process among those that a launcher has started with it, linked; alone without a launcher.

    Raises:
        GolddiffError: the others cannot be reached.
    """
    place = _from_torchrun() or _from_slurm()
    if place is None or place[1] == 1:
        yield ALONE
        return
    rank, size = place
    try:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"  # what is agreed on lies on the CPU
        store, rank, size = next(rendezvous("env://", rank, size, timeout=MEETING))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise GolddiffError(
            f"rank {rank} of {size} cannot reach the others at {where} ({error}): check MASTER_ADDR and MASTER_PORT"
        ) from error
    try:
        yield Ranks(rank, size, linked=True)
    finally:
        dist.destroy_process_group()


def own_device(device: torch.device) -> torch.device:
    """Of several GPUs that of this process, by its number on the machine."""
    if device.type != "cuda" or device.index is not None:
        return device
    local = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return torch.device("cuda", int(local) % torch.cuda.device_count() if local.isdecimal() else 0)


def _from_torchrun() -> tuple[int, int] | None:
    """Rank and size from torchrun's environment."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return None
    return _checked("RANK", "WORLD_SIZE")


def _from_slurm() -> tuple[int, int] | None:
    """Rank and size from the environment of srun; where to meet follows from the job."""
    if "SLURM_PROCID" not in os.environ or "SLURM_STEP_NUM_TASKS" not in os.environ:
        return None
    os.environ.setdefault("MASTER_ADDR", first_host(os.environ.get("SLURM_STEP_NODELIST", "localhost")))
    job = re.sub(r"\D", "", os.environ.get("SLURM_JOB_ID", "")) or "0"
    os.environ.setdefault("MASTER_PORT", str(20000 + int(job) % 20000))
    return _checked("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")


def _checked(rank: str, size: str) -> tuple[int, int]:
    said = os.environ[rank], os.environ[size]
    if not all(text.isdecimal() for text in said) or not int(said[0]) < int(said[1]):
        raise GolddiffError(f"{rank} is {said[0]!r} and {size} is {said[1]!r}: unset them, or use torchrun or srun")
    return int(said[0]), int(said[1])


def first_host(nodes: str) -> str:
    """The first host of a list as Slurm writes it: `"a[03-05,9],b"` -> `"a03"`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+))?", nodes)
    return found[1] + (found[2] or "") if found else "localhost"
