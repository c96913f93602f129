"""The sandbox's own page in Chromium: a customer played by hand against the real client."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
import pytest_asyncio
from PIL import Image
from playwright.async_api import Browser, Page, expect

from sandbox.whatsapp.admin import AdminServer
from sandbox.whatsapp.phone import Phone
from tests.integration.sandbox.conftest import Linked
from tests.support.browser import PHONE, chromium

pytestmark = pytest.mark.asyncio(loop_scope="package")


def picture() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (60, 40), "teal").save(file, "PNG")
    return file.getvalue()


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def url(linked: Linked) -> AsyncIterator[str]:
    server = AdminServer(linked.wa)
    yield await server.start()
    await server.stop()


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as found:
        yield found


async def visit(browser: Browser, url: str, person: Phone, **options: Any) -> tuple[Page, list[str]]:
    """The page of one person's phone, and what must stay empty: its complaints and its requests to anywhere else."""
    context = await browser.new_context(**options)
    page = await context.new_page()
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    inside = (url, "blob:", "data:")
    page.on("request", lambda r: None if r.url.startswith(inside) else wrong.append(r.url))
    await page.goto(f"{url}/#me={person.number[1:]}&with=60123456789")
    await expect(page.locator("#other")).to_have_text("Shop")
    return page, wrong


async def test_a_customer_is_played_by_hand(linked: Linked, browser: Browser, url: str) -> None:
    person = linked.wa.person("+60111333001", "Aisyah", auto_receipts=None)
    start = len(linked.client.events)
    page, wrong = await visit(browser, url, person)
    messages = page.locator(".message")
    await page.fill("#text", "Hi, how much is it?")
    await page.press("#text", "Enter")
    asked = await linked.client.wait("MessageEv", lambda e: e["text"] == "Hi, how much is it?", start=start)
    await expect(messages.last.locator(".tick")).to_have_class("tick delivered")
    await linked.client.wait("ChatPresenceEv", start=start)
    await linked.client.do("read")
    await expect(messages.last.locator(".tick")).to_have_class("tick read")

    answer = await linked.client.do("send", to=person.number[1:], text="RM 18 a loaf")
    await expect(messages.last).to_contain_text("RM 18 a loaf")
    await expect(page.locator(".count")).to_have_text("1")
    await messages.last.locator(".act").click(force=True)
    await page.get_by_role("menuitem", name="React with 👍").click()
    reaction = await linked.client.wait("MessageEv", lambda e: "reactionMessage" in e["message"], start=start)
    assert reaction["message"]["reactionMessage"]["key"]["ID"] == answer["ID"]
    await expect(messages.last.locator(".reactions")).to_have_text("👍")
    await messages.last.locator(".act").click(force=True)
    await page.get_by_role("menuitem", name="Reply").click()
    await page.fill("#text", "One plaese")
    await page.click("#send")
    reply = await linked.client.wait("MessageEv", lambda e: e["text"] == "One plaese", start=start)
    assert reply["quoted"] == answer["ID"]
    await messages.last.locator(".act").click(force=True)
    await page.get_by_role("menuitem", name="Edit").click()
    await page.fill("#text", "One please")
    await page.click("#send")
    await linked.client.wait("MessageEv", lambda e: e["info"].get("Edit") == "1", start=start)
    await expect(messages.last).to_contain_text("One please")
    await messages.last.locator(".act").click(force=True)
    await page.get_by_role("menuitem", name="Delete").click()
    await linked.client.wait("MessageEv", lambda e: e["info"].get("Edit") == "7", start=start)
    await expect(messages.last).to_contain_text("This message was deleted")
    await page.click("#mark")
    read = await linked.client.wait("ReceiptEv", lambda e: e["data"].get("Type") == "READ", start=start)
    assert answer["ID"] in read["data"]["MessageIDs"]
    await expect(page.locator(".count")).to_have_count(0)
    assert asked["id"]
    assert wrong == []
    await page.context.close()


async def test_pictures_and_polls(linked: Linked, browser: Browser, url: str) -> None:
    person = linked.wa.person("+60111333002", "Bala", auto_receipts=None)
    start = len(linked.client.events)
    page, wrong = await visit(browser, url, person, viewport=PHONE)
    async with page.expect_file_chooser() as chooser:
        await page.click("#more")
        await page.get_by_role("menuitem", name="Picture").click()
    file: Any = {"name": "bread.png", "mimeType": "image/png", "buffer": picture()}
    await (await chooser.value).set_files(file)
    event = await linked.client.wait("MessageEv", lambda e: "imageMessage" in e["message"], start=start)
    assert event["message"]["imageMessage"]["mimetype"] == "image/png"
    photo = page.locator(".message img.photo").last
    await expect(photo).to_be_visible()
    assert await photo.evaluate("image => image.decode().then(() => image.naturalWidth)") == 60
    poll = await linked.client.do("poll", to=person.number[1:], question="When?", options=["Noon", "Night"])
    await page.get_by_role("button", name="Night").click()
    await expect(page.get_by_role("button", name="Night")).to_have_attribute("aria-pressed", "true")
    vote = await linked.client.wait("MessageEv", lambda e: "pollUpdateMessage" in e["message"], start=start)
    assert vote["message"]["pollUpdateMessage"]["pollCreationMessageKey"]["ID"] == poll["ID"]
    assert await page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    await page.click("#back")
    await expect(page.locator("#chats button").first).to_be_visible()
    assert wrong == []
    await page.context.close()


async def test_people_receipts_and_wrong_codes(linked: Linked, browser: Browser, url: str) -> None:
    person = linked.wa.person("+60111333003", "Chong", auto_receipts=None)
    page, _ = await visit(browser, url, person)
    await page.click("#phone summary")
    async with page.expect_response(lambda answer: answer.request.method == "PATCH"):
        await page.select_option("#receipts", "read")
    sent = await linked.client.do("send", to=person.number[1:], text="read by itself")
    await linked.client.wait(
        "ReceiptEv", lambda e: e["data"].get("Type") == "READ" and sent["ID"] in e["data"]["MessageIDs"]
    )
    await page.select_option("#receipts", "none")
    await page.fill("#qr", "not a code")
    await page.click("#link button")
    await expect(page.locator("#state")).to_contain_text("not the text of a WhatsApp QR code")
    await page.click("#new-person")
    await page.fill("#ask [name=name]", "Siti")
    await page.fill("#ask [name=number]", "+60111222999")
    await page.get_by_role("button", name="OK").click()
    await expect(page.locator("#me")).to_have_value("+60111222999")
    await page.fill("#text", "Salam <b>&amp;")
    await page.press("#text", "Enter")
    await linked.client.wait("MessageEv", lambda e: e["text"] == "Salam <b>&amp;")
    await expect(page.locator(".message").last).to_contain_text("Salam <b>&amp;")
    await page.context.close()


async def test_a_browser_gets_the_page_and_a_program_gets_json(url: str) -> None:
    async with aiohttp.ClientSession() as http:
        async with http.get(url, headers={"Accept": "text/html"}) as answer:
            assert answer.content_type == "text/html"
            assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
        async with http.get(url) as answer:
            assert answer.content_type == "application/json"
        for path in ("/page/../admin.py", "/page/..%2fadmin.py", "/page/none.css"):
            async with http.get(url + path) as answer:
                assert answer.status == 404
        async with http.post(f"{url}/people", headers={"Origin": "http://evil.example"}, data="{}") as answer:
            assert answer.status == 403
