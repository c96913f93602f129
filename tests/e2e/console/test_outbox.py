"""What may or may not have arrived, in the browser: seen, explained, and decided by somebody who may."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

import pytest

from tests.e2e.console.conftest import Office
from tests.support.browser import Desk
from tests.support.outbound import enqueue, fetch, item, value

pytestmark = pytest.mark.asyncio(loop_scope="package")

CUT_OFF = (
    "the channel ended the call in an unexpected way and may have sent the message; look before retrying"
)


async def torn(office: Office, text: str, *steps: str, error: str = CUT_OFF) -> int:
    """An item that went through these statuses, as the worker writes them."""
    soon = datetime.now(UTC) + timedelta(hours=1)
    queue_id = await enqueue(office.api.db, office.place, text, to="+60111222333", send_at=soon)
    for status in steps:
        await fetch(
            office.api.db,
            "UPDATE et_outbound_queue SET status = $2, claim_epoch = claim_epoch + 1, claimed_at = now(),"
            " last_error = $3, error_code = 'outcome_unknown' WHERE id = $1",
            queue_id,
            status,
            error,
        )
    return queue_id


async def status(office: Office, queue_id: int) -> tuple[str, str]:
    row = await item(office.api.db, queue_id)
    return row["status"], row["delivery_status"]


async def test_an_operator_sees_what_is_in_doubt_and_decides(
    at_office: Callable[..., Awaitable[Desk]], office: Office
) -> None:
    desk = await at_office(key=await office.api.make_key(office.tenant, "read", "admin"))
    await desk.page.goto(f"{office.path}/outbox")
    await desk.live()
    await desk.sees("Nothing to decide")
    ids = [await torn(office, f"torn {n}", "dispatching", "unknown") for n in (1, 2, 3)]
    refused = await torn(office, "refused one", "failed", error="this number is not on WhatsApp")
    await desk.sees("May or may not have arrived", "#trouble")  # by itself
    await desk.sees("This number is not on WhatsApp.", "#trouble")
    await desk.page.goto(f"{office.path}")
    await desk.sees("3 messages", "#sessions")

    # It arrived.
    await desk.page.goto(f"{office.path}/outbox")
    await desk.page.click("text=torn 1")
    await desk.sees("The channel ended the call in an unexpected way", "#item")
    await desk.sees("the chat on the shop’s own phone shows", "#item")
    await desk.press("It arrived")
    await desk.sees("Noted: it arrived.")
    assert await status(office, ids[0]) == ("sent", "delivered")

    # Given up; then, all the same, sent again, by somebody who ticked that they looked.
    await desk.page.goto(f"{office.path}/outbox/{ids[1]}")
    await desk.press("Give up: leave it unsent")
    await desk.sees("A person gave it up", "#item")
    assert await status(office, ids[1]) == ("failed", "failed")
    await desk.press("Send again")
    assert await desk.page.evaluate("document.querySelector('[name=looked]').validity.valueMissing")
    await desk.page.evaluate("document.querySelector('[name=looked]').removeAttribute('required')")
    await desk.press("Send again")
    await desk.sees("Look first")
    assert await status(office, ids[1]) == ("failed", "failed")
    await desk.page.go_back()
    await desk.page.check("[name=looked]")
    await desk.press("Send again")
    await desk.sees("It is in the queue again.")
    assert (await status(office, ids[1]))[0] == "queued"

    # What never went out needs no such promise.
    await desk.page.goto(f"{office.path}/outbox/{refused}")
    await desk.sees("It did not reach this person, so it cannot arrive twice.", "#item")
    await desk.press("Send again")
    await desk.sees("It is in the queue again.")

    # Evidence that comes while the page is open is seen, and a decision that comes too late is refused.
    await desk.page.goto(f"{office.path}/outbox/{ids[2]}")
    await desk.live()
    csrf = await desk.page.locator("[name=csrf]").first.get_attribute("value")
    await fetch(office.api.db, "UPDATE et_outbound_queue SET status = 'sent' WHERE id = $1", ids[2])
    await desk.page.locator("#item .state.good").wait_for()
    assert await desk.page.locator("#item form").count() == 0
    late = await desk.context.request.post(
        f"{office.path}/outbox/{ids[2]}/give-up", form={"csrf": csrf or ""}
    )
    assert (late.status, "It is settled already" in await late.text()) == (409, True)
    assert await status(office, ids[2]) == ("sent", "sent")

    told = await value(
        office.api.db,
        "SELECT array_agg(event || coalesce(':' || (detail ->> 'outcome'), '') ORDER BY id) FROM et_audit_log"
        " WHERE tenant_id = $1 AND subject_type = 'outbound' AND actor LIKE 'key:%'",
        office.tenant,
    )
    assert told == [
        "outbound_settled:arrived",
        "outbound_settled:given_up",
        "outbound_retried",
        "outbound_retried",
    ]


async def test_a_key_without_admin_sees_and_may_not_decide(
    at_office: Callable[..., Awaitable[Desk]], office: Office
) -> None:
    desk = await at_office()
    queue_id = await torn(office, "torn", "dispatching", "unknown")
    await desk.page.goto(f"{office.path}/outbox/{queue_id}")
    await desk.sees("To decide what becomes of it takes a key with the scope “admin”.")
    assert await desk.page.locator("#item button").count() == 0
    csrf = await desk.page.locator("[name=csrf]").first.get_attribute("value")
    for action in ("arrived", "give-up", "send-again"):
        answer = await desk.context.request.post(
            f"{office.path}/outbox/{queue_id}/{action}", form={"csrf": csrf or "", "looked": "yes"}
        )
        assert answer.status == 403
    assert await status(office, queue_id) == ("unknown", "unknown")
