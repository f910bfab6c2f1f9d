"""What is derived from a bank and kept beside it: spectra, masks, cells. All of it can be made again."""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import GolddiffError
from .files import save_tensors, sweep
from .foreign import regular

__all__ = ["Derived"]

FORMAT = 2  # to be raised when a formula of what is derived changes
BYTES_IN_MEMORY = 2**29
LONG_AGO = 3600.0  # seconds after which nobody still writes a file


class Derived:
    """Tensors by name, computed when first asked for, and kept in a folder and in memory.

    Arguments:
        folder: where they are kept, one safetensors file each; None keeps them in memory only.
        fingerprint: of the bank; what is there for another one, or of another format, is made again.

    Attributes:
        left: bytes that may still be put into the folder; what is larger is forgotten.
    """

    def __init__(self, folder: Path | None, fingerprint: str) -> None:
        self.folder = folder
        self.left = math.inf
        self._stamp = {"fingerprint": fingerprint, "format": str(FORMAT)}
        self._kept: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    def get(
        self,
        name: str,
        compute: Callable[[], dict[str, Tensor]],
        remember: bool = True,
        fits: Callable[[dict[str, Tensor]], bool] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors of a name: from memory, from the folder, or computed and put there.

        With `remember=False` they are not held in memory (without a folder they are then forgotten). `fits` says of
        tensors from the folder whether they can be used: compiled loops do not look whether a number leads beyond an
        array.
        """
        if name in self._kept:
            self._kept.move_to_end(name)
            return self._kept[name]
        file = self.folder / f"{name}.safetensors" if self.folder else None
        metadata, tensors = _read(file) if file and file.exists() else ({}, {})
        if fits and self._stamp.items() <= metadata.items() and not _holds(fits, tensors):
            raise GolddiffError(f"{file} does not fit its bank: remove it, it will be made again")
        if not self._stamp.items() <= metadata.items():  # not there, or of another bank or version
            tensors = {k: t.contiguous() for k, t in compute().items()}
            size = _size(tensors)
            # A bank that cannot be written to still works; it only forgets.
            if file and size <= self.left and _writable(file.parent):
                self.left -= size
                file.parent.mkdir(exist_ok=True)
                save_tensors(file, tensors, {**self._stamp, "hash": _hashed(tensors)})
                sweep(file.parent, time.time() - LONG_AGO)
                tensors = _read(file)[1]  # mapped
        if remember:
            self._kept[name] = tensors
            while len(self._kept) > 1 and sum(map(_size, self._kept.values())) > BYTES_IN_MEMORY:
                self._kept.popitem(last=False)
        return tensors

    def damaged(self) -> list[str]:
        """What is wrong with the files of the folder, one line each."""
        wrong = []
        for file in sorted(self.folder.glob("*.safetensors")) if self.folder else ():
            try:
                metadata, _ = _read(file)
                if not self._stamp.items() <= metadata.items():
                    wrong.append(f"{file.name}: it is of another bank or version, remove it")
            except GolddiffError as error:
                wrong.append(str(error))
        return wrong


def _holds(fits: Callable[[dict[str, Tensor]], bool], tensors: dict[str, Tensor]) -> bool:
    try:
        return bool(fits(tensors))
    except Exception:  # a tensor is missing, or of another kind
        return False


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _writable(folder: Path) -> bool:
    return os.access(folder if folder.exists() else folder.parent, os.W_OK)


def _read(file: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors of a file, if its bytes are those that were written."""
    try:
        with safe_open(regular(file), "pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
        if metadata.get("hash") != _hashed(tensors):
            raise SafetensorError("its bytes were changed")
    except Exception as error:  # a file that is damaged fails in any way
        raise GolddiffError(f"{file} is damaged ({error}): remove it, it will be made again") from error
    return metadata, tensors


def _hashed(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tuple(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
