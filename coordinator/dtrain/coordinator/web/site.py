"""The routes: pages, their streams, logs, and what may be asked for with the token."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from dtrain.coordinator.web import gate
from dtrain.coordinator.web.assets import Asset, Assets
from dtrain.coordinator.web.calls import Calls
from dtrain.coordinator.web.gate import Denied, Gate, Token
from dtrain.coordinator.web.pages import Query
from dtrain.coordinator.web.settings import DashboardSettings
from dtrain.coordinator.web.streams import STREAMS_MAX, Feed
from dtrain.protocol import codec
from dtrain.protocol.errors import Conflict, DtrainError, ErrorCode, NotFound, Refused, Unavailable

BODY_BYTES_MAX = 4096
REASON_CHARACTERS_MAX = 200
LOG_TAIL_BYTES = 16 * 1024
FOR_EVER = "public, max-age=31536000, immutable"

Handler = Callable[[Request], Awaitable[Response]]


class Site:
    """One replica's pages. ``who``: cluster, replica and version, for people."""

    def __init__(
        self,
        settings: DashboardSettings,
        who: dict[str, str],
        feed: Feed,
        calls: Calls,
        assets: Assets,
    ) -> None:
        self._settings = settings
        self._who = who
        self._feed = feed
        self._calls = calls
        self._assets = assets
        self._token = Token(settings.token_file)

    def app(self) -> Starlette:
        """Return the ASGI application."""
        shown = ("/", "/jobs/{name}", "/agents", "/replicas", "/checkpoints")
        routes = [
            *(Route(path, self._index) for path in shown),
            Route("/static/{digest}/{name}", self._static),
            Route("/healthz", self._health),
            Route("/api/view", self._guarded(self._view)),
            Route("/api/stream", self._guarded(self._stream)),
            Route("/api/replicas", self._guarded(self._replicas)),
            Route("/api/jobs/{name}/log", self._guarded(self._log)),
            Route("/api/jobs/{name}/series", self._guarded(self._series)),
            Route("/api/session", self._acting(self._session), methods=["POST"]),
            Route("/api/jobs/{name}/{action}", self._acting(self._act), methods=["POST"]),
            Route("/api/agents/{name}/{action}", self._acting(self._cordon), methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(Gate, settings=self._settings, others=self._feed.dashboards)],
        )

    # Files.

    async def _index(self, request: Request) -> Response:
        return _asset(request, self._assets.index, "no-cache")

    async def _static(self, request: Request) -> Response:
        found = self._assets.files.get(request.path_params["name"])
        if found is None or request.path_params["digest"] != self._assets.digest:
            return JSONResponse({"error": "there is no such file in this release"}, 404)
        return _asset(request, found, FOR_EVER)

    async def _health(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        age_s = self._feed.age_s()
        return JSONResponse({"replica": self._who["replica"], "mirror_age_s": age_s}, 200)

    # Reading.

    async def _view(self, request: Request) -> Response:
        revision, parts = await self._feed.page(_query(request))
        found = ",".join(f"{codec.dumps(name).decode()}:{text}" for name, text in parts.items())
        return Response(f'{{"v":1,"revision":{revision},"parts":{{{found}}}}}', media_type="application/json")

    async def _stream(self, request: Request) -> Response:
        query = _query(request)
        if self._feed.streams >= STREAMS_MAX:
            raise Denied(503, f"{STREAMS_MAX} pages are open here; ask another replica")
        seen = request.query_params.get("seen") or request.headers.get("last-event-id", "0")
        body: AsyncIterator[str] = self._feed.follow(query, int(seen) if seen.isdecimal() else 0, self._hello)
        return StreamingResponse(body, media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    def _hello(self) -> dict[str, Any]:
        return {
            **self._who,
            "now": time.time(),
            "can_act": self._token.exists,
            "static": self._assets.digest,
            "age_s": self._feed.age_s(),
        }

    async def _replicas(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        cluster = await self._feed.cluster()
        places = {name: record.address for name, record in cluster.replicas.items() if record is not None}
        return JSONResponse(await self._calls.infos(places))

    async def _log(self, request: Request) -> Response:
        asked = request.query_params
        stream = asked.get("stream", "stdout")
        found = await self._calls.log(
            request.path_params["name"],
            _number(asked.get("rank", "0"), 0, 10**6),
            stream if stream in ("stdout", "stderr", "stacks") else "stdout",
            attempt=_number(asked.get("attempt", "0"), 0, 10**9),
            offset=_number(asked.get("offset", str(-LOG_TAIL_BYTES)), -(10**6), 2**62),
        )
        return JSONResponse(found)

    async def _series(self, request: Request) -> Response:
        return JSONResponse(await self._calls.series(request.path_params["name"]))

    # Changing.

    async def _session(self, request: Request) -> Response:  # noqa: ARG002 - a route's signature
        """Only tell whether the token is the right one."""
        return JSONResponse({"ok": True})

    async def _act(self, request: Request) -> Response:
        asked = await _body(request)
        nodes = (_whole(asked.get("min", 0)), _whole(asked.get("max", 0)))
        revision = await self._calls.act(request.path_params["name"], request.path_params["action"], nodes)
        return JSONResponse({"revision": revision})

    async def _cordon(self, request: Request) -> Response:
        asked = await _body(request)
        name, action = request.path_params["name"], request.path_params["action"]
        if action == "uncordon":
            return JSONResponse({"revision": await self._calls.uncordon(name)})
        if action not in ("cordon", "drain"):
            raise Denied(404, f"{action!r} is not known: use cordon, drain or uncordon")
        reason = str(asked.get("reason", "")).strip()[:REASON_CHARACTERS_MAX]
        if not reason:
            raise Denied(400, "say why, for those who find it cordoned")
        return JSONResponse({"revision": await self._calls.cordon(name, reason, drain=action == "drain")})

    # Around each of them.

    def _guarded(self, handler: Handler) -> Handler:
        async def handle(request: Request) -> Response:
            try:
                if self._settings.reading_needs_token:
                    self._token.check(request.headers)
                response = await handler(request)
            except (Denied, DtrainError) as error:
                response = gate.problem(error, _status(error))
            except ValueError as error:
                response = gate.problem(Denied(400, str(error)))
            self._allow_siblings(request, response)
            return response

        return handle

    def _acting(self, handler: Handler) -> Handler:
        async def handle(request: Request) -> Response:
            try:
                gate.check_same_origin(request)
                self._token.check(request.headers)
                return await handler(request)
            except (Denied, DtrainError) as error:
                return gate.problem(error, _status(error))
            except ValueError as error:
                return gate.problem(Denied(400, str(error)))

        return handle

    def _allow_siblings(self, request: Request, response: Response) -> None:
        """Let a page of another replica of this cluster go on here when its own replica is gone."""
        origin = request.headers.get("origin")
        if origin and not self._settings.reading_needs_token and origin in self._feed.dashboards():
            response.headers["access-control-allow-origin"] = origin
            response.headers["vary"] = "Origin"


def _asset(request: Request, asset: Asset, cached: str) -> Response:
    packed = "gzip" in request.headers.get("accept-encoding", "")
    headers = {"cache-control": cached, "vary": "Accept-Encoding", "content-type": asset.content_type}
    if packed:
        headers["content-encoding"] = "gzip"
    return Response(asset.packed if packed else asset.body, headers=headers)


def _query(request: Request) -> Query:
    asked = request.query_params
    return Query(
        asked.get("page", "jobs"),
        asked.get("name", "")[:64],
        asked.get("phase", "")[:32],
        asked.get("text", "")[:64],
        asked.get("sort", "")[:16],
        _number(asked.get("offset", "0"), 0, 10**7),
        _number(asked.get("limit", "100"), 1, 100),
    )


def _number(text: str, least: int, most: int) -> int:
    number = int(text)
    if not least <= number <= most:
        raise ValueError(f"{number} is not between {least} and {most}")
    return number


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= 10**6:
        raise ValueError("a number of machines is needed")
    return value


async def _body(request: Request) -> dict[str, Any]:
    received = b""
    async for piece in request.stream():
        received += piece
        if len(received) > BODY_BYTES_MAX:
            raise Denied(413, f"send {BODY_BYTES_MAX} bytes at most")
    document = codec.loads(received or b"{}", bytes_max=BODY_BYTES_MAX)
    if not isinstance(document, dict):
        raise Denied(400, "send a JSON object")
    return document


def _status(error: Denied | DtrainError) -> int:
    if isinstance(error, Denied):
        return error.status
    if error.code is ErrorCode.NOT_PERMITTED:
        return 403
    kinds = ((NotFound, 404), (Refused, 400), (Conflict, 409), (Unavailable, 503))
    return next((status for kind, status in kinds if isinstance(error, kind)), 500)
