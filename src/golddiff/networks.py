"""Networks that others trained, in the folders of diffusers, read within bounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .errors import GolddiffError
from .foreign import parse_json, read_text, regular
from .memory import require

__all__ = ["read_network", "settings", "weights_of"]

LARGEST = 2**20  # number in settings
MOST_BLOCKS, MOST_LAYERS = 64, 64  # layers of a block


def read_network(folder: Path, kind: str) -> Any:
    """A network of diffusers (extra `diffusers`), from its `config.json` and its weights as safetensors. Nothing is
    downloaded.

    Its settings say how large it is. So it is first made without memory, and may not be larger than the weights that
    are there.

    Arguments:
        kind: the name of its class.

    Raises:
        GolddiffError: diffusers is missing, or the network would not fit into memory.
        Exception: of any kind, if the files are not those of such a network.
    """
    try:
        import diffusers
    except ImportError as error:
        raise GolddiffError("networks need the extra diffusers: pip install 'golddiff[diffusers]'") from error
    config = settings(folder / "config.json")
    if config["_class_name"] != kind:
        raise ValueError(f"a {config['_class_name']}, not of {kind}")
    blocks = [value for value in config.values() if isinstance(value, list)]
    if max(map(len, blocks), default=0) > MOST_BLOCKS or int(config.get("layers_per_block") or 0) > MOST_LAYERS:
        raise ValueError("its settings ask for too many layers")
    made: Any = getattr(diffusers, kind)
    with torch.device("meta"):
        needed = sum(tensor.numel() for tensor in made.from_config(config).state_dict().values())
    stored = sum(_numbers(file) for file in weights_of(folder))
    if needed > stored:
        raise ValueError(f"its settings ask for {needed} weights, its files hold {stored}")
    require(4 * (needed + stored), f"the network of {folder}", "take a smaller one")
    model, said = made.from_pretrained(folder, local_files_only=True, use_safetensors=True, output_loading_info=True)
    for keys, fault in ((said["missing_keys"], "lack"), (said["unexpected_keys"], "hold, beside its network,")):
        if keys:
            raise ValueError(f"its files {fault} {next(iter(keys))}")
    return model


def settings(file: Path) -> dict[str, Any]:
    """What a JSON file of diffusers says, if none of its numbers is beyond all reason.

    Raises:
        OSError, ValueError, GolddiffError: it cannot be read, or one is.
    """
    found = parse_json(read_text(file))
    if not isinstance(found, dict):
        raise ValueError(f"{file.name} holds no settings")
    if any(abs(number) > LARGEST for number in _whole_numbers(found)):
        raise ValueError(f"{file.name} has a number beyond {LARGEST}")
    return found


def weights_of(folder: Path) -> list[Path]:
    """The files with the weights of a network.

    Raises:
        ValueError: there are none as safetensors.
    """
    files = sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")
    if not files:
        raise ValueError("it has no weights as safetensors")
    return files


def _whole_numbers(found: Any) -> Iterator[int]:
    if isinstance(found, int):
        yield found
    elif isinstance(found, dict | list):
        for value in found.values() if isinstance(found, dict) else found:
            yield from _whole_numbers(value)


def _numbers(file: Path) -> int:
    """How many a safetensors file holds; its header is checked against its size."""
    with safe_open(regular(file), "pt") as opened:
        return sum(torch.Size(opened.get_slice(key).get_shape()).numel() for key in opened.keys())  # noqa: SIM118
