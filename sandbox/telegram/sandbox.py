"""The sandbox as tests and the demo use it: start it, put bots and people into it, break things, look.

async with TelegramSandbox() as tg:
    bot, mei = tg.bot("@shop_bot", "Shop"), tg.person("Mei Lim")
    # the gateway runs with TELEGRAM_BASE_URL=tg.url and the credentials {"token": bot.token}
    await mei.say(bot, "hi")
    answer = await mei.next_message()
"""

from __future__ import annotations

import asyncio
import time
from types import TracebackType
from typing import Self

from sandbox.telegram.admin import Admin
from sandbox.telegram.faults import Action, Fault, Faults
from sandbox.telegram.people import Person, membership
from sandbox.telegram.server import Server
from sandbox.telegram.world import Accepted, Bot, Call, Chat, Json, World
from sandbox.whatsapp.ledger import Ledger


class TelegramSandbox:
    def __init__(self) -> None:
        self.world = World()
        self._faults = Faults()
        self._server = Server(self.world, self._faults)
        Admin(self).install(self._server.app)

    async def start(self, port: int = 0) -> None:
        await self._server.start(port)

    async def stop(self) -> None:
        await self._server.stop()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def url(self) -> str:
        """What the gateway's `TELEGRAM_BASE_URL` must be."""
        return f"http://127.0.0.1:{self._server.port}"

    # ---- who there is ----

    def bot(self, username: str = "@shop_bot", name: str = "Shop") -> Bot:
        """A new bot, as @BotFather makes it; `.token` is its log-in."""
        return self.world.add_bot(username, name)

    def person(self, name: str, *, username: str | None = None) -> Person:
        return Person(self.world, name, username=username)

    def group(
        self,
        title: str,
        members: list[Person],
        bots: list[Bot],
        *,
        supergroup: bool = True,
        forum: bool = False,
    ) -> Chat:
        """A group in which the bots see everything (privacy mode off). Its first member took them in."""
        number = self.world.new_group_id(supergroup=supergroup)
        kind = "supergroup" if supergroup else "group"
        group = Chat(number, kind, title, forum, list(members), list(bots))
        self.world.groups[number] = group
        for bot in bots:
            actor = members[0].user if members else bot.user
            bot.tell("my_chat_member", membership(self.world, bot, number, actor, "left", "member"))
        return group

    def migrate(self, group: Chat, *, tell: bool = True) -> Chat:
        """The group becomes a supergroup with another id. `tell=False`: the bots find out when they write."""
        number = self.world.new_group_id(supergroup=True)
        new = Chat(number, "supergroup", group.title, group.is_forum, group.members, group.bots)
        self.world.groups[number] = new
        group.migrated_to = number
        if tell:
            self.notice(group, {"migrate_to_chat_id": number})
            self.notice(new, {"migrate_from_chat_id": group.id})
        return new

    def notice(self, group: Chat, body: Json) -> str:
        """A service message in a group."""
        return group.members[0].send_raw(group, body) if group.members else ""

    def remove_bot(self, group: Chat, bot: Bot) -> None:
        group.bots.remove(bot)
        actor = group.members[0].user
        bot.tell("my_chat_member", membership(self.world, bot, group.id, actor, "member", "kicked"))

    def new_token(self, bot: Bot) -> str:
        """What @BotFather's /revoke does: the old token is refused from now on."""
        return self.world.new_token(bot)

    # ---- what happened ----

    @property
    def accepted(self) -> Ledger[Accepted]:
        """Every send that was taken, whatever the caller was told: what may never hold anything twice."""
        return self.world.accepted

    @property
    def calls(self) -> Ledger[Call]:
        """Every request, with its outcome (empty polls left out)."""
        return self.world.calls

    def sent(self, text: str) -> list[Accepted]:
        """How often a text went out."""
        return [one for one in self.accepted if one.text == text]

    # ---- faults ----

    def fail(
        self,
        code: int = 500,
        description: str = "Internal Server Error",
        *,
        method: str | None = None,
        times: int | None = 1,
        retry_after: int | None = None,
        to: Person | Chat | None = None,
    ) -> None:
        """The next calls are answered with this error; without `method` any call that sends something."""
        chat_id = to.id if to is not None else None
        fault = Fault(Action.ANSWER, method, code, description, retry_after, times, chat_id)
        self._faults.calls.append(fault)

    def flood(self, retry_after: int = 1, *, times: int | None = 1, method: str | None = None) -> None:
        self.fail(429, "Too Many Requests", retry_after=retry_after, times=times, method=method)

    def cut(
        self, when: str = "before", *, method: str | None = None, times: int | None = 1, code: int = 502
    ) -> None:
        """Connections of the next calls break `before`, `during` or `after` acceptance. More of the kind: `hang_before`,
        `hang_after` (no answer at all), `fail_after` (accepted, answered with `code`), `garbage`, `slow`."""
        action = Action(f"cut_{when}" if when in ("before", "during", "after") else when)
        self._faults.calls.append(Fault(action, method, code, "Bad Gateway", None, times))

    async def drop_connections(self) -> None:
        """Cut everything and refuse new connections until `come_back`."""
        await self._server.deafen()

    def cut_connections(self) -> None:
        """Cut everything once."""
        self._server.cut()

    def hang(self) -> None:
        """Take connections and answer nothing until `come_back`."""
        self._faults.hanging = True

    def refuse_tokens(self) -> None:
        """401 for everybody until `come_back`."""
        self._faults.refused = True
        for bot in self.world.bots.values():
            bot.news.set()

    async def come_back(self) -> None:
        self._faults.calls.clear()
        self._faults.hanging = self._faults.refused = False
        self._server.thaw()
        await self._server.listen()

    async def steal(self, bot: Bot) -> None:
        """Another program asks for this bot's updates once: whoever waits is told 409."""
        if bot.polling is not None and not bot.polling.done():
            bot.polling.set_result(None)

    def forget_updates(self, bot: Bot, *, next_id: int) -> None:
        """As after a week without any: ids begin anew, anywhere."""
        bot.updates.clear()
        bot.next_update = next_id

    async def wait_polled(self, bot: Bot, timeout: float = 10) -> None:
        """Until a gateway waits for updates of this bot."""
        deadline = time.monotonic() + timeout
        while bot.polling is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"nobody asks for updates of {bot.address}")
            await asyncio.sleep(0.01)
