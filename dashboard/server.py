"""The live page of a run: one small web server that reads the run folder and nothing else.

GET /                     the page
GET /api/state            every section as one JSON object
GET /api/events           server-sent events: the sections that changed, at most once a second
GET /api/sheet/ID         what the page needs to draw a stored episode's stills
GET /api/sheet/ID.jpg     the stills
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import os
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from sse_starlette.sse import EventSourceResponse
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from dashboard.access import TokenGate
from dashboard.live import Board
from trajectories.codec import CodecError

STATIC = Path(__file__).parent / "static"
FIRST_PORT, PORTS = 8266, 100
"""Where a free port is looked for: Ray's own dashboard is on 8265."""
POLL_S = 1.0
IDLE_POLL_S = 5.0
"""With nobody watching: enough that the first look does not wait for hours of lines."""
TOKEN_VARIABLE = "PAIRLOOM_DASHBOARD_TOKEN"
START_DEADLINE_S = 20.0
STOP_DEADLINE_S = 5.0


class DashboardError(RuntimeError):
    """The page cannot be served as asked; one line saying what, the value and the remedy."""


class Dashboard:
    """The page of one run folder, served from a thread of this process or from this thread.

    Example:
        dashboard = Dashboard(Path("runs/quickstart"))
        dashboard.start()
        print(dashboard.url)
    """

    def __init__(
        self,
        folder: Path,
        *,
        host: str = "127.0.0.1",
        port: int | None = None,
        compare: Sequence[Path] = (),
        token: str | None = None,
    ) -> None:
        """Read the folders and take the port.

        Args:
            folder: the run folder; it may be of a run that goes on.
            host: where to listen. Only a loopback address without an explicit token.
            port: 1..65535; None: the first free one from FIRST_PORT up.
            compare: run folders to compare with.
            token: what a visitor must bring; None: the environment's PAIRLOOM_DASHBOARD_TOKEN, else a new random one.

        Raises:
            DashboardError: the port is in use, the host cannot be listened on, or the host can be reached from other
                machines and PAIRLOOM_DASHBOARD_TOKEN is not set.
            FileNotFoundError, RecipeError: a folder is not a run folder.
        """
        chosen = os.environ.get(TOKEN_VARIABLE)
        if not _is_loopback(host) and not chosen:
            raise DashboardError(
                f"dashboard host {host} can be reached from other machines; set {TOKEN_VARIABLE} to a token of your "
                "own to allow that, or leave the host at 127.0.0.1 and use an SSH tunnel"
            )
        self._token = token or chosen or secrets.token_urlsafe(24)
        self._board = Board(folder, compare)
        self._socket = _listen(host, port)
        self._host, self._port = host, int(self._socket.getsockname()[1])
        self._boot = secrets.token_hex(4)
        self._watchers = 0
        self._closing = False
        self._started = False
        self._ended = threading.Event()
        config = uvicorn.Config(
            self._application(),
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=2,
            ws="none",
        )
        self._server = uvicorn.Server(config)

    @property
    def url(self) -> str:
        """Where the page is, with the token: for the person who started it, and nobody else."""
        host = socket.gethostname() if _is_every_address(self._host) else self._host
        shown = f"[{host}]" if ":" in host else host
        return f"http://{shown}:{self._port}/?token={quote(self._token, safe='')}"

    def start(self) -> None:
        """Serve from a daemon thread; returns once requests are answered. Raises DashboardError when that fails."""
        self._started = True
        threading.Thread(target=self._serve, name="dashboard", daemon=True).start()
        for _ in range(int(START_DEADLINE_S / 0.02)):
            if self._server.started:
                return
            if self._ended.wait(0.02):
                break
        raise DashboardError(f"the dashboard did not start within {START_DEADLINE_S:.0f} s; try another port")

    def stop(self) -> None:
        """End the server and its thread; harmless when it never started."""
        self._closing = True
        self._server.should_exit = True
        if self._started:
            self._ended.wait(STOP_DEADLINE_S)
        self._socket.close()

    def serve_forever(self) -> None:
        """Serve until Ctrl-C; starts the server unless it has been started."""
        try:
            if not self._started:
                self.start()
            while not self._ended.wait(1):
                pass
        except KeyboardInterrupt:
            pass
        finally:
            self.stop()

    def _serve(self) -> None:
        # Waited for by an event: a join that Ctrl-C interrupts takes the thread for ended (Python 3.11).
        try:
            self._server.run(sockets=[self._socket])
        finally:
            self._ended.set()

    def _application(self) -> Starlette:
        @asynccontextmanager
        async def lifespan(_: Starlette) -> AsyncIterator[None]:
            following = asyncio.create_task(self._follow())
            yield
            following.cancel()

        # Against DNS rebinding. Who listens on every address has chosen a token, and is called by names unknown here.
        named = "*" if _is_every_address(self._host) else self._host
        trusted = ["127.0.0.1", "localhost", "::1", "[::1]", named]
        return Starlette(
            routes=[
                Route("/", _page),
                Route("/api/state", self._state),
                Route("/api/events", self._events),
                Route("/api/sheet/{name}", self._sheet),
                Mount("/static", StaticFiles(directory=STATIC)),
            ],
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=trusted, www_redirect=False),
                Middleware(TokenGate, token=self._token, cookie=f"pairloom_{self._port}"),
                Middleware(GZipMiddleware, minimum_size=1024),
            ],
            lifespan=lifespan,
        )

    async def _follow(self) -> None:
        """Look for new lines, often while somebody watches."""
        idle = IDLE_POLL_S
        while True:
            if self._watchers or idle >= IDLE_POLL_S:
                await run_in_threadpool(self._board.poll)
                idle = 0.0
            await asyncio.sleep(POLL_S)
            idle += POLL_S

    async def _state(self, _: Request) -> Response:
        await run_in_threadpool(self._board.poll)
        revision, text = await run_in_threadpool(self._board.since, -1)
        body = f'{{"since":"{self._name(revision)}","sections":{text}}}'
        return Response(body, media_type="application/json", headers={"Cache-Control": "no-store"})

    async def _events(self, request: Request) -> Response:
        known = request.headers.get("last-event-id") or request.query_params.get("since", "")
        boot, _, number = known.rpartition(".")
        ours = boot == self._boot and number.isdecimal()
        return EventSourceResponse(self._changes(int(number) if ours else -1), ping=15)

    async def _changes(self, revision: int) -> AsyncIterator[dict[str, Any]]:
        self._watchers += 1
        try:
            while not self._closing:
                if self._board.revision > revision:
                    revision, text = await run_in_threadpool(self._board.since, revision)
                    yield {"id": self._name(revision), "data": text, "retry": 2000}
                    await asyncio.sleep(POLL_S)
                await asyncio.sleep(POLL_S / 10)
        finally:
            self._watchers -= 1

    async def _sheet(self, request: Request) -> Response:
        name, _, suffix = request.path_params["name"].partition(".")
        if not name.isalnum() or suffix not in ("", "jpg"):
            return PlainTextResponse("no such episode\n", status_code=404)
        try:
            sheet = await run_in_threadpool(self._board.run.sheets.sheet, name)
        except (OSError, CodecError, ValueError) as error:
            reason = "no such episode" if isinstance(error, OSError) else f"damaged: {error}"
            return PlainTextResponse(f"{reason}\n", status_code=404)
        if suffix:
            return Response(sheet.jpeg, media_type="image/jpeg")
        return JSONResponse(sheet.describe())

    def _name(self, revision: int) -> str:
        """A revision as an event's id: another server's revisions mean something else."""
        return f"{self._boot}.{revision}"


