"""Recipes: everything that decides what the images of a run are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from .bank import Bank
from .denoise import METHODS, Denoiser, denoiser
from .errors import GolddiffError, unknown
from .foreign import parse_json, read_text
from .images import NO_LABEL
from .jsons import read_json, sealed, unsealed, write_json
from .latents import reopened
from .noise import SCHEDULES
from .sample import SAMPLERS, Step, levels_from, sampler_named, trajectory

__all__ = ["DEFAULTS", "Recipe", "comparison", "parse_labels", "parse_options", "parse_seeds", "read_settings"]

FORMAT = 1
LARGEST_YAML = 2**16  # bytes; JSON, which takes less work to read, may be longer
RECIPES = Path(__file__).parent / "recipes"

DEFAULTS: dict[str, Any] = {
    "method": "golddiff",
    "options": {},
    "seeds": "0-15",
    "steps": 10,
    "schedule": "ddpm",
    "sampler": "ddim",
    "labels": [],
    "start": None,
}
"""What a run is where neither the command line nor a recipe says otherwise."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a run's images are, resolved.

    Arguments:
        bank: `name` and options of its source, `path` of its folder, `fingerprint`.
        method: name of the denoiser. options: all of its options.
        seeds: of the run.
        steps, schedule, sampler: of sampling.
        labels: the label of seed s is `labels[s % len(labels)]`; empty for none.
        start: the time that sampling begins from, see `trajectory`; None for pure noise.
        format: version of this file.
    """

    bank: dict[str, Any]
    method: str
    options: dict[str, Any]
    seeds: list[int]
    steps: int
    schedule: str
    sampler: str
    labels: list[int]
    start: float | None = None
    format: int = FORMAT

    @staticmethod
    def resolve(bank: Bank, settings: dict[str, Any]) -> tuple[Recipe, Denoiser]:
        """The recipe that settings (keys of `DEFAULTS`) stand for on a bank, and its denoiser.

        Raises:
            GolddiffError: a value that is unknown, out of range or of the wrong kind.
        """
        if len(bank.removed):
            raise GolddiffError("a recipe cannot say which images were removed: give the whole bank")
        chosen = {**DEFAULTS, **settings}
        for key, known in (("method", METHODS), ("schedule", SCHEDULES), ("sampler", SAMPLERS)):
            if not isinstance(chosen[key], str) or chosen[key] not in known:
                raise unknown(key, chosen[key], known)
        if not isinstance(chosen["options"], dict) or not all(isinstance(key, str) for key in chosen["options"]):
            raise GolddiffError(f"options is {chosen['options']!r}: write them as names and values")
        model = denoiser(chosen["method"], bank, **chosen["options"])
        if model.options.get("mask") is not None:
            raise GolddiffError("a mask cannot be stored in a recipe: give it from Python")
        steps = chosen["steps"]
        if not isinstance(steps, int) or isinstance(steps, bool):
            raise GolddiffError(f"steps is {steps!r}: give a whole number")
        levels = levels_from(SCHEDULES[chosen["schedule"]](), steps, chosen["start"])
        sampler_named(chosen["sampler"]).check(levels)
        known_bank = {**bank.source, "path": str(bank.path.resolve()) if bank.path else None}
        recipe = Recipe(
            bank={**known_bank, "fingerprint": bank.fingerprint},
            method=chosen["method"],
            options=model.options,
            seeds=parse_seeds(chosen["seeds"]),
            steps=steps,
            schedule=chosen["schedule"],
            sampler=chosen["sampler"],
            labels=parse_labels(chosen["labels"], bank),
            start=chosen["start"],
        )
        return recipe, model

    @property
    def times(self) -> list[float]:
        """The times of its steps; fewer than `steps` with a `start`."""
        return [time for time, _ in levels_from(SCHEDULES[self.schedule](), self.steps, self.start)]

    @property
    def levels(self) -> int:
        """How many steps there are."""
        return len(self.times)

    def trajectory(self, model: Denoiser, seeds: Sequence[int]) -> Iterator[Step]:
        """Samples some seeds step by step, with a denoiser of `resolve` or one like it."""
        return trajectory(
            model,
            seeds,
            steps=self.steps,
            schedule=SCHEDULES[self.schedule](),
            sampler=sampler_named(self.sampler, clip=not model.bank.is_latent),
            labels=[self.label_of(seed) for seed in seeds],
            start=self.start,
        )

    def label_of(self, seed: int) -> int:
        """The label of a seed, -1 for none."""
        return self.labels[seed % len(self.labels)] if self.labels else NO_LABEL

    def same_images(self, settings: dict[str, Any]) -> bool:
        """Whether another recipe (as read from its file) gives a seed the same image."""

        def essence(recipe: dict[str, Any]) -> dict[str, Any]:
            return {
                "start": None,
                **recipe,
                "checksum": None,
                "seeds": None,
                "bank": dict(recipe.get("bank") or {}).get("fingerprint"),
            }

        return essence(json.loads(json.dumps(asdict(self)))) == essence(settings)

    def save(self, path: Path) -> None:
        """Writes the recipe as JSON, with a checksum."""
        write_json(path, sealed(asdict(self)))


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a recipe or in a YAML or JSON file that has some of its keys.

    Raises:
        GolddiffError: no such file, not YAML or JSON, unknown keys, or a recipe of another format.
    """
    settings = _parsed(path)
    if not isinstance(settings, dict):
        raise GolddiffError(f"recipe {path} holds no settings: write lines such as 'method: golddiff'")
    settings = unsealed(settings, path)
    known = {field.name for field in fields(Recipe)}
    for key in settings:
        if key not in known:
            raise unknown(f"key in recipe {path}", key, known)
    if settings.get("format", FORMAT) != FORMAT:
        raise GolddiffError(f"recipe {path} is of format {settings['format']!r}, this is {FORMAT}: write it again")
    return settings


