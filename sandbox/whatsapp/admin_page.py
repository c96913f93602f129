"""The sandbox's page, and what it reads: one person's screen, answered as soon as something on it has changed."""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from sandbox.whatsapp import screen
from sandbox.whatsapp.admin_base import LONGEST_POLL, AdminBase, describe_group, number_of

_FOLDER = Path(__file__).with_name("page")
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class PageRoutes(AdminBase):
    def add_page_routes(self, add: web.UrlDispatcher) -> None:
        add.add_get("/page/{name}", self._file)
        add.add_get("/people/{number}/screen", self._screen)
        add.add_post("/people/{number}/chats/{other}/read", self._read_chat)

    def page(self, name: str) -> web.Response:
        path = _FOLDER / name
        if path.suffix not in _TYPES or path.parent != _FOLDER or not path.is_file():
            raise web.HTTPNotFound(text=f"there is no page {name}")
        return web.Response(
            body=path.read_bytes(),
            content_type=_TYPES[path.suffix],
            charset="utf-8",
            headers={
                "Content-Security-Policy": _POLICY,
                "X-Content-Type-Options": "nosniff",
                "Cache-Control": "no-cache",
            },
        )

    async def _file(self, request: web.Request) -> web.Response:
        return self.page(request.match_info["name"])

    async def _screen(self, request: web.Request) -> web.Response:
        """`with`: the chat that is open; `seen`: the version known already; `wait`: seconds to wait for a newer one."""
        phone = self._person(request)
        seen, wait = int(number_of(request, "seen")), min(number_of(request, "wait"), LONGEST_POLL)
        version = await self._wa.changed_since(seen, wait)
        names = {p.number: p.name for p in self._wa.people} | {g.id: g.name for g in self._wa.groups}
        other = request.query.get("with", "")
        return web.json_response(
            {
                "version": version,
                "people": [self._describe(p) for p in self._wa.people],
                "groups": [describe_group(g) for g in self._wa.groups if phone.lid in g.members],
                "chats": screen.overview(phone, names),
                "messages": screen.chat(phone, other, names) if other else [],
                "typing": screen.is_typing(phone, other),
            }
        )

    async def _read_chat(self, request: web.Request) -> web.Response:
        """Blue ticks for everything in this chat that has none yet."""
        phone, other = self._person(request), request.match_info["other"]
        chat = other if any(g.id == other for g in self._wa.groups) else "+" + other.removeprefix("+")
        unread = [m.id for m in screen.messages_with(phone, chat) if not m.from_me and m.id not in phone.seen]
        for msg_id in unread:
            await phone.read(msg_id)
        return web.json_response({"read": unread})
