"""The server's answers: the page, and what it asks."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Request
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from pydantic import BeforeValidator
from pydantic_core import PydanticCustomError
from starlette.exceptions import HTTPException
from starlette.routing import Match

from ..bank import Bank
from ..denoise import METHODS
from ..errors import GolddiffError
from ..noise import SCHEDULES
from ..sample import SAMPLERS
from .feed import Following
from .guard import Guard
from .models import (
    MOST_SEED,
    Alive,
    BankInfo,
    Compared,
    End,
    Limits,
    MethodInfo,
    Problem,
    RunInfo,
    RunSettings,
    Sources,
    StepEvent,
)
from .run import PATCHES
from .runs import Explorer, Gone
from .work import Busy

__all__ = ["application"]

PAGE = Path(__file__).parent / "page"
KINDS = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
LIGHT_STATISTICS = 2**33  # N D^2 up to which statistics are computed again without asking
ABOUT = {
    "optimal": "The exact posterior mean over whole images. At low noise it copies training images.",
    "pca": "Every pixel has a posterior of its own, which looks at the pixels that a PCA mask lets vote. All rows.",
    "golddiff": "As pca, over a golden subset of the rows: those that carry the weights.",
    "ls": "Every pixel looks at a square window around itself.",
    "wiener": "Linear: from mean and covariance of the bank. It has no rows.",
    "els": "Patches from any place of any image.",
    "bbels": "Patches from any place with the same distance to the border.",
    "pspc": "Square crops, averaged where they overlap.",
    "cfdm": "The optimal denoiser, smoothed by random shifts.",
    "knn": "Whole images: the nearest, and random proposals.",
    "nearest": "The nearest training image, whatever the noise.",
}
RETRIEVALS = {
    "optimal": ["full", "certified", "reference", "paper"],
    "pca": ["full", "local", "reference", "paper"],
    "golddiff": ["local", "full", "reference", "paper"],
    "ls": ["full", "local", "reference", "paper"],
}
WITHOUT_WEIGHTS = ("wiener", *PATCHES)
STOPPING = "the server is stopping: start it again"
NOT_FOUND = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Not found: golddiff</title>
<meta name="viewport" content="width=device-width"><link rel="stylesheet" href="/page/style.css">
<main class="lost"><h1>There is nothing at this address</h1>
<p>The explorer is at <a href="/">the top of this server</a>.</p></main></html>"""


def digits(value: str) -> str:
    """A number in a path, which has one name only."""
    if not re.fullmatch("0|[1-9][0-9]{0,15}", value):
        raise PydanticCustomError("digits", "give a whole number from 0 on, in digits alone")
    return value


Id = Annotated[str, InPath(min_length=1, max_length=32, pattern=r"^[A-Za-z0-9_-]+$", description="Of a run.")]
Row = Annotated[int, InPath(ge=0, le=MOST_SEED), BeforeValidator(digits)]
Whole = Annotated[int, InPath(ge=0, le=10**6), BeforeValidator(digits)]


def problems(said: dict[int, str]) -> dict[int | str, dict[str, Any]]:
    """The documentation of refusals."""
    return {status: {"model": Problem, "description": text} for status, text in said.items()}


GUARDED = problems(
    {
        400: "No request that has one meaning.",
        401: "The token is missing.",
        403: "From a page of another site.",
        408: "The request came too slowly.",
        413: "Too large.",
        421: "Not addressed to this server.",
        431: "Address and headers are too long.",
        429: "Too much is asked, or under way: come back after as many seconds as Retry-After says.",
        503: "The server is stopping, or has too many connections.",
    }
)
WRONG = problems({422: "It cannot be done as asked."})
NOT_THERE = problems({404: "Not there."})
OF_A_RUN = {**NOT_THERE, **WRONG, **problems({410: "No longer there: run it again."})}
NEXT = {
    name: {"operationId": name, "parameters": {"id": "$response.body#/id"}}
    for name in ("state", "cancel", "follow", "exact", "of_image", "of_pixel")
}
"""What can be asked of a new run."""


def lines_of(*events: Any) -> dict[int | str, dict[str, Any]]:
    """The documentation of an answer of many lines."""
    names = " or ".join(event.__name__ for event in events)
    schema = {"type": "string", "description": f"Lines of JSON, each {names}."}
    return {200: {"content": {"application/x-ndjson": {"schema": schema}}, "description": names}, **OF_A_RUN}


