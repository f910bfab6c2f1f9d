"""What the page asks and is told, typed: the schema at `/openapi.json` is made of these."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from ..denoise import METHODS
from ..noise import SCHEDULES
from ..sample import SAMPLERS

__all__ = [
    "MOST_REMOVED",
    "MOST_SEED",
    "MOST_STEPS",
    "Alive",
    "BankInfo",
    "ClassInfo",
    "Compared",
    "End",
    "Limits",
    "MethodInfo",
    "Problem",
    "RunInfo",
    "RunSettings",
    "Source",
    "Sources",
    "StepEvent",
    "Support",
    "Without",
]

MOST_STEPS = 200
MOST_REMOVED = 1000
MOST_SEED = 2**53 - 1  # what a page can count exactly
Name = Annotated[str, StringConstraints(min_length=1, max_length=32)]
Row = Annotated[int, Field(ge=0, le=MOST_SEED)]
Label = Annotated[int, Field(ge=-1, le=MOST_SEED)]
Text = Annotated[str, BeforeValidator(lambda text: text.encode("utf-8", "replace").decode())]  # of names of any folder


class Strict(BaseModel):
    """What is asked: unknown keys and other types are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Without(Strict):
    """What is left out of the bank: rows and whole classes.

    `statistics`: what masks and Wiener know of the images left out: nothing (`recompute`), or all as before (`keep`).
    """

    rows: list[Row] = Field(default=[], max_length=MOST_REMOVED)
    labels: list[Row] = Field(default=[], max_length=MOST_REMOVED)
    statistics: Literal["recompute", "keep"] = "recompute"


class RunSettings(Strict):
    """Everything that decides a trajectory."""

    method: Name = Field(default="golddiff", examples=list(METHODS))
    retrieval: Name | None = Field(default=None, description="None: the default of the method.")
    label: Label | None = Field(default=None, description="A class; None for all.")
    seed: int = Field(default=0, ge=0, le=MOST_SEED)
    steps: int = Field(default=10, ge=1, le=MOST_STEPS)
    schedule: Name = Field(default="ddpm", examples=list(SCHEDULES))
    sampler: Name = Field(default="ddim", examples=list(SAMPLERS))
    without: Without | None = None


class RunInfo(BaseModel):
    """A run as it stands."""

    id: str
    state: Literal["waiting", "running", "finished", "cancelled", "failed"]
    steps_done: int
    settings: RunSettings
    rows: int = Field(description="Rows of the bank that the run may use.")


class Support(BaseModel):
    """Over how many rows the posterior spreads, `1 / sum w^2`: quantiles over the pixels."""

    low: float = Field(description="10 % of the pixels rest on fewer rows.")
    median: float
    high: float = Field(description="10 % of the pixels rest on more rows.")


class StepEvent(BaseModel):
    """A step that is done."""

    kind: Literal["step"] = "step"
    index: int
    count: int
    time: float
    alpha: float
    sigma: float
    rho: float | None = Field(description="sigma / alpha; null where alpha is 0.")
    seconds: float
    noisy: str = Field(description="x_t at unit variance: a PNG, base64.")
    mean: str = Field(description="The posterior mean: a PNG, base64.")
    ess: Support | None
    golden: int | None = Field(description="Rows that a pixel may rest on; null for methods without rows.")
    eligible: int | None = Field(description="Rows that could have been chosen.")


class Alive(BaseModel):
    """A sign of life while nothing else is to be said."""

    kind: Literal["alive"] = "alive"
    others: int = Field(description="Other tasks under way.")
    preparing: bool = Field(description="Masks and compiled loops are still being made.")


class End(BaseModel):
    """The last line."""

    kind: Literal["end"] = "end"
    state: Literal["finished", "cancelled", "failed"]
    message: Text = ""


class Compared(BaseModel):
    """A step of the golden subset beside the exact scan of the same locality."""

    kind: Literal["compared"] = "compared"
    index: int
    count: int
    rms: float = Field(description="Root mean square difference of a pixel; pixels span [-1, 1].")
    seconds: float
    seconds_full: float


class Source(BaseModel):
    """A row of the bank that made something."""

    row: int
    label: int
    share: float = Field(description="Its part of the weights of the region; all rows together have 1.")
    colour: str | None = Field(default=None, description="In the source map, #rrggbb.")
    area: float | None = Field(default=None, description="The part of the image where no row has more weight.")


class Sources(BaseModel):
    """Where an image or a pixel comes from."""

    rows: list[Source]
    total: int = Field(description="Rows of any weight.")
    coverage: float = Field(description="What the rows listed hold together.")
    pixels: int = Field(description="Pixels whose weights were taken.")
    of: int = Field(description="Pixels of the region.")
    value: list[float] | None = Field(default=None, description="The pixel itself, one number for each channel.")
    map: str | None = Field(default=None, description="A PNG, base64: which row has most weight at each pixel.")


class ClassInfo(BaseModel):
    label: int
    name: Text
    rows: int


class MethodInfo(BaseModel):
    name: str
    about: str
    retrievals: list[str]
    retrieval: str | None = Field(description="The default.")
    rows: bool = Field(description="Whether its weights over rows can be shown.")


class Limits(BaseModel):
    steps: int = MOST_STEPS
    removed: int = MOST_REMOVED
    seed: int = MOST_SEED


class BankInfo(BaseModel):
    """What there is to choose from."""

    name: Text
    fingerprint: str
    rows: int
    shape: list[int]
    classes: list[ClassInfo]
    methods: list[MethodInfo]
    schedules: list[str]
    samplers: list[str]
    statistics: Literal["recompute", "keep"] = Field(description="Advised for removals in this bank.")
    display: str = Field(description="How the channels are shown, where that needs saying.")
    limits: Limits
    instance: str = Field(description="Another one after the server has been started again.")
    prepared: bool
    version: str


class Problem(BaseModel):
    """What is wrong, and what to do about it."""

    detail: str
