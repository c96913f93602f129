"""What the console says: states, reasons, ticks, decisions and times in words. Pure: no rows are read here."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Any, Literal, Protocol
from zoneinfo import ZoneInfo

from core.channel import SessionStatus
from core.store.sessions import SessionRow
from gateway.console import kinds

Tone = Literal["good", "busy", "calm", "bad"]


class Row(Protocol):
    """A row of the database, or anything like one."""

    def __getitem__(self, key: str, /) -> Any: ...


STATUS: dict[str, tuple[str, Tone]] = {
    "active": ("Connected", "good"),
    "connecting": ("Connecting", "busy"),
    "pairing": ("Not linked yet", "busy"),
    "disconnected": ("Not connected", "calm"),
    "logged_out": ("Logged out", "bad"),
    "suspended": ("Suspended", "bad"),
}

REASONS = {
    "qr_timeout": "Nobody scanned the code in time.",
    "wrong_number": "Another number was scanned. It has been logged out again.",
    "already_live": "It is connected here already, under another entry. The new link was undone.",
    "logged_out_by_phone": "The phone removed this device from its linked devices.",
    "logged_out": "It was logged out.",
    "deleted": "It was logged out from here. Its conversations are kept.",
    "stream_replaced": "The same linked device was opened elsewhere.",
    "temporary_ban": "The channel has banned it for a while.",
    "client_outdated": "WhatsApp refuses this version of the client.",
    "auth_failed": "Its user name or password is refused.",
    "invalid_token": "Its token is refused.",
    "no_token": "It has no token.",
    "wrong_bot": "Its token is another bot’s.",
    "conflict": "Another program takes this bot’s messages.",
    "webhook_changed": "Another program has set a webhook for this bot.",
    "webhook_secret_missing": "Its webhook has no secret.",
    "webhook_refused": "Its webhook is not accepted.",
    "bad_proxy": "Its proxy cannot be used.",
    "unreachable": "The channel cannot be reached.",
    "server_error": "The channel has a fault of its own.",
    "flood_limit": "The channel asks to be left alone for a while.",
    "throttled": "The server asks to be left alone for a while.",
    "account_suspended": "The provider has suspended the account.",
    "certificate_not_trusted": "The mail server’s certificate cannot be trusted.",
    "connection_lost": "The connection broke; it is made anew.",
    "connection_refused": "The mail server refuses the connection.",
    "connection_timeout": "The mail server does not answer.",
    "credentials_invalid": "Its credentials are not complete.",
    "folder_missing": "A folder that is to be read does not exist.",
    "host_not_found": "There is no mail server of that name.",
    "imap_refused": "The mail server refuses what it is asked.",
    "tls_failed": "The mail server does not speak TLS there.",
    "token_unavailable": "The provider gives out no token to log in with.",
    "connect_failure": "The channel refused the connection; it is tried again.",
    "child_failed": "The WhatsApp client does not start.",
    "folder_taken": "Another gateway holds its files.",
    "journal_failed": "Messages cannot be written to disk, so none is taken.",
    "keys_missing": "The keys of this link are not on this machine any more.",
    "gateway_gone": "The gateway that held it has stopped.",
    "gateway_stopped": "The gateway was stopped.",
    "secret_key_missing": "Its stored credentials cannot be opened: a secret key is missing.",
    "secret_damaged": "Its stored credentials are damaged.",
    "unknown_channel": "No running gateway has this channel.",
    "start_failed": "It could not be started; the gateway’s log says why.",
    "pairing_failed": "The pairing could not be started; the gateway’s log says why.",
    "keepalive_timeout": "The connection was silent; it is made anew.",
    "timeout": "Nobody scanned the code in time.",
}

DECISIONS = {
    "auto_reply": "Answered automatically",
    "follow_up": "Marked for a follow-up",
    "human_takeover": "Handed to a person",
    "ignore": "Not answered",
}
WHY = {
    "no_agent": "no agent is set here",
    "group": "it is a group",
    "opted_out": "this person opted out",
    "opt_out": "they asked not to be contacted",
    "opt_in": "they may be contacted again",
    "own_message": "it is our own message",
    "reply_cap": "the limit of automatic replies was reached",
    "automatic_message": "an automatic message",
    "loop": "two machines would answer each other",
    "stale": "it came too long ago",
    "tenant_suspended": "this tenant is suspended",
    "undecryptable": "it could not be read",
    "unsupported": "a kind that cannot be answered",
    "asked_for_a_person": "they asked for a person",
    "human_request": "they asked for a person",
    "asked_for_later": "they want to hear later",
    "no_rule": "no rule fits",
    "out_of_hours": "outside opening hours",
}
KINDS = {
    "image": "Picture",
    "video": "Video",
    "audio": "Audio",
    "document": "Document",
    "sticker": "Sticker",
    "location": "Location",
    "contact": "Contact card",
    "poll": "Poll",
    "reaction": "Reaction",
    "edited": "Edited message",
    "deleted": "Deleted message",
    "unsupported": "Message of another kind",
}
ORIGINS = {"console": "A person", "phone": "Typed on the phone", "api": "By the API", "agent": "Agent"}


@dataclass(frozen=True, slots=True)
class Standing:
    """A session in words: where it stands, why, and what a person must do now."""

    label: str
    tone: Tone
    reason: str | None
    action: str | None
    step: Literal["pair", "watch", "connect", "credentials", "wait", "none"]
    """The button that leads on."""


SENDING = "smtp_"
NEEDS_CREDENTIALS = frozenset(
    {
        "auth_failed",
        "credentials_invalid",
        "invalid_token",
        "no_token",
        "secret_key_missing",
        "secret_damaged",
    }
)
"""Reasons that new credentials mend."""


def standing(session: SessionRow, *, pairs: bool) -> Standing:
    """`pairs`: a phone is linked to sessions of this channel; others log in with credentials."""
    label, tone = STATUS.get(session.status, (session.status.value, "calm"))
    code = session.status_reason or (
        session.pairing_reason if session.pairing_state in ("timeout", "failed") else None
    )
    reason = _reason(code) if code else None
    if session.wanted == "deleted":
        return Standing(
            "Logging out", "busy", None, "It is being logged out; this takes a few seconds.", "wait"
        )
    if pairs and pairable(session):
        if linking(session):
            return Standing("Waiting for the phone", "busy", reason, session.action, "watch")
        if session.status == SessionStatus.DISCONNECTED:
            label = "Not linked"
        advice = session.action or "Link it with the phone: scan a QR code or enter a code."
        if code in ("qr_timeout", "timeout"):
            advice = "Ask for a new code when the phone is at hand."
        return Standing(label, tone, reason, sentence(advice), "pair")
    if not pairs and needs_credentials(session):
        advice = session.action or "Enter its credentials again."
        return Standing(label, "bad", reason, sentence(advice), "credentials")
    if session.status == SessionStatus.DISCONNECTED:
        if session.wanted == "connected" and not pairs:
            # It tries by itself, as long as somebody wants it connected.
            advice = session.action or "It is tried again by itself."
            return Standing(label, "busy", reason, sentence(advice), "wait")
        return Standing(
            label, tone, reason, sentence(session.action or "Connect it to send and receive."), "connect"
        )
    action = sentence(session.action) if session.action else None
    return Standing(label, tone, reason, action, "none" if session.status == SessionStatus.ACTIVE else "wait")


def _reason(code: str) -> str:
    """A mailbox reads well and cannot send: `smtp_…` says what the other server's trouble is."""
    bare = code.removeprefix(SENDING)
    text = REASONS.get(bare) or sentence(bare.replace("_", " "))
    return text if bare == code else f"For sending: {text[0].lower()}{text[1:]}"


