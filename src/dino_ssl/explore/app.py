"""The requests of the page, and their answers.

Images are addressed by their row in the index, or the digest of an upload, and never by a path. A row is another image
in another state of the index, so the page sends the version of the one it has read. Rows are sent as uint32, values as
float32, both little endian; everything else as JSON.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import anyio.to_thread
import numpy as np
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dino_ssl.errors import UserError
from dino_ssl.explore.explorer import MAX_ITEMS, Explorer
from dino_ssl.explore.security import Application, Guard, Receive, Scope, Send
from dino_ssl.explore.selections import Conflict, as_csv
from dino_ssl.formatting import format_bytes

STATIC = Path(__file__).with_name("static")
MAP = STATIC.parents[1] / "search" / "static" / "map.js"
"""The canvas that `dino map` uses as well."""
THUMBNAIL_SIDE = 320
"""Pixels: a tile of the default size on a screen with two pixels per point."""
THUMBNAIL_THREADS = 4
"""Thumbnails that are made at a time, so that searches do not wait for a screen full of them."""
MAX_UPLOAD_BYTES = 2**26
"""Of an uploaded image; its pixels are limited as those of every image, by `image_header.MAX_PIXELS`."""
MAX_JSON_BYTES = 2**25
"""Of a request: the rows of three million images."""
KEEP = {"cache-control": "private, max-age=604800, immutable"}
"""For images, whose addresses contain the version of the index."""
VERSION_HEADER, VERSION_PARAMETER = "x-index-version", "v"
"""Where requests of the page have the version of the index; the parameter is in the addresses of images."""


def create_app(explorer: Explorer, *, token: str, port: int) -> Application:
    """Return the application that serves an index on this port of 127.0.0.1; every request needs the token."""
    index, images, limiter = explorer.index, explorer.images, anyio.CapacityLimiter(THUMBNAIL_THREADS)

    def get(path: str, handle: Callable[..., Any], kind: Callable[[Any], Response] = JSONResponse) -> Route:
        """Answer a request with what a function returns for the parameters in the path and the Request."""
        return Route(path, lambda request: kind(handle(*request.path_params.values(), request.query_params)))

    def post(path: str, handle: Callable[[Mapping[str, Any]], Any], *, writes: bool = False) -> Route:
        """Answer a request with what a function returns for its JSON object."""

        async def endpoint(request: Request) -> Response:
            if writes and explorer.read_only:
                raise HTTPException(403, "This page is read-only: it was started with `read_only`.")
            try:
                data = json.loads(await body(request, MAX_JSON_BYTES) or "{}")
            except (ValueError, RecursionError) as error:
                raise HTTPException(400, "Expected JSON.") from error
            if not isinstance(data, dict):
                raise HTTPException(400, "Expected a JSON object.")
            return JSONResponse(await run_in_threadpool(handle, data))

        return Route(path, endpoint, methods=["POST"])

    async def thumbnail(request: Request) -> Response:
        make = partial(index.thumbnail, images.row(request.path_params["source"]), THUMBNAIL_SIDE)
        return jpeg(await anyio.to_thread.run_sync(make, limiter=limiter))

    async def upload(request: Request) -> Response:
        data = await body(request, MAX_UPLOAD_BYTES)
        return JSONResponse({"source": await run_in_threadpool(images.upload, data)})

    def search(query: Mapping[str, str]) -> dict[str, Any]:
        region = [float(query[side]) for side in "xywh"] if "w" in query else None
        return explorer.search(
            query["source"], int(query.get("k", 100)), region, query.get("folder", ""), query.get("label", "")
        )

    def cancel(_: Mapping[str, Any]) -> dict[str, Any]:
        explorer.jobs.cancel()
        return explorer.jobs.state

    routes = [
        Route("/", lambda request: FileResponse(STATIC / "index.html")),
        Route("/static/map.js", lambda request: FileResponse(MAP)),
        Mount("/static", StaticFiles(directory=STATIC)),
        get("/api/index", lambda query: explorer.about),
        get("/api/rows", lambda query: explorer.rows(**query), binary),
        get("/api/items", lambda query: explorer.items(explorer.checked(json.loads(query["rows"]), MAX_ITEMS))),
        get("/api/search", search),
        Route("/api/thumbnail/{source}", thumbnail),
        Route("/api/upload", upload, methods=["POST"]),
        get("/api/image/{source}", lambda source, query: images.jpeg(source), jpeg),
        get("/api/mask/{source}", lambda source, query: images.mask_png(images.row(source)), changing_png),
        get("/api/colors/{source}", lambda source, query: images.colors_png(source), png),
        get("/api/patches/{source}", lambda source, query: images.layout(source)),
        get(
            "/api/attention/{source}",
            lambda source, query: images.attention(source, int(query["layer"]), int(query["patch"])),
            binary,
        ),
        get("/api/similarity/{source}", lambda source, query: images.similarity(source, int(query["patch"])), binary),
        post("/api/nearest-patches", explorer.nearest_patches),
        get("/api/job", lambda query: explorer.jobs.state),
        post("/api/job", explorer.start),
        post("/api/job/cancel", cancel),
        get("/api/result/{kind}", lambda kind, query: explorer.result(kind).page),
        get("/api/result/{kind}/{name}", lambda kind, name, query: explorer.result(kind).arrays[name], binary),
        get("/api/selections", lambda query: explorer.listed()),
        post("/api/selections", explorer.change, writes=True),
        get("/api/selections/{name}/csv", lambda name, query: as_csv(explorer.selected(name)), download("csv")),
        get("/api/selections/{name}/json", lambda name, query: json.dumps(explorer.selected(name)), download("json")),
        post("/api/export", explorer.export_all, writes=True),
    ]
    middleware = [Middleware(VersionCheck, version=explorer.version)]
    return Guard(Starlette(routes=routes, middleware=middleware, exception_handlers=ERRORS), token, port)


class VersionCheck:
    """ASGI application that answers 409 to a request of a page that has read another version of the index."""

    def __init__(self, app: Application, version: str) -> None:
        self.app, self.version = app, version

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on a request with this version, or without any; the page reloads itself at the other answer."""
        request = Request(scope)
        given = {request.headers.get(VERSION_HEADER), request.query_params.get(VERSION_PARAMETER)}
        if given <= {self.version, None}:
            await self.app(scope, receive, send)
        else:
            error = "The server shows another index now, or another state of it. Reload the page."
            await JSONResponse({"error": error, "version": self.version}, 409)(scope, receive, send)


