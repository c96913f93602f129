"""Where a WhatsApp session can stand, each with a short reason and what a person must do. Texts only, no behaviour."""

from __future__ import annotations

import datetime as dt

from core.channel import SessionState, SessionStatus

PASSING = (SessionStatus.PAIRING, SessionStatus.CONNECTING)
"""States that end when the session is stopped."""
PAIR_AGAIN = "Pair the number again: scan a new QR code or enter a pairing code."


def pairing() -> SessionState:
    return SessionState(
        SessionStatus.PAIRING,
        action="Scan the QR code in WhatsApp on the phone: Settings, Linked devices, Link a device.",
    )


def connecting(reason: str | None = None, *, identifier: str | None = None) -> SessionState:
    action = _CONNECTING.get(reason) if reason else None
    return SessionState(SessionStatus.CONNECTING, reason, action, identifier=identifier)


_CONNECTING = {
    "folder_taken": "Another gateway works with this session's folder; stop it if it should not.",
    "child_failed": "The WhatsApp client does not start; run `python -m gateway doctor` and look at the log.",
}


def active(identifier: str | None, name: str | None) -> SessionState:
    return SessionState(SessionStatus.ACTIVE, identifier=identifier, name=name)


def disconnected(reason: str | None = None) -> SessionState:
    return SessionState(SessionStatus.DISCONNECTED, reason, _DISCONNECTED.get(reason) if reason else None)


_DISCONNECTED = {
    "qr_timeout": "Nobody scanned the code in time. Ask for a new one when the phone is at hand.",
    "auth_failed": "The phone refused the pairing. Start it again with a new code.",
    "stream_replaced": "The same device was opened elsewhere. Close it there, then connect this session again.",
    "client_outdated": "WhatsApp refuses this version of the client. Update the gateway.",
    "store_unreadable": "The session's keys under WHATSAPP_SESSION_DIR cannot be read. Mend the folder's rights or "
    "its disk, or restore it from a backup; otherwise delete the session and pair the number again.",
    "journal_failed": "Messages cannot be written to disk, so none is taken from WhatsApp. Free space under DATA_DIR "
    "or make it writable; the session comes back by itself.",
}


def logged_out(reason: str, *, expected: str | None = None) -> SessionState:
    if reason == "wrong_number":
        action = (
            f"Another number was paired and has been logged out again. Scan with the phone of {expected}."
        )
    else:
        action = PAIR_AGAIN
    return SessionState(SessionStatus.LOGGED_OUT, reason, action)


def banned(until: dt.datetime | None) -> SessionState:
    when = f"until {until:%Y-%m-%d %H:%M} UTC" if until else "for now"
    return SessionState(
        SessionStatus.SUSPENDED,
        "temporary_ban",
        f"WhatsApp has banned this number {when}. Open WhatsApp on the phone to see why; the session tries again then.",
    )
