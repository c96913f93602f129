"""Messages in the browser: they arrive live, a person answers, ticks move, trouble is told in words."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from PIL import Image

from gateway.media import MediaStore
from tests.e2e.console.conftest import Shop
from tests.support.browser import PHONE, Desk

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def test_a_message_arrives_live_and_a_person_answers_until_the_agent_is_given_back(
    desk: Desk, shop: Shop
) -> None:
    await shop.paired()
    await desk.page.goto(f"{desk.url}{shop.path}/messages")
    await desk.live()
    await shop.mei.send_text(shop.phone, "How much is a <b>loaf</b>?")
    await desk.sees("How much is a <b>loaf</b>?", "#lines")  # as text
    await desk.sees("Answered automatically · price", "#lines")
    await desk.page.wait_for_selector("#lines .tick.blue")

    await desk.page.click("text=Conversations")
    await desk.page.click("#threads a")
    await desk.live()
    await desk.sees("The agent answers", "#thread-state")
    await desk.page.fill("#text", "Hi Mei, shall I keep one?\n<script>alert(1)</script>")
    await desk.page.press("#text", "Enter")
    got = await shop.mei.wait_for_text("shall I keep one", timeout=30)
    assert got.text == "Hi Mei, shall I keep one?\n<script>alert(1)</script>"
    # By its words: until it is there, the last bubble is the agent's, with blue ticks of its own.
    mine = desk.page.locator(".bubble", has_text="shall I keep one").last
    await mine.locator(".tick.blue").wait_for()
    assert "A person" in await mine.inner_text()
    assert await desk.page.input_value("#text") == ""
    await desk.sees("A person answers", "#thread-state")

    # The agent is silent now, until it is given back.
    await shop.mei.send_text(shop.phone, "And how much is that?")
    await desk.sees("Left to the person who answers", "#timeline")
    await desk.press("Give back to the agent")
    await desk.sees("The agent answers again")
    await shop.mei.send_text(shop.phone, "how much for two?")
    async with asyncio.timeout(30):
        while sum("RM 18" in received.text for received in shop.mei.received) < 2:
            await shop.mei.received.next(30)
    assert await shop.sql(
        "SELECT array_agg(event ORDER BY id) FROM et_audit_log WHERE tenant_id = $1 AND subject_type = 'thread'",
        shop.tenant,
    ) == ["thread_taken_over", "thread_released"]


async def test_what_did_not_go_out_is_told_in_words(desk: Desk, shop: Shop) -> None:
    session = await shop.paired()
    await shop.mei.send_text(shop.phone, "Hello there")
    await desk.page.goto(f"{desk.url}{shop.path}/threads")
    await desk.page.click("#threads a")
    await desk.live()
    for text, steps in (("lost one", ("failed",)), ("torn one", ("dispatching", "unknown"))):
        queue_id = await shop.sql(
            "SELECT queue_id FROM et_enqueue_outbound(tenant_id => $1, channel_session_id => $2, recipient => $3,"
            " content => $4, send_at => now() + INTERVAL '1 hour')",
            shop.tenant,
            session,
            shop.mei.number,
            text,
        )
        await desk.sees(text, "#timeline")
        for status in steps:
            await shop.sql(
                "UPDATE et_outbound_queue SET status = $2, claim_epoch = claim_epoch + 1,"
                " last_error = CASE WHEN $2 = 'failed' THEN 'this number is not on WhatsApp' END WHERE id = $1",
                queue_id,
                status,
            )
    await desk.sees("Not sent. This number is not on WhatsApp.", "#timeline")
    await desk.sees("Not known whether it arrived. The connection was cut", "#timeline")
    assert await desk.page.locator(".bubble.troubled").count() == 2


async def give(shop: Shop, text: str, message_type: str, data: bytes, **about: object) -> None:
    """Turn a stored text into a message with a file, as it is after the download."""
    store = MediaStore(Path(shop.gateway.environ["DATA_DIR"]) / "media")
    async with store.draft(limit=1 << 20) as draft:
        await draft.write(data)
        kept = await draft.keep()
    await shop.sql(
        "INSERT INTO et_media_files (tenant_id, sha256, size) VALUES ($1, $2, $3)",
        shop.tenant,
        kept.sha256,
        len(data),
    )
    await shop.until(
        "UPDATE et_messages SET message_type = $3, media_metadata = $4 WHERE tenant_id = $1 AND content = $2 RETURNING id",
        shop.tenant,
        text,
        message_type,
        {"state": "stored", "sha256": kept.sha256, "size": len(data), **about},
    )


async def test_a_picture_is_shown_and_what_could_run_is_only_saved(desk: Desk, shop: Shop) -> None:
    await shop.paired()
    await shop.mei.send_text(shop.phone, "Like this one?")
    await desk.page.goto(f"{desk.url}{shop.path}/threads")
    await desk.page.click("#threads a")
    await desk.live()
    picture = io.BytesIO()
    Image.new("RGB", (320, 200), "#b5651d").save(picture, "PNG")
    await give(
        shop, "Like this one?", "image", picture.getvalue(), mime_type="image/png", width=320, height=200
    )
    image = desk.page.locator(".bubble img")
    await image.wait_for()
    await desk.page.wait_for_function("document.querySelector('.bubble img').naturalWidth === 320")
    assert await image.get_attribute("alt") == "Picture: Like this one?"

    page = b"<script>document.title = 'taken over'</script>"
    await shop.mei.send_text(shop.phone, "The menu")
    await give(shop, "The menu", "document", page, mime_type="text/html", filename="menu.html")
    link = desk.page.locator(".bubble a", has_text="menu.html")
    await link.wait_for()
    address = desk.url + str(await link.get_attribute("href"))
    answer = await desk.context.request.get(address)
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["content-disposition"].startswith("attachment")
    assert await answer.body() == page


async def test_nothing_can_be_written_to_a_number_that_is_logged_out(desk: Desk, shop: Shop) -> None:
    await shop.paired()
    await shop.mei.send_text(shop.phone, "Are you there?")
    await desk.page.goto(f"{desk.url}{shop.path}/threads")
    await desk.page.click("#threads a")
    await desk.live()
    await shop.wa.kick(shop.phone.devices[0], "removed")
    await desk.sees("is logged out: nothing can be sent", "#delivery")
    await desk.page.fill("#text", "Yes we are")
    await desk.press("Send")
    await desk.sees("cannot send now", "#reply")
    assert await desk.page.input_value("#text") == "Yes we are"  # not lost
    assert await shop.sql("SELECT count(*) FROM et_outbound_queue WHERE tenant_id = $1", shop.tenant) == 0


async def test_the_basic_forms_work_without_script(
    window: Callable[..., Awaitable[Desk]], shop: Shop
) -> None:
    await shop.paired()
    await shop.mei.send_text(shop.phone, "No script here")
    desk = await window(java_script_enabled=False)
    await desk.sign_in(shop.key)
    await shop.until("SELECT 1 FROM et_messages WHERE tenant_id = $1", shop.tenant)
    await desk.page.click("text=Conversations")
    await desk.page.click("#threads a")
    await desk.page.fill("#text", "Nor here")
    await desk.press("Send")
    await shop.mei.wait_for_text("Nor here", timeout=30)
    await desk.sees("A person answers", "#thread-state")


async def test_it_fits_a_phone_follows_the_dark_and_the_keyboard_reaches_everything(
    window: Callable[..., Awaitable[Desk]], shop: Shop, tmp_path: Path
) -> None:
    session = await shop.paired()
    await shop.mei.send_text(shop.phone, "A very-long-word-" + "x" * 120 + " and a question?")
    desk = await window(viewport=PHONE, color_scheme="dark")
    await desk.page.goto(desk.url + "/")
    assert await desk.fits()
    await desk.page.keyboard.type(shop.key)  # the field has the focus
    await desk.page.keyboard.press("Enter")
    await desk.live()
    await desk.page.keyboard.press("Tab")
    assert await desk.page.evaluate("document.activeElement.className") == "skip"
    await desk.page.goto(f"{desk.url}{shop.path}/threads")
    await desk.page.locator("#threads a").first.wait_for()
    thread = await desk.page.locator("#threads a").first.get_attribute("href")
    paths = (
        "",
        "/threads",
        "/messages",
        "/channels/new",
        "/channels/new?channel=whatsapp",
        "/outbox",
        f"/channels/{session}",
        f"/channels/{session}/log-out",
    )
    for url in (*(shop.path + path for path in paths), thread):
        await desk.page.goto(f"{desk.url}{url}")
        assert await desk.fits(), url
        unnamed = await desk.page.evaluate(
            """() => [...document.querySelectorAll('a, button, input:not([type=hidden]), textarea, select, [role=img]')]
                .filter(e => !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.labels?.length)
                .map(e => e.outerHTML)"""
        )
        assert unnamed == [], url
        # Every control that is shown can be reached, and shows that it was.
        shown = await desk.page.evaluate(
            "() => [...document.querySelectorAll('a, button, input:not([type=hidden]), textarea, select')]"
            ".filter(e => e.checkVisibility()).length"
        )
        await desk.page.evaluate("document.activeElement.blur()")
        reached = 0
        for _ in range(shown + 5):
            await desk.page.keyboard.press("Tab")
            reached += await desk.page.evaluate(
                """() => { const e = document.activeElement;
                  if (!e.matches('a, button, input, textarea, select')) return 0;
                  const ring = [getComputedStyle(e), getComputedStyle(e, '::after')];
                  const fresh = !e.dataset.seen; e.dataset.seen = 1;
                  return fresh && ring.some(s => s.outlineStyle !== 'none') ? 1 : 0; }"""
            )
        assert reached == shown, url
    background = await desk.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(part) for part in background[4:-1].split(",")) < 40
    picture = await desk.page.screenshot(path=tmp_path / "dark.png")
    assert len(picture) > 5000
