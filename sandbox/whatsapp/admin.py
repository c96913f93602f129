"""The sandbox over HTTP, on loopback alone, so that `curl` can play the customer and break the network."""

from __future__ import annotations

import contextlib
import time
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.typedefs import Handler

from sandbox.whatsapp import composing, people, reading, requests
from sandbox.whatsapp.admin_base import LONGEST_POLL, describe_group, describe_message, number_of, read
from sandbox.whatsapp.admin_faults import FaultRoutes
from sandbox.whatsapp.admin_page import PageRoutes
from sandbox.whatsapp.pairing import PairingRefused
from sandbox.whatsapp.sandbox import WhatsAppSandbox

_LOOPBACK = "127.0.0.1"


class AdminServer(FaultRoutes, PageRoutes):
    """`await start(port)` gives the address; `await stop()` ends it. Stop it before the sandbox."""

    def __init__(self, wa: WhatsAppSandbox) -> None:
        super().__init__(wa)
        self._runner: web.AppRunner | None = None
        self.url = ""

    async def start(self, port: int = 0) -> str:
        """Raises OSError when the port is taken."""
        app = web.Application(middlewares=[_errors], client_max_size=64 << 20)
        add = app.router
        add.add_get("/", self._front)
        add.add_get("/people", self._people)
        add.add_post("/people", self._new_person)
        add.add_patch("/people/{number}", self._habits)
        add.add_post("/people/{number}/scan", self._scan)
        add.add_post("/people/{number}/code", self._code)
        add.add_post("/people/{number}/send", self._send)
        add.add_post("/people/{number}/garbage", self._garbage)
        add.add_post("/people/{number}/receipt", self._receipt)
        add.add_post("/people/{number}/typing", self._typing)
        add.add_post("/people/{number}/presence", self._presence)
        add.add_post("/people/{number}/calls", self._ring)
        add.add_post("/people/{number}/calls/{call}/end", self._hang_up)
        add.add_post("/people/{number}/history", self._history)
        add.add_get("/people/{number}/polls/{id}", self._votes)
        add.add_post("/people/{number}/script", self._script)
        add.add_get("/people/{number}/messages", self._messages)
        add.add_get("/people/{number}/messages/{id}/media", self._media)
        add.add_get("/people/{number}/receipts", self._receipts)
        add.add_get("/groups", self._groups)
        add.add_post("/groups", self._new_group)
        add.add_post("/groups/{id}", self._change_group)
        self.add_fault_routes(add)
        self.add_page_routes(add)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
        await self._runner.setup()
        await web.TCPSite(self._runner, _LOOPBACK, port).start()
        self.url = f"http://{_LOOPBACK}:{self._runner.addresses[0][1]}"
        return self.url

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    # --- what is there ---

    async def _front(self, request: web.Request) -> web.StreamResponse:
        """The page for a browser, JSON for everybody else."""
        if "text/html" in request.headers.get("Accept", ""):
            return self.page("index.html")
        return await self._overview(request)

    async def _overview(self, request: web.Request) -> web.Response:
        return web.json_response(
            {
                "launch_file": str(self._wa.launch_file.resolve()),
                "client_command": self._wa.client_command(),
                "people": [self._describe(phone) for phone in self._wa.people],
                "groups": [describe_group(group) for group in self._wa.groups],
                "routes": sorted(
                    f"{route.method} {route.resource.canonical}"
                    for route in request.app.router.routes()
                    if route.resource is not None and route.method != "HEAD"
                ),
            }
        )

    async def _people(self, request: web.Request) -> web.Response:
        return web.json_response([self._describe(phone) for phone in self._wa.people])

    async def _new_person(self, request: web.Request) -> web.Response:
        body = await read(request, requests.NewPerson)
        phone = self._wa.person(body.number, body.name, auto_receipts=body.auto_receipts)
        return web.json_response(self._describe(phone), status=201)

    async def _habits(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Habits)
        if body.auto_receipts is not None:
            phone.auto_receipts = None if body.auto_receipts == "none" else body.auto_receipts
        if body.answers_retries is not None:
            phone.answers_retries = body.answers_retries
        if body.retry_delay is not None:
            phone.retry_delay = body.retry_delay
        if body.answers_media_retries is not None:
            phone.answers_media_retries = body.answers_media_retries
        return web.json_response(self._describe(phone))

    # --- linking ---

    async def _scan(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Scan)
        device = await phone.scan(body.qr)
        return web.json_response({"device": device.number, "jid": str(device.jid)}, status=201)

    async def _code(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Code)
        device = await phone.enter_code(body.code)
        return web.json_response({"device": device.number, "jid": str(device.jid)}, status=201)

    # --- talking ---

    async def _send(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Send)
        if (body.to is None) == (body.group is None):
            raise web.HTTPUnprocessableEntity(text="name either `to` (a number) or `group` (its id)")
        to = self._named(body.to or "") if body.group is None else self._group(body.group)
        return web.json_response({"id": await composing.send(phone, to, body)}, status=201)

    async def _garbage(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Garbage)
        msg_id = await phone.send_garbage(self._named(body.to), body.text, repair=body.repair)
        return web.json_response({"id": msg_id}, status=201)

    async def _receipt(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Receipt)
        send = {"delivered": phone.deliver, "read": phone.read, "played": phone.played}[body.kind]
        await send(body.id)
        return web.json_response({"id": body.id, "kind": body.kind})

    async def _typing(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Typing)
        await phone.typing(self._named(body.to), body.on, recording=body.recording)
        return web.json_response({"on": body.on})

    async def _presence(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Presence)
        if body.online:
            await phone.come_online(self._named(body.to))
        else:
            await phone.go_offline(self._named(body.to), body.last_seen)
        return web.json_response({"online": body.online})

    async def _ring(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.Ring)
        return web.json_response(
            {"call": await phone.call(self._named(body.to), video=body.video)}, status=201
        )

    async def _hang_up(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.HangUp)
        call = request.match_info["call"]
        await phone.hang_up(self._named(body.to), call, body.reason)
        return web.json_response({"call": call})

    async def _history(self, request: web.Request) -> web.Response:
        phone, body = self._person(request), await read(request, requests.MadeUpHistory)
        phone.archive.terms.per_chunk = body.per_chunk
        others = [self._named(number) for number in body.people]
        count = phone.archive.fill(others, body.each, until=int(time.time()), apart=body.apart)
        sent = {}
        if body.send:
            sent = {str(d.number): len(await phone.archive.send(d)) for d in phone.devices}
        return web.json_response({"messages": count, "chunks": sent}, status=201)

    async def _votes(self, request: web.Request) -> web.Response:
        return web.json_response(self._person(request).votes(request.match_info["id"]))

    async def _script(self, request: web.Request) -> web.Response:
        """Plays the whole script before it answers; 409 when an expected answer does not come."""
        phone, body = self._person(request), await read(request, requests.ScriptRun)
        played: list[str] = []
        script = people.Script(
            phone,
            self._named(body.to),
            body.script,
            patience=body.patience,
            told=lambda step: played.append(f"{step.verb} {step.text}".strip()),
        )
        try:
            await script.run()
        except people.ScriptFailed as error:
            return web.json_response({"played": played, "error": str(error)}, status=409)
        return web.json_response({"played": played})

    async def _messages(self, request: web.Request) -> web.Response:
        """`after`: how many are known already; `wait`: seconds to wait for a further one."""
        phone = self._person(request)
        after, wait = number_of(request, "after"), min(number_of(request, "wait"), LONGEST_POLL)
        start = int(after)
        if len(phone.received) <= start and wait > 0:
            with contextlib.suppress(TimeoutError):
                await phone.received.wait_for(start=start, timeout=wait)
        items = [describe_message(message) for message in phone.received.items[start:]]
        return web.json_response({"messages": items, "next": len(phone.received)})

    async def _media(self, request: web.Request) -> web.Response:
        phone, msg_id = self._person(request), request.match_info["id"]
        for message in (*phone.received, *phone.written):
            found = reading.media_of(message.message) if message.id == msg_id else None
            if found is not None:
                return web.Response(
                    body=phone.media_bytes(message.message),
                    headers={
                        "Content-Type": found[1].mimetype or "application/octet-stream",
                        "X-Content-Type-Options": "nosniff",
                        "Content-Security-Policy": "sandbox; default-src 'none'",
                    },
                )
        raise web.HTTPNotFound(text=f"{phone.number} has no media with the message id {msg_id}")

    async def _receipts(self, request: web.Request) -> web.Response:
        phone = self._person(request)
        return web.json_response([{"id": r.id, "kind": r.kind, "at": r.at} for r in phone.receipts])

    # --- groups ---

    async def _groups(self, request: web.Request) -> web.Response:
        return web.json_response([describe_group(group) for group in self._wa.groups])

    async def _new_group(self, request: web.Request) -> web.Response:
        body = await read(request, requests.NewGroup)
        group = self._wa.group([self._named(number) for number in body.members], body.name)
        return web.json_response(describe_group(group), status=201)

    async def _change_group(self, request: web.Request) -> web.Response:
        group, body = self._group(request.match_info["id"]), await read(request, requests.GroupChange)
        by, others = self._named(body.by), [self._named(number) for number in body.people]
        if body.do in ("rename", "describe"):
            if not body.text:
                raise web.HTTPUnprocessableEntity(text="`text` is empty")
            await (by.rename_group if body.do == "rename" else by.describe_group)(group, body.text)
        elif not others:
            raise web.HTTPUnprocessableEntity(text="`people` is empty")
        elif body.do in ("add", "remove"):
            await (by.add_to_group if body.do == "add" else by.remove_from_group)(group, *others)
        else:
            await by.promote_in_group(group, *others, on=body.do == "promote")
        return web.json_response(describe_group(group))


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    # A page in somebody's browser must not be able to reach this under a name of its own.
    if request.host.partition(":")[0] not in (_LOOPBACK, "localhost"):
        return _problem(403, "only http://127.0.0.1 and http://localhost")
    origin = request.headers.get("Origin")
    if origin is not None and urlsplit(origin).netloc != request.host:
        return _problem(403, "another page's requests are not answered")
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _problem(error.status, error.text or error.reason)
    except PairingRefused as error:
        return _problem(409, str(error))
    except ValueError as error:
        return _problem(422, str(error))


def _problem(status: int, text: str) -> web.StreamResponse:
    return web.json_response({"error": text}, status=status)
