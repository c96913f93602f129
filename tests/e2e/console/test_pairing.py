"""Linking a number in the browser: by the QR the page shows, by code, again, with the wrong phone, too late."""

from __future__ import annotations

import pytest

from tests.e2e.console.conftest import Shop
from tests.support.browser import Desk

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def add(desk: Desk, *, name: str = "Counter", expected: str = "") -> None:
    path = "/".join(desk.page.url.split("/")[3:5])
    await desk.page.goto(f"{desk.url}/{path}/channels/new?channel=whatsapp")
    await desk.page.fill("#name", name)
    await desk.page.fill("#expected", expected)
    await desk.press("Add and show the QR code")


async def test_a_number_is_linked_by_the_qr_on_the_page_and_again_after_the_phone_logged_it_out(
    desk: Desk, shop: Shop
) -> None:
    await add(desk, expected=shop.phone.number)
    device = await shop.phone.scan(await desk.read_qr())
    await desk.sees("is linked and connected", "#linking")
    await desk.sees("Connected", "#standing")
    await desk.sees(shop.phone.number, "#standing")
    first = desk.page.url

    await shop.wa.kick(device, "removed")
    await desk.sees("The phone removed this device from its linked devices.", "#standing")
    await desk.sees("Pair the number again", "#standing")

    # Somebody adds it as if it were new: it becomes the entry that was there.
    await desk.page.click("text=Channels")
    await desk.sees("Logged out", "#sessions")
    await add(desk, name="Again")
    second = desk.page.url
    assert second != first
    await shop.phone.scan(await desk.read_qr())
    await desk.sees("It goes on there, with its conversations.", "#linking")
    await desk.page.goto(second)
    await desk.page.wait_for_url(first)
    await desk.sees("is linked and connected", "#linking")
    assert await shop.sql("SELECT count(*) FROM et_channel_sessions WHERE tenant_id = $1", shop.tenant) == 1


async def test_another_number_than_expected_is_refused_in_words(desk: Desk, shop: Shop) -> None:
    await add(desk, expected=shop.phone.number)
    await shop.mei.scan(await desk.read_qr())
    await desk.sees("Another number was scanned. It has been logged out again.", "#standing")
    await shop.unlinked(shop.mei)
    await desk.press("Show a new QR code")
    await shop.phone.scan(await desk.read_qr())
    await desk.sees("is linked and connected", "#linking")


async def test_a_code_that_nobody_scans_says_so_and_a_new_one_follows(desk: Desk, shop: Shop) -> None:
    lifetime, shop.wa.pairing.lifetime = shop.wa.pairing.lifetime, 2.0
    try:
        await add(desk)
        await desk.sees("Nobody scanned the code in time.", "#standing")
        await desk.sees("Ask for a new code when the phone is at hand.", "#standing")
    finally:
        shop.wa.pairing.lifetime = lifetime
    await desk.press("Show a new QR code")
    await shop.phone.scan(await desk.read_qr())
    await desk.sees("is linked and connected", "#linking")


async def test_the_code_on_the_page_changes_by_itself(desk: Desk, shop: Shop) -> None:
    await add(desk)
    before = await desk.read_qr()
    await desk.live()
    drawn = await desk.page.locator("#qr path").last.get_attribute("d")
    await shop.sql(
        "UPDATE et_session_runtime SET qr = $2, generation = generation + 1 WHERE tenant_id = $1",
        shop.tenant,
        "2@the,next,one",
    )
    await desk.page.wait_for_function(
        "old => document.querySelectorAll('#qr path')[1].getAttribute('d') !== old", arg=drawn
    )
    after = await desk.read_qr()
    assert (before == after, after) == (False, "2@the,next,one")
    await desk.press("Stop linking")
    await desk.sees("Show a", "#linking")


async def test_a_phone_code_links_too_and_the_number_can_rest_return_and_leave(
    desk: Desk, shop: Shop
) -> None:
    await add(desk, expected=shop.phone.number)
    await desk.page.click("text=No camera?")
    await desk.press("Get a code")
    code = desk.page.locator("#code")
    await code.wait_for()
    shown = (await code.inner_text()).split()[-1]
    await shop.phone.enter_code(shown)
    await desk.sees("is linked and connected", "#linking")

    await desk.press("Disconnect")
    await desk.sees("Not connected", "#standing")
    await desk.press("Connect")
    await desk.sees("is linked and connected", "#linking")

    await desk.page.click("text=Log out…")
    await desk.sees("Its conversations and messages are kept.")
    assert shop.phone.devices != []  # asked first
    await desk.press("Log out and forget the keys")
    await desk.sees("It was logged out from here.", "#standing")
    await shop.unlinked(shop.phone)


async def test_a_number_that_is_none_is_named_beside_its_field(desk: Desk, shop: Shop) -> None:
    await add(desk, name="Kept", expected="call me")
    await desk.sees("Write it with its country code")
    assert await desk.page.input_value("#name") == "Kept"
    assert await desk.page.locator("#expected").get_attribute("aria-invalid") == "true"
    assert await shop.sql("SELECT count(*) FROM et_channel_sessions WHERE tenant_id = $1", shop.tenant) == 0
