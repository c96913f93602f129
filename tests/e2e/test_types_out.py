"""From an HTTP call to the customer's phone, by way of queue, worker, child and client: a file, a poll, an edit, …"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import aiohttp
from PIL import Image

from tests.support.gateway import ADMIN_KEY
from tests.support.stack import Stack


async def test_what_a_tenant_sends_is_what_the_customer_gets(tmp_path: Path, migrated_url: str) -> None:
    out = io.BytesIO()
    Image.new("RGB", (64, 32), (200, 30, 30)).save(out, "PNG")
    picture = out.getvalue()
    async with Stack(tmp_path, migrated_url) as stack:
        mei = stack.sandbox.person("+60111222333", "Mei")

        async def send(**fields: Any) -> tuple[str, Any]:
            body = {
                "tenant_id": stack.tenant,
                "channel_session_id": stack.session,
                "recipient": mei.number,
                **fields,
            }
            answer = await stack.gateway.ok("POST", "/send", body)
            assert "channel_message_id" in answer, answer
            got = await mei.next_message()
            assert got.id == answer["channel_message_id"]
            return answer["channel_message_id"], got

        logins = len(stack.sandbox.logins)
        await stack.gateway.ok(
            "PATCH",
            f"/sessions/{stack.tenant}/{stack.session}",
            {"settings": {"read_receipts": True, "typing": True}},
        )
        await stack.sandbox.logins.wait_for(
            lambda _: True, start=logins
        )  # it comes back with its new settings
        await stack.active()
        question = await mei.send_text(stack.shop, "Do you have it in red?")
        await stack.stored([question])

        async with aiohttp.ClientSession() as http:
            upload = await http.post(
                f"{stack.gateway.url}/api/v1/messaging/uploads?tenant_id={stack.tenant}&filename=red.png",
                data=picture,
                headers={"Authorization": f"Bearer {ADMIN_KEY}", "Content-Type": "application/octet-stream"},
            )
            assert upload.status == 201, await upload.text()
            upload_id = (await upload.json())["id"]
        photo, got = await send(
            message_type="image",
            media_url=f"upload:{upload_id}",
            content="Like this?",
            reply_to_message_id=question,
        )
        assert (got.kind, got.text, mei.media_bytes(got.message)) == ("image", "Like this?", picture)
        assert got.message.imageMessage.contextInfo.stanzaID == question
        row = await stack.db.fetchrow(
            "SELECT delivery_status, media_metadata FROM et_messages WHERE channel_message_id = $1", photo
        )
        assert row is not None
        assert row["media_metadata"]["width"] == 64

        _, got = await send(message_type="reaction", payload={"emoji": "👍"}, reply_to_message_id=question)
        assert (got.about, got.message.reactionMessage.key.fromMe) == (
            {"emoji": "👍", "target": question},
            False,
        )
        text, got = await send(content="RM 10")
        assert "composing" in list(mei.typing_seen)
        _, got = await send(message_type="edited", content="RM 9", reply_to_message_id=text)
        assert (got.kind, got.text, got.about["target"]) == ("edit", "RM 9", text)
        _, got = await send(message_type="deleted", reply_to_message_id=text)
        assert (got.kind, got.about["target"]) == ("revoke", text)
        poll = {"question": "Which?", "options": ["Red", "Blue"]}
        poll_id, got = await send(message_type="poll", payload=poll)
        assert got.about["options"] == ["Red", "Blue"]
        vote = await mei.vote(stack.shop, poll_id, ["Red"])
        await stack.stored([vote])
        place = {"latitude": 3.139, "longitude": 101.6869, "name": "Shop"}
        await send(message_type="location", payload=place)

        # A row that SQL put in is refused with the same words, when it is sent.
        await stack.db.fetchrow(
            "SELECT * FROM et_enqueue_outbound($1, $2, $3, NULL, 'location', payload => '{\"latitude\": 91}')",
            stack.tenant,
            stack.session,
            mei.number,
        )
        failed = await stack.until(
            lambda: stack.db.fetchrow("SELECT * FROM et_outbound_queue WHERE status = 'failed'"), "refused"
        )
        assert failed["error_code"] == "invalid_payload"
        assert failed["last_error"].startswith("payload.latitude: ")