async def body(request: Request, most: int) -> bytes:
    """Return the body of a request; answer 413 as soon as it is longer than this."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > most:
            raise HTTPException(413, f"Expected at most {format_bytes(most)}.")
    return bytes(data)


def binary(values: np.ndarray) -> Response:
    """Return an array as bytes, in the order of its elements."""
    return Response(np.ascontiguousarray(values).tobytes(), media_type="application/octet-stream")


def jpeg(data: bytes) -> Response:
    """Return a JPEG that the browser keeps."""
    return Response(data, media_type="image/jpeg", headers=KEEP)


def png(data: bytes) -> Response:
    """Return a PNG that the browser keeps."""
    return Response(data, media_type="image/png", headers=KEEP)


def changing_png(data: bytes) -> Response:
    """Return a PNG that the browser asks for again: masks may be those of another folder at the next start."""
    return Response(data, media_type="image/png")


def download(suffix: str) -> Callable[[str], Response]:
    """Return the function that makes a file of a text."""
    headers = {"content-disposition": f'attachment; filename="selection.{suffix}"'}
    return lambda text: Response(text, media_type="text/plain", headers=headers)


def answer(status: int, text: Callable[[Any], str]) -> Callable[[Request, Exception], Response]:
    """Return the handler of a kind of error: its status, and its text for the page."""
    return lambda request, error: JSONResponse({"error": text(error)}, status)


ERRORS: dict[Any, Any] = {
    HTTPException: lambda request, error: JSONResponse({"error": error.detail}, error.status_code),
    Conflict: answer(409, str),
    UserError: answer(400, str),
    KeyError: answer(404, lambda error: f"There is no {error}."),
    **dict.fromkeys(
        (ValueError, TypeError, OverflowError), answer(400, lambda error: "A part of the request has a wrong form.")
    ),
}
