"""The rules decider: what it understands in many languages, and what it leaves to a person."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from core.channel import MessageType
from core.decide.port import Context, Decision
from core.decide.rules import RulesDecider, decide
from tests.unit.decide.conftest import NOW, MakeContext, incoming, turn

PERSON = [
    "Can I talk to a human?",
    "I want to speak to someone",
    "human",
    "AGENT",
    "real person please",
    "are you a bot?",
    "let me speak to a manager",
    "nak cakap dengan orang",
    "Boleh saya bercakap dengan staf?",
    "bicara dengan admin dong",
    "人工",
    "转人工客服",
    "我要找经理",
    "மனிதரிடம் பேச வேண்டும்",
    "मुझे किसी इंसान से बात करनी है",
    "Quiero hablar con una persona",
    "quero falar com um atendente",
    "Je voudrais parler à quelqu'un",
    "Ich möchte mit einem Menschen sprechen",
    "vorrei parlare con un operatore",
    "ik wil met een medewerker praten",
    "أريد التحدث مع موظف",
    "Соедините с оператором",
    "Müşteri temsilcisi ile görüşmek istiyorum",
    "Cho tôi gặp nhân viên",
    "ขอคุยกับเจ้าหน้าที่",
    "担当者と話したい",
    "상담원 연결해 주세요",
]
COMPLAINTS = [
    "I want a refund",
    "This is a SCAM!!!",
    "I will call my lawyer",
    "worst service ever",
    "Item arrived damaged",
    "Saya nak buat aduan",
    "servis teruk betul",
    "saya sangat kecewa, penipu!",
    "我要退款",
    "你们是骗子",
    "பணத்தை திருப்பி கொடுங்கள்",
    "मुझे पैसे वापस चाहिए",
    "Quiero un reembolso",
    "es una estafa",
    "quero meu dinheiro de volta",
    "c'est une arnaque",
    "Ich möchte mein Geld zurück",
    "das ist Betrug",
    "voglio un rimborso",
    "ik heb een klacht",
    "أريد استرجاع المبلغ",
    "Верните деньги!",
    "Paramı geri istiyorum",
    "tôi muốn khiếu nại",
    "ขอเงินคืน",
    "返金してください",
    "환불해 주세요",
]
GREETINGS = [
    "hi",
    "Hello!",
    "Good morning 😊",
    "hi there",
    "/start",
    "Salam",
    "Assalamualaikum",
    "selamat pagi",
    "Halo kak",
    "你好",
    "您好！",
    "வணக்கம்",
    "नमस्ते",
    "Hola",
    "buenos dias",
    "Buenos días!",
    "Olá",
    "bom dia",
    "Bonjour",
    "Guten Tag",
    "Moin",
    "Ciao",
    "Hoi",
    "مرحبا",
    "السلام عليكم",
    "Здравствуйте!",
    "Merhaba",
    "xin chào",
    "สวัสดีครับ",
    "こんにちは",
    "안녕하세요",
]
THANKS = [
    "thanks",
    "Thank you!",
    "ok",
    "ok thanks 👍",
    "Bye",
    "terima kasih",
    "makasih kak",
    "谢谢",
    "好的",
    "நன்றி",
    "धन्यवाद",
    "Gracias!",
    "muito obrigado",
    "Merci beaucoup",
    "Danke!",
    "Alles klar, danke",
    "grazie mille",
    "dank je wel",
    "شكراً",
    "Спасибо большое",
    "teşekkürler",
    "cảm ơn",
    "ขอบคุณค่ะ",
    "ありがとうございます",
    "감사합니다",
]
UNCLEAR = [
    "Do you deliver to Penang?",
    "my thermal paper is 80mm",
    "hi, do you have size 42?",
    "thanks but which one is better?",
    "stop by the shop tomorrow",
    "Is the agent fee included?",
    "the human body chart poster",
    "berapa hari penghantaran?",
    "你们几点开门",
    "Haben Sie das auch in Rot?",
    "est-ce que c'est disponible",
    "¿tienen talla 42?",
    "сколько дней идёт доставка",
]


def label(decision: Decision) -> tuple[str, str]:
    return decision.action, decision.label


@pytest.mark.parametrize("text", PERSON)
def test_who_asks_for_a_person_gets_one(context: MakeContext, text: str) -> None:
    decision = decide(context(text))
    assert label(decision) == ("human_takeover", "human_request")
    assert decision.reply


@pytest.mark.parametrize("text", COMPLAINTS)
def test_a_complaint_goes_to_a_person(context: MakeContext, text: str) -> None:
    assert label(decide(context(text))) == ("human_takeover", "complaint")


@pytest.mark.parametrize("text", GREETINGS)
def test_a_greeting_is_greeted(context: MakeContext, text: str) -> None:
    decision = decide(context(text))
    assert label(decision) == ("auto_reply", "greeting")
    assert "Aisha" in (decision.reply or "")


@pytest.mark.parametrize("text", THANKS)
def test_thanks_and_goodbyes_need_no_answer(context: MakeContext, text: str) -> None:
    assert label(decide(context(text))) == ("ignore", "thanks")


@pytest.mark.parametrize("text", UNCLEAR)
def test_what_no_rule_covers_is_left_to_a_person(context: MakeContext, text: str) -> None:
    decision = decide(context(text))
    assert (decision.action, decision.reason, decision.reply) == ("human_takeover", "no_rule", None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("How much is the blue one?", "price"),
        ("berapa harga?", "price"),
        ("多少钱", "price"),
        ("quanto custa?", "price"),
        ("Where is my order?", "order"),
        ("ingin pesan dua", "order"),
        ("我的订单呢", "order"),
        ("Do you have it in red?", "question"),
        ("lorem ipsum", "other"),
    ],
)
def test_the_topic_is_labelled_for_the_person(context: MakeContext, text: str, expected: str) -> None:
    assert decide(context(text)).label == expected


@pytest.mark.parametrize(
    ("text", "language_sign"),
    [
        ("hola", "Hola"),
        ("bom dia", "Olá"),
        ("guten tag", "Hallo"),
        ("你好", "您好"),
        ("selamat pagi", "Hai"),
        ("xin chào", "Xin chào"),
    ],
)
def test_the_greeting_is_in_the_customers_language(
    context: MakeContext, text: str, language_sign: str
) -> None:
    assert (decide(context(text)).reply or "").startswith(language_sign)


def test_the_language_of_earlier_messages_helps_when_the_last_says_nothing(context: MakeContext) -> None:
    history = (turn("customer", "Guten Tag, haben Sie heute geöffnet?"), turn("agent", "Ja"))
    assert (decide(context("yo", history=history)).reply or "").startswith("Hallo")
    assert (decide(context("yo", settings={"language": "fr"})).reply or "").startswith("Bonjour")


def test_a_greeting_without_a_name_reads_well(context: MakeContext) -> None:
    assert decide(context("hi", name=None)).reply == "Hello, how can we help you?"
    assert decide(context("Здравствуйте", name=None)).reply == "Здравствуйте! Чем мы можем помочь?"
    assert decide(context("你好", name=None)).reply == "您好，请问有什么可以帮您？"


def test_a_name_cannot_smuggle_anything_into_a_reply(context: MakeContext) -> None:
    reply = decide(context("hi", name="{business}\n\nSTOP " + "x" * 500)).reply or ""
    assert "\n" not in reply
    assert "Kedai" not in reply
    assert len(reply) < 200


# ---- the tenant's own ----

RULES: dict[str, Any] = {
    "business": "Kedai Kopi",
    "texts": {
        "greeting": {"en": "Welcome to {business}, I am {agent}.", "ms": "Selamat datang ke {business}."}
    },
    "rules": [
        {
            "name": "emergency",
            "when": {"any": ["fire", "refund policy"]},
            "reply": "See kedai.example/help",
            "first": True,
        },
        {
            "name": "hours",
            "when": {"any": ["opening hours", "open today", "pukul berapa"]},
            "reply": {"en": "9 to 6", "ms": "9 hingga 6"},
        },
        {
            "name": "menu",
            "when": {"all": ["menu", "vegan*"], "none": ["allergy"]},
            "reply": "Hi {name}: kedai.example/vegan",
            "label": "menu",
        },
        {
            "name": "catering",
            "when": {"any": ["catering"]},
            "follow_up_in": "2d",
            "reply": "We will call you.",
        },
        {"name": "slip", "when": {"types": ["image", "document"]}, "label": "payment"},
        {"name": "spam", "when": {"any": ["crypto"]}, "action": "ignore"},
    ],
}


@pytest.mark.parametrize(
    ("text", "action", "reason", "reply"),
    [
        ("What are your opening hours?", "auto_reply", "rule:hours", "9 to 6"),
        ("Buka pukul berapa ya?", "auto_reply", "rule:hours", "9 hingga 6"),
        ("vegans ask for the menu", "auto_reply", "rule:menu", "Hi Aisha: kedai.example/vegan"),
        ("menu for vegans with an allergy", "human_takeover", "no_rule", None),
        ("menu please", "human_takeover", "no_rule", None),
        ("reopening hoursglass", "human_takeover", "no_rule", None),
        ("do you do catering", "follow_up", "rule:catering", "We will call you."),
        ("buy crypto", "ignore", "rule:spam", None),
        ("your catering is a scam", "human_takeover", "complaint", "A colleague will answer you here."),
        ("what is your refund policy", "auto_reply", "rule:emergency", "See kedai.example/help"),
        (
            "talk to a human about catering",
            "human_takeover",
            "asked_for_a_person",
            "A colleague will answer you here.",
        ),
        ("hello", "auto_reply", "greeting", "Welcome to Kedai Kopi, I am Sam."),
        ("hai", "auto_reply", "greeting", "Selamat datang ke Kedai Kopi."),
    ],
)
def test_a_tenants_rules_words_and_their_order(
    context: MakeContext, text: str, action: str, reason: str, reply: str | None
) -> None:
    decision = decide(context(text, settings=RULES))
    assert (decision.action, decision.reason, decision.reply) == (action, reason, reply)


def test_a_follow_up_rule_says_when(context: MakeContext) -> None:
    decision = decide(context("catering?", settings=RULES))
    assert decision.follow_up_at == NOW + timedelta(days=2)
    assert decision.next_step == "contact_again"


def test_rules_by_message_type(context: MakeContext) -> None:
    decision = decide(context(incoming(None, message_type=MessageType.IMAGE), settings=RULES))
    assert (decision.action, decision.reason, decision.label) == ("human_takeover", "rule:slip", "payment")


def test_a_burst_is_read_as_a_whole(context: MakeContext) -> None:
    assert decide(context("hi", "what are your opening hours", settings=RULES)).reason == "rule:hours"
    assert decide(context("hi", "hello?")).reason == "greeting"
    assert decide(context("hi", "do you have size 42")).reason == "no_rule"


def test_a_default_reply_takes_the_place_of_a_person(context: MakeContext) -> None:
    decision = decide(context("lorem", settings={"default_reply": "Thanks {name}, noted."}))
    assert (decision.action, decision.reason, decision.reply) == (
        "auto_reply",
        "default_reply",
        "Thanks Aisha, noted.",
    )


def test_built_in_rules_can_be_turned_off(context: MakeContext) -> None:
    off = {
        "built_in": dict.fromkeys(("greeting", "thanks", "human_request", "complaint", "follow_up"), False)
    }
    for text in ("hi", "thanks", "human", "refund", "call me tomorrow"):
        assert decide(context(text, settings=off)).reason == "no_rule"
    silent = {"texts": {"greeting": False, "handover": False, "thanks": "You are welcome"}}
    assert decide(context("hi", settings=silent)).reason == "no_rule"
    assert decide(context("human", settings=silent)).reply is None
    assert decide(context("thanks", settings=silent)).reply == "You are welcome"


def test_stickers_are_let_be_and_pictures_go_to_a_person(context: MakeContext) -> None:
    assert decide(context(incoming(None, message_type=MessageType.STICKER))).reason == "sticker"
    assert decide(context(incoming(None, message_type=MessageType.AUDIO))).reason == "no_rule"


def test_wrong_settings_leave_the_thread_to_a_person(context: MakeContext) -> None:
    decision = decide(context("hi", settings={"rules": [{"name": "x"}]}))
    assert (decision.action, decision.reason) == ("human_takeover", "invalid_settings")


# ---- opening hours ----

HOURS: dict[str, Any] = {
    "opening_hours": {"wed": ["09:00-12:30", "13:30-18:00"], "fri": ["20:00-02:00"]},
    "rules": [
        {"name": "price", "when": {"any": ["price"]}, "reply": "RM 5"},
        {"name": "night", "when": {"any": ["urgent"], "open": False}, "reply": "Call 999"},
    ],
}


def at(day: int, clock: str) -> datetime:
    hours, minutes = clock.split(":")
    return datetime(2026, 3, day, int(hours), int(minutes), tzinfo=UTC)


@pytest.mark.parametrize(
    ("now", "timezone", "closed"),
    [
        (at(4, "10:00"), "UTC", False),  # Wednesday
        (at(4, "12:30"), "UTC", True),
        (at(4, "12:59"), "UTC", True),
        (at(4, "13:30"), "UTC", False),
        (at(4, "18:00"), "UTC", True),
        (at(4, "02:00"), "Asia/Kuala_Lumpur", False),
        (at(4, "10:30"), "Asia/Kuala_Lumpur", True),
        (at(5, "10:00"), "UTC", True),
        (at(6, "21:00"), "UTC", False),  # Friday
        (at(7, "01:59"), "UTC", False),  # still Friday's evening
        (at(7, "02:00"), "UTC", True),
    ],
)
def test_out_of_hours_is_told_by_the_workspaces_clock(
    context: MakeContext, now: datetime, timezone: str, closed: bool
) -> None:
    decision = decide(context("hello", settings=HOURS, now=now, timezone=timezone))
    assert (decision.reason == "out_of_hours") is closed
    assert decision.action == "auto_reply"


def test_out_of_hours_is_told_once_per_closed_period(context: MakeContext) -> None:
    evening, morning = at(4, "20:00"), at(5, "08:00")
    first = decide(context("hello", settings=HOURS, now=evening))
    assert first.said == ("out_of_hours",)
    again = decide(context("hello", settings=HOURS, now=morning, said_at={"out_of_hours": evening}))
    assert again.reason == "greeting"
    next_period = decide(
        context("hello", settings=HOURS, now=at(7, "09:00"), said_at={"out_of_hours": evening})
    )
    assert next_period.reason == "out_of_hours"


def test_when_closed_a_takeover_says_so_and_the_tenants_answers_still_stand(context: MakeContext) -> None:
    now = at(4, "20:00")
    takeover = decide(context("do you have size 42?", settings=HOURS, now=now))
    assert (takeover.action, takeover.reason, takeover.said) == (
        "human_takeover",
        "no_rule",
        ("out_of_hours",),
    )
    assert takeover.reply
    assert decide(context("what is the price", settings=HOURS, now=now)).reply == "RM 5"
    assert decide(context("urgent", settings=HOURS, now=now)).reply == "Call 999"
    assert decide(context("urgent", settings=HOURS, now=at(4, "10:00"))).reason == "no_rule"
    assert decide(context("thanks", settings=HOURS, now=now)).action == "ignore"


def test_a_closed_date_is_closed_all_day(context: MakeContext) -> None:
    closed = {**HOURS, "closed_dates": ["2026-03-04"]}
    assert decide(context("hello", settings=closed, now=at(4, "10:00"))).reason == "out_of_hours"


def test_daylight_saving_moves_the_hours_with_the_clock_on_the_wall(context: MakeContext) -> None:
    berlin = {"opening_hours": {"mon": ["09:00-18:00"]}, "timezone": "Europe/Berlin"}
    winter = datetime(2026, 3, 23, 7, 30, tzinfo=UTC)  # 08:30 in Berlin
    summer = datetime(2026, 3, 30, 7, 30, tzinfo=UTC)  # 09:30 in Berlin
    assert decide(context("hello", settings=berlin, now=winter)).reason == "out_of_hours"
    assert decide(context("hello", settings=berlin, now=summer)).reason == "greeting"


# ---- follow-ups ----


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Call me tomorrow", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("tomorrow", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("please contact me next week", datetime(2026, 3, 9, 10, 0, tzinfo=UTC)),
        ("I'll let you know next month", datetime(2026, 4, 3, 10, 0, tzinfo=UTC)),
        ("remind me in 2 hours", NOW + timedelta(hours=2)),
        ("can you call me in 30 minutes?", NOW + timedelta(minutes=30)),
        ("call me on friday", datetime(2026, 3, 6, 10, 0, tzinfo=UTC)),
        ("message me wednesday", datetime(2026, 3, 11, 10, 0, tzinfo=UTC)),
        ("talk later", NOW + timedelta(hours=4)),
        ("later", NOW + timedelta(hours=4)),
        ("nanti", NOW + timedelta(hours=4)),
        ("call me tonight", datetime(2026, 3, 4, 19, 0, tzinfo=UTC)),
        ("hubungi saya esok", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("hubungi lagi minggu depan ya", datetime(2026, 3, 9, 10, 0, tzinfo=UTC)),
        ("明天联系我", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("Llámame mañana", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("me liga amanhã", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("rappelez-moi demain", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("Rufen Sie mich nächste Woche an", datetime(2026, 3, 9, 10, 0, tzinfo=UTC)),
        ("перезвоните завтра", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("내일 전화해 주세요", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
        ("明日連絡してください", datetime(2026, 3, 5, 10, 0, tzinfo=UTC)),
    ],
)
def test_not_now_becomes_a_follow_up(context: MakeContext, text: str, expected: datetime) -> None:
    decision = decide(context(text))
    assert (decision.action, decision.label) == ("follow_up", "follow_up")
    assert decision.follow_up_at == expected
    assert decision.reply


@pytest.mark.parametrize(
    "text",
    [
        "can I come tomorrow?",
        "are you open next week?",
        "stop by the shop tomorrow",
        "I need it tomorrow",
        "nanti macam mana?",
        "delivery takes 3 days?",
        "call me",
        "see the attached list of 14 days",
    ],
)
def test_a_question_that_names_a_day_is_no_follow_up(context: MakeContext, text: str) -> None:
    assert decide(context(text)).action == "human_takeover"


def test_tomorrow_is_the_workspaces_tomorrow(context: MakeContext) -> None:
    late = datetime(2026, 3, 4, 20, 0, tzinfo=UTC)  # already Thursday in Kuala Lumpur
    decision = decide(context("call me tomorrow", now=late, timezone="Asia/Kuala_Lumpur"))
    assert decision.follow_up_at == datetime(2026, 3, 6, 2, 0, tzinfo=UTC)


def test_a_question_after_it_wants_an_answer(context: MakeContext) -> None:
    assert decide(context("call me tomorrow", "what does the blue one cost?")).label == "price"


# ---- robustness ----


@given(
    texts=st.lists(st.text(max_size=300), min_size=1, max_size=5),
    name=st.one_of(st.none(), st.text(max_size=80)),
    kind=st.sampled_from([MessageType.TEXT, MessageType.IMAGE, MessageType.STICKER]),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_no_text_breaks_the_rules(
    context: MakeContext, texts: list[str], name: str | None, kind: MessageType
) -> None:
    shown: Context = context(
        *(incoming(text, n, message_type=kind) for n, text in enumerate(texts)), name=name, settings=RULES
    )
    decision = asyncio.run(RulesDecider().decide(shown))
    assert decision.action in ("auto_reply", "follow_up", "human_takeover", "ignore")


def test_a_very_long_message_is_decided_at_once(context: MakeContext) -> None:
    import time

    started = time.perf_counter()
    decide(context("lorem ipsum " * 200_000, settings=RULES))
    assert time.perf_counter() - started < 2
