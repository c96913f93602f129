"""The Telegram sandbox by hand: a few routes beside the Bot API, to be a customer with `curl`."""

from __future__ import annotations

import contextlib
import json
from typing import TYPE_CHECKING, Any

from aiohttp import web

from sandbox.telegram.people import Person
from sandbox.telegram.world import Bot, Json, Received

if TYPE_CHECKING:
    from sandbox.telegram.sandbox import TelegramSandbox

MOST_SECONDS = 60.0


class Admin:
    def __init__(self, sandbox: TelegramSandbox) -> None:
        self._tg = sandbox

    def install(self, app: web.Application) -> None:
        app.router.add_get("/people", self._people)
        app.router.add_post("/people", self._new_person)
        app.router.add_post("/people/{id}/say", self._say)
        app.router.add_get("/people/{id}/messages", self._messages)

    async def _people(self, _request: web.Request) -> web.Response:
        people = [{"id": person.id, "name": person.name} for person in self._tg.world.people.values()]
        bots = [{"address": bot.address, "token": bot.token} for bot in self._tg.world.bots.values()]
        return web.json_response({"people": people, "bots": bots})

    async def _new_person(self, request: web.Request) -> web.Response:
        """`{"name": "Tan"}`"""
        person = self._tg.person(str((await _body(request)).get("name") or "Somebody"))
        return web.json_response({"id": person.id, "name": person.name}, status=201)

    async def _say(self, request: web.Request) -> web.Response:
        """`{"to": "@shop_bot", "text": "Hi"}`; also `{"react": "👍", "about": id}` and `{"do": "block"｜"unblock"}`."""
        person, body = self._person(request), await _body(request)
        bot = self._bot(body.get("to"))
        try:
            match body:
                case {"do": "block"}:
                    await person.block(bot)
                case {"do": "unblock"}:
                    await person.unblock(bot)
                case {"react": emoji, "about": str(about)}:
                    await person.react(bot, about, emoji or None)
                case {"text": str(text)} if text.strip():
                    key = await person.say(bot, text, reply_to=body.get("reply_to"))
                    return web.json_response({"id": key})
                case _:
                    raise ValueError('say {"to": "@bot", "text": "…"}')
        except ValueError as error:
            raise _refused(400, str(error)) from None
        return web.json_response({"ok": True})

    async def _messages(self, request: web.Request) -> web.Response:
        """What the bots wrote, from `after` on; waits up to `wait` seconds for the next. `next` goes into `after`."""
        person = self._person(request)
        after = int(request.query.get("after", "0"))
        wait = min(float(request.query.get("wait", "0")), MOST_SECONDS)
        if wait and len(person.received) <= after:
            with contextlib.suppress(TimeoutError):
                await person.received.wait_for(start=after, timeout=wait)
        return web.json_response(
            {
                "messages": [_shown(seen) for seen in person.received.items[after:]],
                "next": len(person.received),
            }
        )

    def _person(self, request: web.Request) -> Person:
        found = self._tg.world.people.get(int(request.match_info["id"]))
        if found is None:
            raise _refused(404, "there is no such person; GET /people lists them")
        person: Person = found
        return person

    def _bot(self, address: Any) -> Bot:
        bots = list(self._tg.world.bots.values())
        found = [bot for bot in bots if address in (None, bot.address)]
        if len(found) != 1:
            raise _refused(404, f"to: name one of {', '.join(bot.address for bot in bots)}")
        return found[0]


def _shown(seen: Received) -> Json:
    return {
        "id": seen.key,
        "kind": seen.kind,
        "text": seen.text,
        "from": seen.bot.address,
        "reply_to": seen.reply_to,
    }


async def _body(request: web.Request) -> Json:
    try:
        body = json.loads(await request.read() or b"{}")
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise _refused(400, "the body must be a JSON object")
    return body


def _refused(status: int, words: str) -> web.HTTPException:
    text = json.dumps({"error": words})
    kinds = {400: web.HTTPBadRequest, 404: web.HTTPNotFound}
    return kinds[status](text=text, content_type="application/json")
