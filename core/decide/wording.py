"""The words of a reply: the tenant's own text or the built-in one, in the customer's language, filled in.

Pure; shared by the gates (consent) and the rules.
"""

from __future__ import annotations

from core.decide import texts
from core.decide.config import GateSettings
from core.decide.language import guess
from core.decide.port import MAX_REPLY_CHARS, Context


def language_of(context: Context, settings: GateSettings) -> str:
    """The customer's language: what they write now, else what they wrote before, else the tenant's default."""
    now = [message.content for message in reversed(context.messages)]
    before = [turn.content for turn in reversed(context.history) if turn.author == "customer"]
    return guess([*now, *before]) or settings.language


def built_in(context: Context, settings: GateSettings, name: str) -> str | None:
    """The text of this name, or None when there is none or the tenant wants nothing said."""
    wording = settings.texts.get(name, texts.BUILT_IN.get(name))
    if wording is None or wording is False:
        return None
    return filled(context, settings, wording)


def filled(context: Context, settings: GateSettings, wording: texts.Wording) -> str | None:
    text = texts.pick(wording, language_of(context, settings), settings.language)
    if text is None:
        return None
    values = {
        "name": context.lead.name,
        "agent": context.agent.name if context.agent else None,
        "business": settings.business or context.tenant.name,
    }
    return texts.fill(text, values)[:MAX_REPLY_CHARS] or None
