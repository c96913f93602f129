"""Adding an account that logs in with credentials, and giving it new ones: a channel of our own with a check of its own."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

from core.channel import SessionStatus
from tests.e2e.console.conftest import Office
from tests.support.browser import PHONE, Desk
from tests.support.log_in import RIGHT, WRONG
from tests.support.outbound import eventually, fetch, value

pytestmark = pytest.mark.asyncio(loop_scope="package")


async def fill(desk: Desk, **values: str) -> None:
    for name, text in values.items():
        await desk.page.fill(f'[name="credentials.{name.replace("__", ".")}"]', text)


async def test_a_channel_is_chosen_its_credentials_checked_refused_in_words_and_kept(
    at_office: Callable[..., Awaitable[Desk]], office: Office
) -> None:
    desk = await at_office()
    await desk.page.click("text=Add a channel")
    await desk.sees("A WhatsApp number")
    await desk.page.click("text=A Desk account")
    assert await desk.page.input_value('[name="credentials.server.host"]') == "desk.test"
    await fill(desk, username="shop@desk.test", password=WRONG)
    await desk.page.fill("#name", "Our desk")
    await desk.press("Check and add")

    # Refused: the server's words stand at the field, what was typed is kept, but for the secret.
    error = desk.page.locator("#credentials-password-error")
    assert await error.inner_text() == "The server said: 535 ••• is not the password."
    field = desk.page.locator('[name="credentials.password"]')
    assert await field.get_attribute("aria-invalid") == "true"
    assert "credentials-password-error" in (await field.get_attribute("aria-describedby") or "")
    assert await field.input_value() == ""
    assert await field.get_attribute("type") == "password"
    assert (
        await desk.page.input_value("#name"),
        await desk.page.input_value('[name="credentials.username"]'),
    ) == (
        "Our desk",
        "shop@desk.test",
    )
    assert WRONG not in await desk.page.content()
    assert (
        await value(office.api.db, "SELECT count(*) FROM et_channel_sessions WHERE channel_type = 'desk'")
        == 0
    )

    # A wrong entry never reaches the server.
    asked = len(office.server.asked)
    await fill(desk, password=RIGHT, server__port="imap")
    await desk.press("Check and add")
    assert await desk.page.locator("#credentials-server-port-error").inner_text() == "Enter a number."
    assert len(office.server.asked) == asked

    await fill(desk, password=RIGHT, server__port="143")
    await desk.press("Check and add")
    await desk.sees("Shop@desk.test was accepted.")
    await desk.sees("Connected", "#standing")
    await desk.sees("Runs on gateway gw-1", "#controls")
    session = int(desk.page.url.rpartition("/")[2])
    assert await office.kept(session) == {
        "port": 993,
        "username": "shop@desk.test",
        "password": RIGHT,
        "server": {"host": "desk.test", "port": 143, "security": "tls"},
    }
    assert RIGHT not in await desk.page.content()
    assert not any(RIGHT in url or WRONG in url for url in desk.requests)

    # The same account once more, while it is live: said on the form.
    await desk.page.goto(f"{office.path}/channels/new?channel=desk")
    await fill(desk, username="shop@desk.test", password=RIGHT)
    await desk.press("Check and add")
    await desk.sees("To change its credentials, change session", "#form-error")


async def test_new_credentials_need_only_what_changed_and_wake_a_session_that_was_refused(
    at_office: Callable[..., Awaitable[Desk]], office: Office
) -> None:
    desk = await at_office()
    await desk.page.goto(f"{office.path}/channels/new?channel=desk")
    await fill(desk, username="second@desk.test", password=RIGHT)
    await desk.press("Check and add")
    await desk.sees("Connected", "#standing")
    session = int(desk.page.url.rpartition("/")[2])
    before = await office.kept(session)

    channel = office.server.platform.channels[session]
    await channel.say(SessionStatus.DISCONNECTED, "auth_failed", action="enter the new password")
    await desk.sees("Its user name or password is refused.", "#standing")
    await desk.sees("Enter the new password.", "#standing")
    await desk.page.get_by_role("link", name="Enter its credentials").click()
    assert await desk.page.input_value('[name="credentials.server.host"]') == ""  # nothing of it is shown
    await fill(desk, username="third@desk.test")
    await desk.press("Check and connect")
    await desk.sees("and this session is second@desk.test: add another session", "#form-error")
    await fill(desk, username="", server__host="new.desk.test")
    await desk.press("Check and connect")
    await desk.sees("The new credentials were accepted.")
    await desk.sees("Connected", "#standing")
    kept = await office.kept(session)
    assert kept["server"] == {"host": "new.desk.test", "security": "tls"}
    assert (kept["password"], kept["username"]) == (before["password"], "second@desk.test")
    assert office.server.platform.channels[session] is not channel  # made anew, with the new ones
    events = await fetch(
        office.api.db,
        "SELECT event, detail::TEXT FROM et_audit_log WHERE subject_id = $1 ORDER BY id",
        str(session),
    )
    assert [row["event"] for row in events] == ["session_created", "session_credentials_changed"]

    # Logged out here: its credentials are forgotten, so all of them are asked for.
    await desk.page.click("text=Log out…")
    await desk.sees("forgets its credentials")
    await desk.press("Log out and forget the credentials")

    async def forgotten() -> bool:
        return not await office.kept(session)

    await eventually(forgotten)
    await desk.page.get_by_role("link", name="Enter its credentials").click()
    await desk.page.locator('[name="credentials.password"][required]').wait_for()


async def test_a_bot_is_added_with_its_token_and_its_customers_are_seen(
    at_office: Callable[..., Awaitable[Desk]], office: Office
) -> None:
    bot, mei = office.telegram.bot("@kedai_bot", "Kedai Aina"), office.telegram.person("Mei Lim")
    desk = await at_office()
    await desk.page.goto(f"{office.path}/channels/new")
    await desk.page.click("text=A Telegram bot")
    wrong = "123456789:" + "A" * 35
    await fill(desk, token=wrong)
    await desk.press("Check and add")
    said = desk.page.locator("#credentials-token-error")
    assert "Telegram does not know this token" in await said.inner_text()
    assert wrong not in await desk.page.content()
    await fill(desk, token=bot.token)
    await desk.press("Check and add")
    await desk.sees("@kedai_bot was accepted.")
    await desk.sees("Connected", "#standing")
    await desk.page.click("text=See its conversations")
    await desk.live()
    await mei.say(bot, "Is there sourdough left?")
    await desk.sees("Is there sourdough left?", "#threads")
    assert bot.token not in await desk.page.content()
    assert not any(bot.token in url for url in desk.requests)


async def test_it_fits_a_phone_in_the_dark_and_every_field_is_named(
    at_office: Callable[..., Awaitable[Desk]], office: Office
) -> None:
    desk = await at_office(viewport=PHONE, color_scheme="dark")
    for path in ("/channels/new", "/channels/new?channel=desk", "/outbox", ""):
        await desk.page.goto(office.path + path)
        assert await desk.fits(), path
        unnamed = await desk.page.evaluate(
            """() => [...document.querySelectorAll('a, button, input:not([type=hidden]), select')]
                .filter(e => !(e.innerText || '').trim() && !e.getAttribute('aria-label') && !e.labels?.length)
                .map(e => e.outerHTML)"""
        )
        assert unnamed == [], path
        broken = await desk.page.evaluate(
            """() => [...document.querySelectorAll('[aria-describedby]')].flatMap(e =>
                e.getAttribute('aria-describedby').split(' ').filter(id => !document.getElementById(id)))"""
        )
        assert broken == [], path


async def test_without_script_the_form_still_checks(
    at_office: Callable[..., Awaitable[Desk]], office: Office
) -> None:
    desk = await at_office(java_script_enabled=False)
    await desk.page.goto(f"{office.path}/channels/new?channel=desk")
    await fill(desk, username="fourth@desk.test", password=RIGHT, server__host="nowhere")
    await desk.press("Check and add")
    await desk.sees("There is no server called 'nowhere'.")
    assert await desk.page.locator("#credentials-server-host-error").count() == 1