class _Loader(yaml.SafeLoader):
    """YAML without aliases: ten lines of them can stand for more than any memory holds."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read here")
        return super().compose_node(parent, index)


def _parsed(path: Path) -> Any:
    """What a file says in JSON or YAML: text, numbers, true, false, null, lists and names with values."""
    try:
        if path.suffix == ".json":
            said = read_json(path, "take it from a copy, or write it again")
            _check_plain(said)
            return said
        try:
            said = parse_json(read_text(path))
        except UnicodeDecodeError:
            raise
        except ValueError as error:
            if isinstance(error, GolddiffError):
                raise
            said = _Loader(read_text(path, LARGEST_YAML)).get_single_data()
        _check_plain(said)
    except (OSError, UnicodeDecodeError) as error:
        raise GolddiffError(f"recipe {path} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    except GolddiffError:
        raise
    except Exception as error:  # YAML of others fails in any way
        raise GolddiffError(f"recipe {path} is neither YAML nor JSON ({' '.join(str(error).split())[:120]})") from error
    return said


def _check_plain(value: Any) -> None:
    for part in (*value, *value.values()) if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_plain(part)
    if not (value is None or isinstance(value, str | bool | float | list | dict)) and type(value) is not int:
        raise GolddiffError(f"a recipe holds a {type(value).__name__}: write text or a number")
    if type(value) is int and abs(value) >= 2**63:
        raise GolddiffError("a recipe holds a whole number of more than 63 bits: write a smaller one")


def comparison(name: str) -> dict[str, Any]:
    """The recipe of a comparison: one that comes with golddiff, such as `paper/cifar10`, or a YAML file.

    Its keys are `bank`, `methods`, `seeds`, `steps`, `schedule`, `features` and `source`.

    Raises:
        GolddiffError: no such recipe, or one that says something else.
    """
    known = sorted(f"paper/{path.stem}" for path in (RECIPES / "paper").glob("*.yaml"))
    path = RECIPES / f"{name}.yaml" if name in known else Path(name)
    if not path.is_file():
        raise unknown("recipe", name, known)
    said = _parsed(path)
    keys = ("bank", "methods", "seeds", "steps", "schedule", "features", "source")
    if not isinstance(said, dict):
        raise GolddiffError(f"recipe {path} holds no settings: write lines such as 'bank: mnist'")
    for key in said:
        if key not in keys:
            raise unknown(f"key in recipe {path}", key, keys)
    if not isinstance(said.get("methods", []), list) or not all(isinstance(m, str) for m in said.get("methods", [])):
        raise GolddiffError(f"methods in recipe {path}: write a list of names, such as golddiff:retrieval=paper")
    return said


def open_bank(stated: Any, **building: Any) -> Bank:
    """The bank that a recipe names: by its folder if that still holds it, else from its source.

    Arguments:
        stated: a path or known name, or what a recipe stores.
        building: options of `Bank.build` for a source that is named only.

    Raises:
        GolddiffError: the fingerprint is not the recipe's.
    """
    if isinstance(stated, str):
        return Bank.build(stated, progress=True, **building)
    named = isinstance(stated, dict) and any(isinstance(stated.get(key), str) for key in ("path", "name"))
    if not named or not all(isinstance(stated.get(key), str | None) for key in ("path", "name", "fingerprint")):
        raise GolddiffError("the recipe names no bank: give one on the command line")
    wanted, path = stated.get("fingerprint"), stated.get("path")
    if path and (Path(path) / "bank.json").is_file():
        bank = Bank.open(path)
        if wanted in (None, bank.fingerprint):
            return bank
    if not stated.get("name") or stated["name"] == "array":
        raise GolddiffError(f"the recipe's bank was built from an array and is not at {path}: name one before --recipe")
    keys = ("split", "size", "limit", "layout", "flip", "skip_broken")
    options = {key: stated[key] for key in keys if stated.get(key) is not None}
    if stated.get("latents"):
        options["latents"] = reopened(stated["latents"])
    return check_fingerprint(Bank.build(stated["name"], progress=True, **options), wanted)


def check_fingerprint(bank: Bank, wanted: str | None) -> Bank:
    """The bank, if its fingerprint is the one that a recipe wants (or the recipe wants none)."""
    if wanted is not None and bank.fingerprint != wanted:
        raise GolddiffError(
            f"the recipe was made with a bank of fingerprint {wanted}, this one has {bank.fingerprint}: "
            "give the right bank, or take the fingerprint out of the recipe"
        )
    return bank


def parse_seeds(seeds: Any, what: str = "seeds") -> list[int]:
    """`"0-3,8"` or a list -> `[0, 1, 2, 3, 8]`."""
    wrong = GolddiffError(f"{what} {seeds!r}: write them as 0-15 or 3,7,20-29")
    listed: list[int] = []
    for part in str(seeds).split(",") if isinstance(seeds, str | int) else _items(seeds, wrong):
        first, dash, last = str(part).strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()) or len(first + last) > 30:
            raise wrong
        low, high = int(first), int(last if dash else first)
        if high < low:
            raise wrong
        if len(listed) + high - low >= 10**7 or high >= 2**63:
            raise GolddiffError(f"{what} {seeds!r} are too many or too large: at most 10 million, under 2^63")
        listed.extend(range(low, high + 1))
    if not listed or len(set(listed)) != len(listed):
        raise GolddiffError(f"{what} {seeds!r} name a number twice or none: write each once")
    return listed


def parse_labels(labels: Any, bank: Bank) -> list[int]:
    """`"3,7"` or names of classes -> labels that the bank has. In text, names go before numbers."""
    listed = [labels] if isinstance(labels, str | int) else [] if labels is None else labels
    parts: list[Any] = []
    for given in _items(listed, GolddiffError(f"labels {labels!r}: write them as 3 or 3,7")):
        several = isinstance(given, str) and given not in bank.classes  # a name may hold a comma
        parts += given.split(",") if several else [given]
    numbers: list[int] = []
    for part in parts:
        text = str(part).strip()
        if isinstance(part, str) and text in bank.classes:
            numbers.append(bank.classes.index(text))
        elif type(part) is int or text.removeprefix("-").isdecimal():
            numbers.append(int(text[:20]))
        else:
            names = ", ".join(bank.classes[:12]) or "none, only numbers"
            raise GolddiffError(f"no class is called '{text}': names here are {names}")
    for number in numbers:
        bank.rows_of(number)
    return numbers


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """`["k_max=5000", "mask_rule=published"]` -> a dictionary; values are numbers, true, false, null or text."""
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key:
            raise GolddiffError(f"'{pair}' is no option: write key=value, as in k_max=5000")
        options[key] = _value(text)
    return options


def _value(text: str) -> Any:
    """true, false, null, a whole number, a number, or the text itself."""
    plain = {"true": True, "false": False, "null": None}
    if text in plain:
        return plain[text]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _items(value: Any, wrong: GolddiffError) -> Iterable[Any]:
    if isinstance(value, list | tuple | range):
        return value
    raise wrong
