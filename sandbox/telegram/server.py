"""The Bot API over HTTP: calls, long polling, files, webhooks, and the faults a test has ordered."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

import aiohttp
from aiohttp import web

from sandbox.telegram.faults import Action, Fault, Faults
from sandbox.telegram.methods import Methods
from sandbox.telegram.world import ApiError, Bot, Call, Json, World

_NUMBERS = frozenset({"chat_id", "message_id", "offset", "limit", "timeout", "message_thread_id", "duration",
                      "width", "height"})  # fmt: skip
_STRUCTURES = frozenset({"entities", "caption_entities", "reply_parameters", "allowed_updates", "options", "reaction",
                         "link_preview_options"})  # fmt: skip
MAX_BODY = 80 << 20
WEBHOOK_RETRY = 0.2
SLOW_SECONDS = 0.4


class Cut(Exception):
    """The connection breaks here."""


class Server:
    def __init__(self, world: World, faults: Faults) -> None:
        self._world, self._faults = world, faults
        self._methods = Methods(world)
        self.app = web.Application(client_max_size=MAX_BODY)
        self.app.router.add_route("*", "/bot{token}/{method}", self._handle)
        self.app.router.add_get("/file/bot{token}/{path:.+}", self._download)
        self._runner: web.AppRunner | None = None
        self._site: web.TCPSite | None = None
        self._hooks: asyncio.Task[None] | None = None
        self._thaw = asyncio.Event()
        self.port = 0

    # ---- life ----

    async def start(self, port: int = 0) -> None:
        self._runner = web.AppRunner(
            self.app, access_log=None, shutdown_timeout=0.5, handler_cancellation=True
        )
        await self._runner.setup()
        self.port = port
        await self.listen()
        self._hooks = asyncio.create_task(self._deliver_forever(), name="telegram.webhooks")

    async def stop(self) -> None:
        self.thaw()
        if self._hooks is not None:
            self._hooks.cancel()
            await asyncio.gather(self._hooks, return_exceptions=True)
        await self.deafen()
        if self._runner is not None:
            await self._runner.cleanup()

    async def listen(self) -> None:
        """Take connections (again)."""
        if self._site is None:
            assert self._runner is not None
            self._site = web.TCPSite(self._runner, "127.0.0.1", self.port, reuse_address=True)
            await self._site.start()
            self.port = self._runner.addresses[0][1]

    async def deafen(self) -> None:
        """Cut every connection and take no new ones."""
        if self._site is not None:
            await self._site.stop()
            self._site = None
        self.cut()

    def cut(self) -> None:
        server = self._runner.server if self._runner else None
        for connection in list(server.connections) if server else []:
            if connection.transport is not None:
                connection.transport.abort()

    def thaw(self) -> None:
        """Calls that hang are over: their connections break."""
        self._thaw.set()
        self._thaw = asyncio.Event()

    # ---- calls ----

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        bot = self._world.bots.get(request.match_info["token"])
        method = request.match_info["method"]
        if self._faults.hanging:
            await self._hang(request)
        if bot is None or bot.revoked or self._faults.refused:
            return _error(ApiError(401, "Unauthorized"))
        params: Json = {}
        fault: Fault | None = None
        try:
            fault = self._faults.meets(method, None) if self._early() else None
            if fault is not None:
                await self._break_early(request, fault)
            params = await _params(request)
            fault = self._faults.meets(method, params.get("chat_id"))
            return await self._answer(request, bot, method, params, fault)
        except Cut:
            self._world.calls.add(Call(method, bot, params, fault.action if fault else "cut"))
            if request.transport is not None:
                request.transport.abort()
            raise asyncio.CancelledError from None

    def _early(self) -> bool:
        """Whether the next fault meets a call before its body is read."""
        first = next(iter(self._faults.calls), None)
        return first is not None and first.action in (Action.CUT_BEFORE, Action.CUT_DURING)

    async def _break_early(self, request: web.Request, fault: Fault) -> None:
        if fault.action is Action.CUT_DURING:
            await request.content.read(64)
        raise Cut

    async def _answer(
        self, request: web.Request, bot: Bot, method: str, params: Json, fault: Fault | None
    ) -> web.StreamResponse:
        action = fault.action if fault else None

        def note(outcome: str) -> None:
            self._world.calls.add(Call(method, bot, params, outcome))

        if fault is not None and action is Action.ANSWER:
            note(str(fault.code))
            if fault.description.startswith("<"):  # the page of a proxy or a web server
                return web.Response(text=fault.description, status=fault.code, content_type="text/html")
            return _error(_ordered(fault))
        if action is Action.HANG_BEFORE:
            note("hang_before")
            await self._hang(request)
        try:
            if method.lower() == "getupdates":
                result = await self._get_updates(bot, params)
            else:
                result = self._methods.call(bot, method, params)
        except ApiError as error:
            note(str(error.code))
            return _error(error)
        if method.lower() != "getupdates" or result:
            note(action or "ok")
        if action is Action.CUT_AFTER:
            raise Cut
        if action is Action.HANG_AFTER:
            await self._hang(request)
        if action is Action.SLOW:
            await asyncio.sleep(SLOW_SECONDS)
        if fault is not None and action is Action.FAIL_AFTER:
            return _error(_ordered(fault))
        if action is Action.GARBAGE:
            return web.Response(text="<html>Bad gateway</html>", content_type="text/html")
        return web.json_response({"ok": True, "result": result})

    async def _hang(self, request: web.Request) -> None:
        await self._thaw.wait()
        if request.transport is not None:
            request.transport.abort()
        raise asyncio.CancelledError

    # ---- updates ----

    async def _get_updates(self, bot: Bot, params: Json) -> list[Json]:
        if bot.webhook is not None:
            raise ApiError(
                409,
                "Conflict: can't use getUpdates method while webhook is active; use deleteWebhook to delete the webhook "
                "first",
            )
        if bot.polling is not None and not bot.polling.done():
            bot.polling.set_result(None)
        mine: asyncio.Future[Json | None] = asyncio.get_running_loop().create_future()
        bot.polling = mine
        if params.get("allowed_updates") is not None:
            bot.allowed = tuple(params["allowed_updates"]) or None
        offset = int(params.get("offset") or 0)
        if offset > 0:
            kept = [update for update in bot.updates if update["update_id"] >= offset or "_again" in update]
            bot.updates.clear()
            bot.updates.extend(kept)
        deadline = time.monotonic() + float(params.get("timeout") or 0)
        try:
            while not bot.updates:
                bot.news.clear()
                left = deadline - time.monotonic()
                if left <= 0:
                    return []
                await self._something(bot, mine, left)
            found = list(bot.updates)[: int(params.get("limit") or 100)]
            again = {id(update) for update in found if update.pop("_again", None)}
            if again:
                # By identity: a copy that equals its original must not take the original's place in the queue.
                kept = [update for update in bot.updates if id(update) not in again]
                bot.updates.clear()
                bot.updates.extend(kept)
            return found
        finally:
            if bot.polling is mine:
                bot.polling = None

    async def _something(self, bot: Bot, mine: asyncio.Future[Json | None], seconds: float) -> None:
        """Until there is news, time is up, or somebody else asks. Raises ApiError."""
        news = asyncio.ensure_future(bot.news.wait())
        waiting: set[asyncio.Future[Any]] = {news, mine}
        try:
            await asyncio.wait(waiting, timeout=min(seconds, 0.5), return_when=asyncio.FIRST_COMPLETED)
        finally:
            news.cancel()
        if mine.done():
            raise ApiError(
                409,
                "Conflict: terminated by other getUpdates request; make sure that only one bot instance is running",
            )
        if self._faults.refused or bot.revoked:
            raise ApiError(401, "Unauthorized")
        if self._faults.hanging:
            await self._thaw.wait()
            raise Cut

    async def _deliver_forever(self) -> None:
        """Webhooks: one update at a time and bot, again until it is taken."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10), trust_env=False) as http:
            while True:
                waiting = [bot for bot in self._world.bots.values() if bot.webhook and bot.updates]
                if not waiting or self._faults.hanging or self._faults.refused:
                    await asyncio.sleep(0.02)
                    continue
                done = await asyncio.gather(*(self._deliver(http, bot) for bot in waiting))
                if not all(done):
                    await asyncio.sleep(WEBHOOK_RETRY)

    async def _deliver(self, http: aiohttp.ClientSession, bot: Bot) -> bool:
        hook, update = bot.webhook, bot.updates[0]
        assert hook is not None
        headers = {"X-Telegram-Bot-Api-Secret-Token": hook.secret} if hook.secret else {}
        body = {name: value for name, value in update.items() if name != "_again"}
        try:
            async with http.post(hook.url, json=body, headers=headers) as response:
                if response.status < 300:
                    with contextlib.suppress(ValueError):
                        bot.updates.remove(update)
                    return True
                hook.last_error = f"Wrong response from the webhook: {response.status} {response.reason}"
        except (aiohttp.ClientError, TimeoutError) as error:
            hook.last_error = f"Connection failed: {type(error).__name__}"
        hook.last_error_at = int(time.time())
        return False

    # ---- files ----

    async def _download(self, request: web.Request) -> web.StreamResponse:
        if self._faults.hanging:
            await self._hang(request)
        bot = self._world.bots.get(request.match_info["token"])
        path = request.match_info["path"]
        file = next((file for file in self._world.files.values() if file.path == path), None)
        if bot is None or file is None:
            return _error(ApiError(404, "Not Found"))
        fault = self._faults.meets("download", None)
        start = request.http_range.start or 0
        data = file.data[start:]
        status = 206 if start else 200
        if fault is not None and fault.action is Action.ANSWER:
            return _error(_ordered(fault))
        response = web.StreamResponse(status=status, headers={"Content-Length": str(len(data))})
        await response.prepare(request)
        if fault is not None:
            await response.write(data[: len(data) // 2])
            await asyncio.sleep(0.05)
            if request.transport is not None:
                request.transport.abort()
            raise asyncio.CancelledError
        await response.write(data)
        await response.write_eof()
        return response


def _ordered(fault: Fault) -> ApiError:
    if fault.retry_after is not None:
        words = f"Too Many Requests: retry after {fault.retry_after}"
        return ApiError(429, words, retry_after=fault.retry_after)
    return ApiError(fault.code, fault.description)


def _error(error: ApiError) -> web.Response:
    body: Json = {"ok": False, "error_code": error.code, "description": error.description}
    if error.parameters:
        body["parameters"] = error.parameters
    return web.json_response(body, status=error.code)


async def _params(request: web.Request) -> Json:
    """Of a query, a form, a multipart form or JSON: Telegram takes all of them."""
    found: Json = {name: _value(name, value) for name, value in request.query.items()}
    if request.content_type == "application/json":
        body = await request.json()
        return found | (body if isinstance(body, dict) else {})
    for name, value in (await request.post()).items():
        if isinstance(value, web.FileField):
            found[name] = (value.filename, value.file.read())
        else:
            found[name] = _value(name, str(value))
    return found


def _value(name: str, text: str) -> Any:
    if name in _NUMBERS:
        return int(text)
    if name in _STRUCTURES:
        return json.loads(text)
    return {"true": True, "false": False}.get(text, text)
