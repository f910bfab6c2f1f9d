"""Data sets of the Hugging Face hub, through the extra `datasets`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..errors import GolddiffError
from ..foreign import regular
from .core import NO_LABEL, Images, as_labels
from .pictures import EncodedPicture, decoded

__all__ = ["HUB", "read_hub"]

HUB = {
    "mnist": "ylecun/mnist",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "cifar10": "uoft-cs/cifar10",
}


def read_hub(name: str, split: str, **options: Any) -> Images:
    """Pictures of a data set that `datasets.load_dataset(name)` finds, on the hub or in a local folder.

    Raises:
        GolddiffError: the extra is not installed, the data set is not found, or it has not one column of pictures.
    """
    try:
        import datasets
    except ImportError as error:
        raise GolddiffError(f"hf:{name} needs the extra datasets: pip install 'golddiff[datasets]'") from error
    from .parquet import LABEL_COLUMNS  # here, as pyarrow takes long to load

    try:
        table = datasets.load_dataset(name, split=split)
    except Exception as error:  # whatever a loader raises: no network, no such name, no such split
        reason = str(error).split("\n")[0][:160]
        raise GolddiffError(f"hf:{name} cannot be loaded ({reason}): check name, split and network") from error
    columns = [c for c, kind in table.features.items() if isinstance(kind, datasets.Image)]
    if len(columns) != 1:
        raise GolddiffError(f"hf:{name} has {len(columns)} columns of pictures, not one: {', '.join(table.features)}")
    column = columns[0]
    label = next((c for c in LABEL_COLUMNS if c in table.features), None)
    labels = np.full(len(table), NO_LABEL) if label is None else as_labels(table[label][:])
    kind = table.features[label] if label else None
    classes = tuple(kind.names) if isinstance(kind, datasets.ClassLabel) else ()
    encoded = table.cast_column(column, datasets.Image(decode=False)).select_columns([column])

    def fetch(i: int) -> EncodedPicture:
        cell = encoded[i][column]
        return EncodedPicture(f"hf:{name} row {i}", cell["bytes"] or regular(Path(cell["path"])))

    return decoded(len(table), fetch, labels, [str(i) for i in range(len(table))], classes, **options)