async def _page(_: Request) -> Response:
    return FileResponse(STATIC / "index.html")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_every_address(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def _listen(host: str, port: int | None) -> socket.socket:
    """A listening socket on the port, or on the first free one."""
    wanted = range(FIRST_PORT, FIRST_PORT + PORTS) if port is None else (port,)
    reason = "ports are 1 to 65535"
    for number in wanted:
        if not 0 < number < 1 << 16:
            continue
        try:
            return socket.create_server(
                (host, number), family=socket.AF_INET6 if ":" in host else socket.AF_INET
            )
        except OSError as error:
            # A name that is not found has a number of the resolver's, below 0.
            if error.errno is not None and (error.errno < 0 or error.errno == errno.EADDRNOTAVAIL):
                reason = str(error.strerror).partition(" (while ")[0]
                raise DashboardError(
                    f"dashboard host {host}: {reason}; give --host (dashboard.host in a recipe) a name or address of "
                    "this machine, or leave it at 127.0.0.1"
                ) from error
            reason = os.strerror(error.errno) if error.errno else str(error)
    what = f"port {port}" if port is not None else f"every port from {FIRST_PORT} to {FIRST_PORT + PORTS - 1}"
    raise DashboardError(
        f"dashboard on {host}, {what}: {reason}; choose another with --port, or none for the first free one"
    )