def application(explorer: Explorer, token: str | None = None) -> FastAPI:
    """The web application.

    Arguments:
        token: what a client has to show; None on loopback, where the Host header is checked instead.
    """
    app = FastAPI(
        title="golddiff explorer",
        version=_version(),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,  # their address would be made of the Host header
        responses=GUARDED,
        generate_unique_id_function=lambda route: route.name,
    )
    app.add_middleware(Guard, token=token)
    _say_what_is_wrong(app, explorer)
    _add_page(app)
    _add_bank(app, explorer)
    _add_runs(app, explorer)
    _add_questions(app, explorer)
    return app


def _version() -> str:
    from .. import __version__

    return __version__


async def _asked(explorer: Explorer, question: Callable[[], Any]) -> Any:
    """The worker's answer to a question."""
    try:
        return await asyncio.wrap_future(explorer.worker.ask(question))
    except asyncio.CancelledError:
        if explorer.worker.stopped:
            raise HTTPException(503, STOPPING) from None
        raise


def _say_what_is_wrong(app: FastAPI, explorer: Explorer) -> None:
    """Every refusal is one sentence under `detail`."""

    @app.exception_handler(GolddiffError)
    async def refused(request: Request, error: GolddiffError) -> Response:
        return JSONResponse({"detail": str(error)}, 422)

    @app.exception_handler(Gone)
    async def gone(request: Request, error: Gone) -> Response:
        return JSONResponse({"detail": str(error)}, 410 if error.expired else 404)

    @app.exception_handler(Busy)
    async def busy(request: Request, error: Busy) -> Response:
        if explorer.worker.stopped:
            return JSONResponse({"detail": STOPPING}, 503)
        return JSONResponse({"detail": str(error)}, 429, {"Retry-After": "5"})

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return JSONResponse({"detail": "the body of this request is no JSON"}, 422)
        where = ".".join(str(part) for part in first["loc"][1:]) or str(first["loc"][0])
        return JSONResponse({"detail": f"{where}: {first['msg']}"}, 422)

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> Response:
        if error.status_code == 404 and not request.scope["path"].startswith("/api/"):
            return HTMLResponse(NOT_FOUND, 404)
        if error.status_code == 405:  # of all routes of the path, not of the first only
            found = [route for route in app.routes if route.matches(request.scope)[0] is not Match.NONE]
            allowed = {method for route in found for method in getattr(route, "methods", None) or ()}
            return JSONResponse({"detail": "this cannot be done here"}, 405, {"Allow": ", ".join(sorted(allowed))})
        return JSONResponse({"detail": error.detail}, error.status_code, error.headers)


def _add_page(app: FastAPI) -> None:
    """The files of the page, read now: no request opens a file."""
    home = (PAGE / "index.html").resolve().parent  # links may lead into it, nowhere else
    files = {
        path.relative_to(PAGE).as_posix(): (path.read_bytes(), f"{KINDS[path.suffix]}; charset=utf-8")
        for path in PAGE.rglob("*")
        if path.suffix in KINDS and path.resolve().is_relative_to(home)
    }

    def file(name: str) -> Response:
        if name not in files:
            raise HTTPException(404)
        content, kind = files[name]
        return Response(content, media_type=kind, headers={"Cache-Control": "no-cache"})

    @app.get("/", include_in_schema=False)
    async def index() -> Response:
        return file("index.html")

    @app.get("/page/{name:path}", include_in_schema=False)
    async def part(name: str) -> Response:
        return file(name)

    @app.get("/favicon.ico", include_in_schema=False)
    async def icon() -> Response:
        return file("icon.svg")


def _add_bank(app: FastAPI, explorer: Explorer) -> None:
    bank = explorer.bank

    @app.get("/api/bank")
    def info() -> BankInfo:
        """What there is to choose from."""
        return described(explorer)

    @app.get(
        "/api/rows/{row}.png",
        response_class=Response,
        responses={200: {"content": {"image/png": {}}, "description": "A PNG file."}, **NOT_THERE, **WRONG},
    )
    def thumb(row: Row) -> Response:
        """A training image, small."""
        if row >= len(bank.pixels):
            raise HTTPException(404, f"there is no row {row}: this bank has {len(bank.pixels)}, counted from 0")
        headers = {"Cache-Control": "private, max-age=86400"}
        return Response(explorer.screen.thumb(row), media_type="image/png", headers=headers)


