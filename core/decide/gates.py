"""What is settled before any decider is asked, in a fixed order, each with a reason code. Pure.

Consent is settled here and nowhere else: no decider, a model least of all, can miss or invent an opt-out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from core.channel import MessageId, MessageType
from core.decide.config import GateSettings, read
from core.decide.match import Phrases, normalise
from core.decide.phrases import AUTOMATIC, OPT_IN, OPT_OUT
from core.decide.port import Consent, Context, Decision, Incoming
from core.decide.wording import built_in

NAME = "gates"
"""Stands in `et_decisions.decider` when a gate decided."""

_WITHOUT_ANSWER = {
    MessageType.REACTION: "reaction",
    MessageType.DELETED: "deleted",
    MessageType.EDITED: "edited",
}
_AUTOMATIC_CHARS = 400
"""Only the beginning is searched for the words of a vacation notice: further down they are somebody's story."""
_LOOP_TEXTS = 3
_LOOP_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the gates say about a burst.

    `settled`: messages that need nothing (their decision stands), by id. `burst`: the others, which are decided
    together. `decision`: the burst's, or None: ask the decider about `burst`.
    """

    burst: tuple[Incoming, ...]
    settled: Mapping[MessageId, Decision] = field(default_factory=dict)
    decision: Decision | None = None


def judge(context: Context) -> Verdict:
    """Pass a burst through the gates. Never raises."""
    settled: dict[MessageId, Decision] = {}
    burst: list[Incoming] = []
    for message in context.messages:
        decision = _message_gate(context, message)
        if decision is None:
            burst.append(message)
        else:
            settled[message.id] = decision
    if not burst:
        return Verdict((), settled)
    shown = replace(context, messages=tuple(burst))
    return Verdict(tuple(burst), settled, _thread_gates(shown))


def _message_gate(context: Context, message: Incoming) -> Decision | None:
    if message.direction != "inbound":
        return Decision("ignore", "own_message")
    if message.is_history:
        return Decision("ignore", "history")
    if context.lead.kind == "group":
        return Decision("ignore", "group")
    if message.message_type in _WITHOUT_ANSWER:
        return Decision("ignore", _WITHOUT_ANSWER[message.message_type])
    if message.media and message.media.get("call") in ("declined", "answered"):
        return Decision("ignore", "call")
    if message.media and message.media.get("notice") is True:
        return Decision("ignore", "notice")
    return None


def _thread_gates(context: Context) -> Decision | None:
    settings, _ = read(context.agent.settings if context.agent else {})
    consent = _consent(context, settings)
    if consent is None and context.lead.opted_out_at is not None:
        return Decision("ignore", "opted_out", "opt_out")
    held_back = _held_back(context, settings)
    if consent is not None:
        return _consented(context, settings, consent, silent=held_back is not None)
    return held_back


def _held_back(context: Context, settings: GateSettings) -> Decision | None:
    """Why nothing may be sent to this thread by itself, or None."""
    if context.tenant.status != "active":
        return Decision("ignore", "tenant_suspended")
    if context.thread.handled_by == "human":
        return Decision("human_takeover", "handled_by_human")
    if context.agent is None:
        return Decision("human_takeover", "no_agent")
    if any(message.placeholder for message in context.messages):
        return Decision("human_takeover", "undecryptable")
    if any(message.message_type is MessageType.UNSUPPORTED for message in context.messages):
        return Decision("human_takeover", "unsupported")
    if all(written_by_a_machine(message) for message in context.messages):
        return Decision("ignore", "automatic_message", "automatic")
    caps, traffic = settings.caps, context.traffic
    if traffic.automatic_10min >= caps.per_10_minutes or traffic.automatic_day >= caps.per_day:
        return Decision("human_takeover", "reply_cap")
    if _repeats_itself(context):
        return Decision("human_takeover", "loop", "automatic")
    newest = max(min(message.occurred_at, message.received_at) for message in context.messages)
    if context.now - newest > settings.max_age:
        return Decision("human_takeover", "stale")
    return None


def written_by_a_machine(message: Incoming) -> bool:
    """Whether a vacation notice or a greeting bot wrote this: by the mail's headers, else by its words."""
    if message.automatic:
        return True
    return bool(message.content) and AUTOMATIC.within(normalise((message.content or "")[:_AUTOMATIC_CHARS]))


def _repeats_itself(context: Context) -> bool:
    """The same text again and again, each time after an answer of ours: a machine on the other side."""
    said = Counter(
        normalise(text).folded
        for text, at in (
            *((turn.content, turn.at) for turn in context.history if turn.author == "customer"),
            *((message.content, message.occurred_at) for message in context.messages),
        )
        if text and (context.now - at).total_seconds() <= _LOOP_SECONDS
    )
    answers = sum(
        turn.author == "agent" and (context.now - turn.at).total_seconds() <= _LOOP_SECONDS
        for turn in context.history
    )
    return answers >= _LOOP_TEXTS - 1 and any(
        said[normalise(message.content).folded] >= _LOOP_TEXTS
        for message in context.messages
        if message.content
    )


# ---- consent ----


def _consent(context: Context, settings: GateSettings) -> Consent | None:
    """What the burst says about being written to; its last word counts. START means nothing to who is not opted out."""
    own = Phrases(settings.opt_out_words)
    wish: Consent | None = None
    for message in context.messages:
        text = message.content
        if not text or message.message_type is not MessageType.TEXT or message.automatic:
            continue
        if OPT_OUT.whole(text) or own.whole(text):
            wish = "opt_out"
        elif OPT_IN.whole(text) and (wish == "opt_out" or context.lead.opted_out_at is not None):
            wish = "opt_in"
    if wish == "opt_out" and context.lead.opted_out_at is not None:
        return None  # said before, confirmed before
    if wish == "opt_in" and context.lead.opted_out_at is None:
        return None  # took it back in the same breath
    return wish


def _consented(context: Context, settings: GateSettings, consent: Consent, *, silent: bool) -> Decision:
    """The wish is recorded in any case; the one confirmation is sent only where a reply is allowed at all."""
    reply = None if silent else built_in(context, settings, consent)
    if reply is None:
        return Decision("ignore", consent, consent, confidence=1.0, consent=consent)
    return Decision(
        "auto_reply", consent, consent, reply=reply, confidence=1.0, consent=consent, said=(consent,)
    )
