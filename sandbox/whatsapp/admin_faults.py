"""The part of the admin API that breaks things, and shows what the server has seen."""

from __future__ import annotations

from aiohttp import web

from sandbox.whatsapp import requests
from sandbox.whatsapp.admin_base import LONGEST_POLL, AdminBase, number_of, read


class FaultRoutes(AdminBase):
    def add_fault_routes(self, add: web.UrlDispatcher) -> None:
        add.add_post("/people/{number}/devices/{device}", self._act)
        add.add_get("/calls", self._calls)
        add.add_get("/rings", self._rings)
        add.add_get("/acks/{id}", self._ack)
        add.add_post("/faults/sends", self._send_faults)
        add.add_post("/faults/logins", self._login_faults)
        add.add_post("/faults/media", self._media_faults)
        add.add_post("/media/drop", self._drop_media)
        add.add_delete("/faults", self._clear)
        add.add_post("/restart", self._restart)

    async def _act(self, request: web.Request) -> web.Response:
        device, body = self._device(request), await read(request, requests.Act)
        if body.do in ("drop", "abort"):
            await self._wa.drop(device, abort=body.do == "abort")
        elif body.do in ("replace", "remove"):
            await self._wa.kick(device, "replaced" if body.do == "replace" else "removed")
        elif body.do in ("silence", "deafen"):
            self._wa.silence(device, "dead" if body.do == "silence" else "deaf")
        elif body.do == "talk":
            self._wa.unsilence(device)
        elif body.do == "forget":
            self._wa.forget_device(device)
        else:
            await self._wa.stream_error(device, body.code)
        return web.json_response({"done": body.do})

    async def _send_faults(self, request: web.Request) -> web.Response:
        body = await read(request, requests.SendFaults)
        self._wa.fail_sends(
            body.action,
            code=body.code,
            seconds=body.seconds,
            times=body.times,
            to=self._named(body.to) if body.to else None,
        )
        return web.json_response({"faults": "on"})

    async def _login_faults(self, request: web.Request) -> web.Response:
        body = await read(request, requests.LoginFaults)
        self._wa.refuse_logins(body.reason, seconds=body.seconds, attrs=body.attrs)
        return web.json_response({"faults": "on"})

    async def _media_faults(self, request: web.Request) -> web.Response:
        body = await read(request, requests.MediaFaults)
        self._wa.fail_media(
            body.action,
            status=body.status,
            seconds=body.seconds,
            times=body.times,
            message_id=body.message_id,
            upload=body.upload,
        )
        return web.json_response({"faults": "on"})

    async def _drop_media(self, request: web.Request) -> web.Response:
        body = await read(request, requests.DropMedia)
        self._wa.drop_media(body.id, body.status)
        return web.json_response({"dropped": body.id})

    async def _clear(self, request: web.Request) -> web.Response:
        self._wa.clear_faults()
        return web.json_response({"faults": "off"})

    async def _restart(self, request: web.Request) -> web.Response:
        body = await read(request, requests.Restart)
        await self._wa.restart(min(body.down_for, LONGEST_POLL))
        return web.json_response({"done": "restart"})

    async def _calls(self, request: web.Request) -> web.Response:
        start = int(number_of(request, "after"))
        items = [
            {"id": c.id, "to": str(c.to), "device": str(c.device), "outcome": c.outcome, "at": c.at}
            for c in self._wa.calls.items[start:]
        ]
        return web.json_response({"calls": items, "next": len(self._wa.calls)})

    async def _ack(self, request: web.Request) -> web.Response:
        msg_id = request.match_info["id"]
        ack = self._wa.acked(msg_id)
        written = [w.at for w in self._wa.written(msg_id)]
        return web.json_response({"id": msg_id, "written": written, "acked": ack.at if ack else None})

    async def _rings(self, _: web.Request) -> web.Response:
        return web.json_response(
            [
                {"call": r.call, "what": r.what, "from": r.caller, "to": r.to, "detail": r.detail, "at": r.at}
                for r in self._wa.rings
            ]
        )
