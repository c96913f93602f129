"""The five scenarios the product was asked for with, through the real WhatsApp client and through the webhook."""

from __future__ import annotations

import asyncio
import base64
import time
from pathlib import Path
from typing import Any

from tests.support.stack import Stack

PIXEL = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mP8z8BQDwAEhQGAhKmMIQAAAABJRU5ErkJggg=="
)


async def test_through_the_real_client(tmp_path: Path, migrated_url: str) -> None:
    async with Stack(tmp_path, migrated_url) as stack:
        unknown = stack.sandbox.person("+60111222333", "Mei")

        # 1. An unknown sender makes a lead, a thread and a message.
        first = await unknown.send_text(stack.shop, "Hello")
        await stack.stored([first])
        row = await message(stack, first)
        assert row["external_id"] == "whatsapp:+60111222333"
        assert (row["sender_identifier"], row["content"], row["direction"], row["role"]) == (
            "+60111222333",
            "Hello",
            "inbound",
            "user",
        )

        # 2. A reply joins the same lead and thread, whichever address form it comes with.
        second = await unknown.send_text(stack.shop, "Anybody there?", mode="pn")
        await stack.stored([second])
        again = await message(stack, second)
        assert (again["lead_id"], again["thread_id"]) == (row["lead_id"], row["thread_id"])

        # 3. The same message twice is stored once, and says no error.
        await unknown.send_text(stack.shop, "Hello", msg_id=first)
        last = await unknown.send_text(stack.shop, "Bye")
        await stack.stored([first, second, last])
        assert not [line for line in stack.gateway.lines if '"level":"error"' in line]

        # 4. An image with a caption.
        image = await unknown.send_image(stack.shop, PIXEL, caption="this one")
        await stack.stored([image])
        picture = await message(stack, image)
        assert (picture["message_type"], picture["content"]) == ("image", "this one")
        assert picture["raw_payload"]["Message"]["imageMessage"]["caption"] == "this one"
        assert picture["media_metadata"]["mime_type"] == "image/png"

        # 5. A crowd: nothing lost, nothing doubled, one lead each (bench/whatsapp.py runs the full minute).
        crowd = [stack.sandbox.person(f"+6011{i:07}", f"P{i}") for i in range(50)]
        sent = await asyncio.gather(*(write(stack, person, 4) for person in crowd))
        await stack.stored([m for ids in sent for m in ids], within=40)
        leads = await stack.db.fetchval("SELECT count(*) FROM et_leads WHERE tenant_id = $1", stack.tenant)
        assert leads == 51
        assert await inversions(stack) == 0


async def test_through_the_webhook(tmp_path: Path, migrated_url: str) -> None:
    async with Stack(tmp_path, migrated_url) as stack:
        path = f"/webhook/{stack.tenant}/{stack.session}"

        async def post(*objects: dict[str, Any]) -> dict[str, Any]:
            body: Any = list(objects) if len(objects) > 1 else objects[0]
            return dict(await stack.gateway.ok("POST", path, body))

        assert (await post(baileys("A1", "60111222333", {"conversation": "Hello"})))["stored"] == 1
        assert (await post(baileys("A2", "60111222333", {"conversation": "Anybody?"})))["stored"] == 1
        answer = await post(baileys("A1", "60111222333", {"conversation": "Hello"}))
        assert (answer["stored"], answer["duplicates"], answer["errors"]) == (0, 1, [])
        assert (await message(stack, "A1"))["thread_id"] == (await message(stack, "A2"))["thread_id"]

        image = {"imageMessage": {"caption": "this one", "mimetype": "image/jpeg", "fileLength": "1234"}}
        await post(baileys("A3", "60111222333", image))
        picture = await message(stack, "A3")
        assert (picture["message_type"], picture["content"]) == ("image", "this one")
        assert picture["raw_payload"]["message"]["imageMessage"]["mimetype"] == "image/jpeg"

        # Garbage between good ones: the good are stored, the bad are named.
        mixed = await post(
            baileys("B1", "60111222334", {"conversation": "good"}),
            {"nonsense": True},
            baileys("B2", "60111222334", {"conversation": "good too"}),
        )
        assert mixed["stored"] == 2
        assert [error["index"] for error in mixed["errors"]] == [1]
        status, problem = await stack.gateway.api("POST", path, {"nonsense": True})
        assert (status, problem["title"] != "") == (422, True)

        # 1,000 messages from 100 senders, several at a time.
        began = time.monotonic()
        limit = asyncio.Semaphore(32)

        async def one(number: int) -> None:
            async with limit:
                text = {"conversation": f"m{number}"}
                await post(baileys(f"C{number}", f"6012{number % 100:07}", text))

        await asyncio.gather(*(one(number) for number in range(1000)))
        assert time.monotonic() - began < 60
        await stack.stored([f"C{number}" for number in range(1000)])
        metrics = (await stack.gateway.api("GET", "/metrics"))[1]
        assert f'wa_messages_written_total{{tenant_id="{stack.tenant}"}} 1005.0' in metrics


def baileys(message_id: str, phone: str, message: dict[str, Any]) -> dict[str, Any]:
    return {
        "key": {"id": message_id, "remoteJid": f"{phone}@s.whatsapp.net", "fromMe": False},
        "messageTimestamp": str(int(time.time())),
        "pushName": "Mei",
        "message": message,
    }


async def message(stack: Stack, channel_message_id: str) -> Any:
    return await stack.db.fetchrow(
        """
        SELECT m.*, l.external_id
        FROM et_messages m
        JOIN et_leads l ON l.id = m.lead_id
        WHERE m.channel_message_id = $1
        """,
        channel_message_id,
    )


async def write(stack: Stack, person: Any, count: int) -> list[str]:
    return [await person.send_text(stack.shop, f"{number}") for number in range(count)]


async def inversions(stack: Stack) -> int:
    """Messages of one thread that are stored in another order than they were written."""
    return int(
        await stack.db.fetchval(
            """
            SELECT count(*)
            FROM (
                SELECT content::int AS number,
                       lag(content::int) OVER (PARTITION BY thread_id ORDER BY id) AS before
                FROM et_messages
                WHERE direction = 'inbound' AND content ~ '^[0-9]+$'
            ) o
            WHERE before > number
            """
        )
    )
