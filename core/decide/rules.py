"""The rules decider: useful without a model. A wish for a person, complaints, the tenant's own rules, hours, greetings.

Looks at nothing but its context and never raises on any text; what it does not understand it leaves to a person.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

from core import log as logs
from core.channel import MessageType
from core.decide import hours, phrases
from core.decide.config import Rule, RulesSettings, read
from core.decide.context import zone
from core.decide.later import follow_up_at
from core.decide.match import Phrases, normalise
from core.decide.port import Context, Decision
from core.decide.wording import built_in, filled

log = logs.get(part="decide")

_MEDIA_WITHOUT_WORDS = frozenset({MessageType.STICKER})
SURE, LIKELY, GUESSED = 1.0, 0.8, 0.5


@dataclass(frozen=True, slots=True)
class _Case:
    """A burst as the rules see it."""

    context: Context
    settings: RulesSettings
    lines: tuple[str, ...]
    """What was written, message by message."""
    open: bool

    def says(self, words: Phrases) -> bool:
        return any(words.within(normalise(line)) for line in self.lines)

    def only_says(self, words: Phrases) -> bool:
        return bool(self.lines) and all(words.whole(line) for line in self.lines)


class RulesDecider:
    """Stateless; one for the whole process."""

    name = "rules"

    async def decide(self, context: Context) -> Decision:
        return decide(context)


def decide(context: Context) -> Decision:
    """The first that fits: a person asked for, urgent rules, complaint, rules, greeting, thanks, later, default."""
    settings, problem = read(context.agent.settings if context.agent else {})
    if problem is not None:
        log.error(
            "agent.misconfigured",
            tenant_id=context.tenant.id,
            agent_id=context.agent.id if context.agent else None,
            error=problem,
        )
        return Decision("human_takeover", "invalid_settings")
    lines = tuple(
        message.content for message in context.messages if message.content and message.content.strip()
    )
    case = _Case(
        context, settings, lines, hours.is_open(settings, context.now, settings.zone or context.timezone)
    )
    decision = (
        _human_request(case)
        or _own_rules(case, first=True)
        or _complaint(case)
        or _own_rules(case, first=False)
        or _small_talk(case)
        or _later(case)
        or _fallback(case)
    )
    return _closed(case, decision)


# ---- the steps ----


def _human_request(case: _Case) -> Decision | None:
    if not case.settings.built_in.human_request:
        return None
    if not (case.says(phrases.HUMAN) or any(phrases.HUMAN_WHOLE.whole(line) for line in case.lines)):
        return None
    return _hand_over(case, "asked_for_a_person", "human_request", LIKELY)


def _complaint(case: _Case) -> Decision | None:
    if not case.settings.built_in.complaint or not case.says(phrases.COMPLAINT):
        return None
    return _hand_over(case, "complaint", "complaint", LIKELY)


def _own_rules(case: _Case, *, first: bool) -> Decision | None:
    for rule in case.settings.rules:
        if rule.first is first and _fits(case, rule):
            return _apply(case, rule)
    return None


def _small_talk(case: _Case) -> Decision | None:
    on = case.settings.built_in
    if on.greeting and case.only_says(phrases.GREETING):
        reply = built_in(case.context, case.settings, "greeting")
        if reply is not None:
            return Decision(
                "auto_reply", "greeting", "greeting", reply=reply, confidence=SURE, said=("greeting",)
            )
    if on.thanks and case.only_says(phrases.THANKS):
        reply = built_in(case.context, case.settings, "thanks")
        if reply is None:
            return Decision("ignore", "thanks", "thanks", confidence=SURE)
        return Decision("auto_reply", "thanks", "thanks", reply=reply, confidence=SURE, said=("thanks",))
    return None


def _later(case: _Case) -> Decision | None:
    if not case.settings.built_in.follow_up or not case.lines:
        return None
    # Only the last word counts: "call me tomorrow" and then "what does it cost?" wants an answer.
    theirs = zone(case.context.lead.timezone) or case.context.timezone
    when = follow_up_at(case.lines[-1], case.context.now, theirs)
    if when is None:
        return None
    reply = built_in(case.context, case.settings, "follow_up")
    return Decision(
        "follow_up",
        "asked_for_later",
        "follow_up",
        reply=reply,
        confidence=LIKELY,
        next_step="contact_again",
        follow_up_at=when,
        said=("follow_up",) if reply else (),
    )


def _fallback(case: _Case) -> Decision:
    if not case.lines and all(m.message_type in _MEDIA_WITHOUT_WORDS for m in case.context.messages):
        return Decision("ignore", "sticker", confidence=LIKELY)
    label = _topic(case)
    if case.settings.default_reply is not None:
        reply = filled(case.context, case.settings, case.settings.default_reply)
        if reply is not None:
            return Decision("auto_reply", "default_reply", label, reply=reply, confidence=GUESSED)
    return Decision("human_takeover", "no_rule", label, confidence=GUESSED)


def _topic(case: _Case) -> str:
    if case.says(phrases.PRICE):
        return "price"
    if case.says(phrases.ORDER):
        return "order"
    return "question" if any(normalise(line).question for line in case.lines) else "other"


def _hand_over(case: _Case, reason: str, label: str, confidence: float) -> Decision:
    reply = built_in(case.context, case.settings, "handover")
    return Decision(
        "human_takeover",
        reason,
        label,
        reply=reply,
        confidence=confidence,
        said=("handover",) if reply else (),
    )


# ---- the tenant's own rules ----


def _fits(case: _Case, rule: Rule) -> bool:
    when = rule.when
    if when.open is not None and when.open is not case.open:
        return False
    if when.types and not any(message.message_type in when.types for message in case.context.messages):
        return False
    if when.any and not case.says(_phrases(when.any)):
        return False
    if when.none and case.says(_phrases(when.none)):
        return False
    return all(case.says(_phrases((phrase,))) for phrase in when.all)


@lru_cache(maxsize=4096)
def _phrases(words: tuple[str, ...]) -> Phrases:
    return Phrases(words)


def _apply(case: _Case, rule: Rule) -> Decision:
    action = rule.resolved_action
    reply = filled(case.context, case.settings, rule.reply) if rule.reply is not None else None
    if action == "auto_reply" and reply is None:
        return Decision("human_takeover", "empty_reply", rule.label)
    return Decision(
        action,
        _reason(rule),
        rule.label,
        reply=reply,
        confidence=SURE,
        next_step="contact_again" if action == "follow_up" else None,
        follow_up_at=case.context.now + rule.follow_up_in if rule.follow_up_in is not None else None,
    )


def _reason(rule: Rule) -> str:
    return f"rule:{rule.name}"[:64]


# ---- closed ----


def _closed(case: _Case, decision: Decision) -> Decision:
    """Outside opening hours say so, once in a thread and closed period, where nobody would answer soon otherwise.

    The tenant's own replies and the confirmation of a follow-up stand as they are.
    """
    greeted = decision.reason in ("greeting", "default_reply")
    if case.open or not (greeted or decision.action == "human_takeover"):
        return decision
    own_text = decision.reason.startswith("rule:") and decision.reply is not None
    if own_text:
        return decision
    since = hours.closed_since(case.settings, case.context.now, case.settings.zone or case.context.timezone)
    told = case.context.said_at.get("out_of_hours")
    if since is None or (told is not None and told >= since):
        return decision
    reply = built_in(case.context, case.settings, "out_of_hours")
    if reply is None:
        return decision
    reason = "out_of_hours" if decision.action == "auto_reply" else decision.reason
    return replace(decision, reply=reply, reason=reason, said=("out_of_hours",))
