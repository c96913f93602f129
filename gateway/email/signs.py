"""Whether a machine wrote a mail, and what a returned mail says about the one it returns. Pure; runs in the worker process.

Nothing of this kind is ever answered: two machines that answer each other never stop.
"""

from __future__ import annotations

import re
from email.message import Message
from typing import Any

from flufl.bounce import all_failures

from gateway.email import headers

_MACHINES = re.compile(
    r"(mailer-?daemon|postmaster|no-?_?reply|do-?_?not-?_?reply|donotreply|bounces?|notifications?|newsletter)([+=.-].*)?",
    re.I,
)
_SUBJECTS = re.compile(
    r"\s*(auto(matic|matische|matisch)?[ -]?(reply|antwort|response)|out of (the )?office|abwesend|abwesenheitsnotiz|"
    r"r[ée]ponse automatique|respuesta autom[áa]tica|risposta automatica|automatisch antwoord)\b",
    re.I,
)
_UNDELIVERED = re.compile(
    r"undeliver|deliver(y|ed)?\b.*(fail|error|problem|status|notif|unsuccess|report)|"
    r"(fail|error|could not|not).{0,30}deliver|"
    r"return(ed|ing) (mail|to sender|message)|mail (system )?(error|failure)|unzustellbar|nicht zugestellt|non recapitabile|"
    r"message status|non remis",
    re.I,
)
_RETURNED_ID = re.compile(r"^\s*>?\s*Message-ID:\s*(<[^<>\s]{1,900}>)", re.I | re.M)
_WORDS = 400
_LOOKED = 200_000
MOST_IDS = 10


def automatic(message: Message, sender: str, subject: str) -> str | None:
    """Why this mail is never answered (`auto_submitted`, `list`, `bulk`, `bounce`, `machine`, `subject`), or None."""
    submitted = headers.raw(message, "Auto-Submitted").partition(";")[0].strip().lower()
    if submitted and submitted != "no":
        return "auto_submitted"
    if headers.raw(message, "Precedence").strip().lower() in ("bulk", "list", "junk", "auto_reply"):
        return "bulk"
    if any(
        headers.raw(message, name) for name in ("List-Id", "List-Unsubscribe", "List-Post", "Feedback-ID")
    ):
        return "list"
    if returned(message):
        return "bounce"
    if any(headers.raw(message, name) for name in ("X-Autoreply", "X-Autorespond", "X-Auto-Reply", "X-Loop")):
        return "auto_submitted"
    suppress = headers.raw(message, "X-Auto-Response-Suppress").lower()
    if any(word in suppress for word in ("all", "autoreply", "oof")):
        return "auto_submitted"
    if _MACHINES.fullmatch(sender.partition("@")[0]):
        return "machine"
    return "subject" if _SUBJECTS.match(subject) else None


def returned(message: Message) -> bool:
    """Signs in the headers that this is a mail about another mail's delivery."""
    return (
        message.get_content_type() == "multipart/report"
        or headers.raw(message, "Return-Path").strip() == "<>"
        or bool(headers.raw(message, "X-Failed-Recipients"))
        or headers.raw(message, "From").lower().find("mailer-daemon@") >= 0
    )


def bounce(message: Message, sender: str) -> dict[str, Any] | None:
    """`{failed, delayed, delivered, reason, message_ids}` of a delivery report, or None when it is none."""
    reports = _reports(message)
    failed = [r["recipient"] for r in reports if r["action"] == "failed"]
    delayed = [r["recipient"] for r in reports if r["action"] == "delayed"]
    delivered = [r["recipient"] for r in reports if r["action"] in ("delivered", "relayed", "expanded")]
    local = sender.partition("@")[0].lower()
    likely = returned(message) or local in ("mailer-daemon", "postmaster", "mailadmin", "mdaemon")
    if not reports and (likely or _UNDELIVERED.search(headers.decoded(headers.raw(message, "Subject")))):
        temporary, permanent = _recognised(message)
        failed, delayed = sorted(permanent), sorted(temporary - permanent)
        header = headers.addresses([headers.raw(message, "X-Failed-Recipients")])
        failed = failed or [one["address"] for one in header]
    if not (failed or delayed or delivered):
        return None
    words = next((r["reason"] for r in reports if r["action"] == "failed" and r["reason"]), None)
    return {
        "failed": failed[:100],
        "delayed": delayed[:100],
        "delivered": delivered[:100],
        "reason": words or _reason_in_text(message) if failed else None,
        "message_ids": _returned_ids(message),
    }


def _recognised(message: Message) -> tuple[set[str], set[str]]:
    try:
        temporary, permanent = all_failures(message)
    except Exception:
        return set(), set()
    return {_text(one) for one in temporary}, {_text(one) for one in permanent}


def _text(address: Any) -> str:
    value = address.decode("utf-8", "replace") if isinstance(address, bytes) else str(address)
    return value.strip().lower()


def _reports(message: Message) -> list[dict[str, str]]:
    """The groups of a `message/delivery-status` (RFC 3464) that are about a recipient."""
    found = []
    for part in message.walk():
        if part.get_content_type() != "message/delivery-status":
            continue
        groups = part.get_payload()
        for group in groups if isinstance(groups, list) else []:
            if not isinstance(group, Message):
                continue
            action = headers.raw(group, "Action").strip().lower()
            recipient = _typed(headers.raw(group, "Original-Recipient")) or _typed(
                headers.raw(group, "Final-Recipient")
            )
            if action and recipient:
                code = _typed(headers.raw(group, "Diagnostic-Code")) or headers.raw(group, "Status").strip()
                words = headers.clean(code)[:_WORDS]
                found.append({"action": action, "recipient": recipient.lower().strip("<>"), "reason": words})
    return found


def _typed(value: str) -> str:
    """`rfc822; john@example.com` → `john@example.com`."""
    kind, semicolon, rest = value.partition(";")
    return rest.strip() if semicolon else kind.strip()


def _reason_in_text(message: Message) -> str | None:
    """The line of an old bounce that quotes the other server."""
    match = re.search(
        r"^[^\n]{0,80}\b([45]\d\d[ -](?:#?[45]\.\d+\.\d+)?[^\n]{3,300})$", _texts(message), re.M
    )
    return headers.clean(match[1])[:_WORDS] if match else None


def _returned_ids(message: Message) -> list[str]:
    """Message-IDs of what is returned: of the mail or headers attached, quoted in the text, or answered to."""
    found: list[str] = []
    for part in message.walk():
        if part is message:
            continue
        if value := headers.raw(part, "Message-ID"):
            found += headers.ids(value)
    found += _RETURNED_ID.findall(_texts(message))
    found += headers.ids(headers.raw(message, "In-Reply-To")) + headers.ids(
        headers.raw(message, "References")
    )
    return list(dict.fromkeys(found))[:MOST_IDS]


def _texts(message: Message) -> str:
    pieces: list[str] = []
    room = _LOOKED
    for part in message.walk():
        if room <= 0:
            break
        if part.get_content_maintype() != "text":
            continue
        payload = part.get_payload(decode=True)
        if isinstance(payload, bytes):
            pieces.append(payload[:room].decode("utf-8", "replace").replace("\r\n", "\n"))
            room -= len(payload)
    return "\n".join(pieces)