def _add_runs(app: FastAPI, explorer: Explorer) -> None:
    def alive() -> str:
        others = max(0, explorer.worker.waiting - 1)
        return Alive(others=others, preparing=not explorer.prepared).model_dump_json() + "\n"

    @app.post("/api/runs", status_code=201, responses={201: {"links": NEXT}, **WRONG})
    async def create(settings: RunSettings) -> RunInfo:
        """Prepares a run; it is computed while somebody follows it."""
        return (await _asked(explorer, lambda: explorer.open(settings))).info()

    @app.get("/api/runs/{id}", responses=OF_A_RUN)
    def state(id: Id) -> RunInfo:
        """A run as it stands."""
        return explorer.run(id).info()

    @app.delete("/api/runs/{id}", responses=OF_A_RUN)
    def cancel(id: Id) -> RunInfo:
        """Ends a run before its next step; the steps that are done stay."""
        run = explorer.run(id)
        run.cancel()
        return run.info()

    @app.get("/api/runs/{id}/steps", response_class=StreamingResponse, responses=lines_of(StepEvent, Alive, End))
    async def follow(id: Id) -> Response:
        """The steps of a run as they are computed, one a line. When nobody reads them any more the run is cancelled."""
        run = explorer.run(id)
        run.begin(explorer.worker)
        return Following(run.feed, alive)

    @app.get("/api/runs/{id}/exact", response_class=StreamingResponse, responses=lines_of(Compared, Alive, End))
    async def exact(id: Id) -> Response:
        """Every step that is done beside the exact scan of the same locality, one a line, while somebody reads."""
        return Following(explorer.checking(explorer.run(id)), alive)


def _add_questions(app: FastAPI, explorer: Explorer) -> None:
    superseded: dict[int | str, dict[str, Any]] = {204: {"description": "Another question came before the answer."}}

    @app.get("/api/runs/{id}/steps/{index}/sources", responses={**superseded, **OF_A_RUN}, response_model=Sources)
    async def of_image(id: Id, index: Whole, every: bool = False) -> Sources | Response:
        """The rows that made the posterior mean of a step: from as many pixels as do not take long, or from every one,
        then with a map of which row dominates each pixel."""
        found = await asyncio.wrap_future(explorer.run(id).sources(index, every, explorer.worker))
        return Response(status_code=204) if found is None else found

    @app.get("/api/runs/{id}/steps/{index}/pixels/{y}/{x}", responses=OF_A_RUN)
    async def of_pixel(id: Id, index: Whole, y: Whole, x: Whole) -> Sources:
        """The rows that made a pixel, with their exact weights."""
        run = explorer.run(id)
        _, height, width = explorer.bank.shape
        if y >= height or x >= width:
            raise HTTPException(404, f"there is no pixel {y}, {x}: images are {height} x {width}, counted from 0")
        return await _asked(explorer, lambda: run.pixel(index, y, x))


def described(explorer: Explorer) -> BankInfo:
    """What the page is told of the bank."""
    bank = explorer.bank
    methods = [
        MethodInfo(
            name=name,
            about=ABOUT.get(name, ""),
            retrievals=RETRIEVALS.get(name, []),
            retrieval=RETRIEVALS[name][0] if name in RETRIEVALS else None,
            rows=name not in WITHOUT_WEIGHTS,
        )
        for name in sorted(METHODS, key=lambda name: list(ABOUT).index(name) if name in ABOUT else 99)
    ]
    light = len(bank) * bank.D**2 <= LIGHT_STATISTICS
    return BankInfo(
        name=_name_of(bank),
        fingerprint=bank.fingerprint,
        rows=len(bank),
        shape=list(bank.shape),
        classes=explorer.classes,
        methods=methods,
        schedules=list(SCHEDULES),
        samplers=list(SAMPLERS),
        statistics="recompute" if light else "keep",
        display=explorer.screen.note,
        limits=Limits(),
        instance=explorer.instance,
        prepared=explorer.prepared,
        version=_version(),
    )


def _name_of(bank: Bank) -> str:
    """What a bank is called: the last part of where it came from, no path of this disk."""
    name = str(bank.source.get("name") or "bank")
    return Path(name).name or name
