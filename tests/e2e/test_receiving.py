"""What comes in, through the whole product: the phone's past after pairing, a picture served by the API, a declined call."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import aiohttp

from sandbox.whatsapp.phone import Phone
from tests.support.gateway import ADMIN_KEY
from tests.support.media import picture
from tests.support.stack import Stack


class StackWithPast(Stack):
    """The shop's phone remembers a customer when it is linked."""

    async def pair(self, session: int, phone: Phone) -> Any:
        self.mei = self.sandbox.person("+60111222333", "Mei")
        phone.archive.fill([self.mei], 120, until=int(time.time()) - 3600)
        return await super().pair(session, phone)


async def test_the_past_a_picture_and_a_call(tmp_path: Path, migrated_url: str) -> None:
    async with StackWithPast(tmp_path, migrated_url) as stack:
        path = f"/sessions/{stack.tenant}/{stack.session}"
        await stack.until(
            lambda: stack.db.fetchval("SELECT count(*) = 120 FROM et_messages WHERE is_history"),
            "the past is stored",
            within=30,
        )
        assert await stack.db.fetchval("SELECT count(*) FROM et_decisions") == 0
        leads = await stack.db.fetch("SELECT external_id, name FROM et_leads")
        assert [tuple(lead) for lead in leads] == [("whatsapp:+60111222333", "Mei")]
        await stack.until(
            lambda: stack.db.fetchval("SELECT status = 'finished' FROM et_imports WHERE kind = 'sync'"),
            "the import says that it is over",
            within=30,
        )

        data = picture(width=40, height=30)
        image = await stack.mei.send_image(stack.shop, data, caption="this one")
        url = await stack.until(
            lambda: stack.db.fetchval(
                "SELECT media_url FROM et_messages WHERE channel_message_id = $1"
                " AND media_metadata ->> 'state' = 'stored' AND (media_metadata ->> 'width')::int = 40",
                image,
            ),
            "the picture is downloaded",
        )
        headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{stack.gateway.url}{url}", headers=headers) as answer,
        ):
            assert await answer.read() == data

        settings = {"call_policy": "decline", "call_text": "We cannot talk now: please write."}
        logins = len(stack.sandbox.logins)
        await stack.gateway.ok("PATCH", path, {"settings": settings})
        await stack.sandbox.logins.wait_for(lambda _login: True, start=logins, timeout=30)
        await stack.active()
        for _ in range(2):
            call = await stack.mei.call(stack.shop)
            await stack.sandbox.rings.wait_for(
                lambda r, call=call: r.call == call and r.what == "reject", timeout=20
            )
        text = await stack.mei.next_message(timeout=20)
        assert text.text == "We cannot talk now: please write."
        rows = await stack.db.fetch("SELECT content FROM et_messages WHERE message_type = 'unsupported'")
        assert [row["content"] for row in rows] == ["Voice call, declined automatically"] * 2
        sent = "SELECT count(*) FROM et_messages WHERE direction = 'outbound' AND NOT is_history"
        assert await stack.db.fetchval(sent) == 1