def linking(session: SessionRow) -> bool:
    """A pairing is under way: a code is shown or about to be."""
    return (
        session.wanted == "connected"
        and session.login_method is not None
        and session.pairing_state not in ("timeout", "failed", "paired")
    )


def pairable(session: SessionRow) -> bool:
    """Whether a phone can be linked now; not while it is linked, suspended or being removed."""
    if session.wanted == "deleted":
        return False
    if session.status in (SessionStatus.ACTIVE, SessionStatus.SUSPENDED):
        return False
    if session.status == SessionStatus.CONNECTING:
        return session.pending or session.login_method is not None
    if session.status == SessionStatus.DISCONNECTED:
        return session.pending or session.pairing_state in ("timeout", "failed") or linking(session)
    return True


def needs_credentials(session: SessionRow) -> bool:
    """It cannot go on with what is kept."""
    reason = (session.status_reason or "").removeprefix(SENDING)
    return session.status == SessionStatus.LOGGED_OUT or reason in NEEDS_CREDENTIALS


def own_address(session: SessionRow) -> str:
    if session.pending:
        return f"{kinds.of(session.channel_type).thing.capitalize()} not known yet"
    return session.identifier


def title(session: SessionRow) -> str:
    if session.name:
        return session.name
    return (
        f"{kinds.of(session.channel_type).thing.capitalize()} {session.id}"
        if session.pending
        else session.identifier
    )


@dataclass(frozen=True, slots=True)
class Tick:
    """What became of a message that went out. `detail` is shown in words, `mark` as ticks."""

    mark: Literal["clock", "one", "two", "blue", "unknown", "failed", "cancelled"]
    text: str
    detail: str | None = None


def tick(message: Row) -> Tick | None:
    """None for what came in."""
    if message["direction"] != "outbound":
        return None
    why = sentence(message["last_error"]) if message["last_error"] else None
    match message["delivery_status"]:
        case "queued":
            return Tick("clock", "Waiting to be sent", why)
        case "dispatching":
            return Tick("clock", "Being sent")
        case "sent":
            return Tick("one", "Sent")
        case "delivered":
            return Tick("two", "Delivered")
        case "read":
            return Tick("blue", "Read")
        case "unknown":
            return Tick(
                "unknown",
                "Not known whether it arrived",
                why or "The connection was cut while it was sent. It is not sent again by itself.",
            )
        case "cancelled":
            return Tick("cancelled", "Withdrawn", why)
    return Tick("failed", "Not sent", why or "The channel refused it.")


def decision(message: Row) -> str | None:
    """What was decided about a message that came in, as one line."""
    action = message["decision_action"]
    if action is None:
        return "Could not be answered: see the log" if message["delivery_status"] == "inbound_error" else None
    reason = message["decision_reason"]
    if reason == "handled_by_human":
        return "Left to the person who answers"
    text = DECISIONS.get(action, str(action).replace("_", " "))
    if reason and action != "auto_reply":
        text += f": {WHY.get(reason, str(reason).replace('_', ' '))}"
    elif message["decision_label"]:
        text += f" · {str(message['decision_label']).replace('_', ' ')}"
    return text


def kind(message_type: str) -> str | None:
    return KINDS.get(message_type)


def origin(message: Row) -> str | None:
    if message["direction"] != "outbound":
        return None
    given = message["origin"]
    if given is None:
        return "Backend"
    return ORIGINS.get(
        given, "Agent" if given in ("auto", "worker", "rules", "llm", "inbound_worker") else str(given)
    )


def person(name: str | None, external_id: str) -> str:
    """A name, else the address without the channel's prefix."""
    return name or address(external_id)


def address(external_id: str) -> str:
    channel, _, rest = external_id.partition(":")
    return "hidden number" if channel == "whatsapp-lid" else rest or external_id


def initials(name: str) -> str:
    letters = [part[0] for part in name.split() if part[0].isalpha()]
    return "".join(letters[:2]).upper() or "#"


def sentence(text: str) -> str:
    """Begins with a capital, ends with a full stop."""
    text = text.strip()
    if not text:
        return text
    text = text[0].upper() + text[1:]
    return text if text[-1] in ".!?…" else text + "."


@lru_cache(maxsize=256)
def zone(name: str | None) -> ZoneInfo:
    """The browser's time zone, which its script tells in a cookie; UTC when it does not or nobody knows it."""
    if (
        name
        and len(name) <= 64
        and all(c.isalnum() or c in "/_+-" for c in name)
        and not name.startswith("/")
    ):
        with suppress(LookupError, ValueError, OSError):  # nobody knows it
            return ZoneInfo(name)
    return ZoneInfo("UTC")


def clock(moment: datetime, where: ZoneInfo) -> str:
    return moment.astimezone(where).strftime("%H:%M")


def day(moment: datetime, where: ZoneInfo, *, now: datetime | None = None) -> str:
    """“Today”, “Yesterday”, “Mon 3 Nov”, with the year when it is another."""
    local = moment.astimezone(where)
    today = (now or datetime.now(UTC)).astimezone(where)
    if local.date() == today.date():
        return "Today"
    if local.date() == (today - timedelta(days=1)).date():
        return "Yesterday"
    text = f"{local:%a} {local.day} {local:%b}"
    return text if local.year == today.year else f"{text} {local.year}"


def when(moment: datetime, where: ZoneInfo) -> str:
    """The time today, the day before that."""
    named = day(moment, where)
    return clock(moment, where) if named == "Today" else named
