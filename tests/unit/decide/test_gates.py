"""The gates: consent in every language, and why a thread gets no automatic reply."""

from __future__ import annotations

from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.channel import MessageId, MessageType
from core.decide.gates import judge, written_by_a_machine
from core.decide.phrases import OPT_IN, OPT_OUT
from core.decide.port import Traffic
from tests.unit.decide.conftest import NOW, MakeContext, incoming, turn

OPT_OUTS = [
    "STOP",
    "stop",
    "Stop!",
    "  stop.  ",
    "ＳＴＯＰ",
    "S T O P",
    "*STOP*",
    "STOP 🛑",
    "🛑STOP🛑",
    "stop stop stop",
    "Stop please",
    "Please STOP",
    "ok stop",
    "stop, thanks",
    "Stop. Don't message me again.",
    "STOP\nSTOP",
    "Unsubscribe",
    "UNSUBSCRIBE ME!!",
    "opt-out",
    "Opt out",
    "OPTOUT",
    "quit",
    "END",
    "cancel",
    "revoke",
    "Remove me from your list",
    "don’t text me",
    "Do not contact me again",
    "stop messaging me",
    "no more messages",
    "Leave me alone!",
    "STOPALL",
    "Berhenti",
    "henti",
    "jangan mesej lagi",
    "Tolong berhenti",
    "nyahlanggan",
    "jangan hubungi saya lagi",
    "berhenti berlangganan",
    "jangan kirim pesan lagi!",
    "退订",
    "退訂",
    "TD",
    "停止",
    "请退订",
    "不要再发了！",
    "取消订阅",
    "别再发了",
    "【退订】",
    "நிறுத்து",
    "நிறுத்தவும்.",
    "रोको",
    "बंद करो",
    "कृपया बंद करें",
    "band karo",
    "मैसेज मत भेजो",
    "BAJA",
    "darme de baja",
    "no más mensajes",
    "No mas mensajes",
    "no me escriban más",
    "Por favor, no me escriban",
    "PARAR",
    "sair",
    "não quero mais mensagens",
    "Nao quero mais mensagens.",
    "cancelar inscrição",
    "cancelar inscricao",
    "ARRÊT",
    "arret",
    "désabonner",
    "desabonner",
    "Ne m’écrivez plus",
    "arrêtez svp",
    "Stopp",
    "Abmelden",
    "bitte abmelden",
    "Keine Nachrichten mehr!",
    "Hören Sie auf",
    "abbestellen",
    "disiscrivimi",
    "Non scrivetemi più",
    "non voglio più messaggi",
    "afmelden",
    "Geen berichten meer",
    "schrijf me uit",
    "توقف",
    "إلغاء الاشتراك",
    "الغاء الاشتراك",
    "إيقاف",
    "ايقاف",
    "لا تراسلني",
    "قِف",
    "стоп",
    "СТОП!",
    "отписаться",
    "Не пишите мне больше",
    "хватит",
    "отписка",
    "dur",
    "İPTAL",
    "iptal",
    "abonelikten çık",
    "Mesaj atmayın",
    "bana yazmayın lütfen",
    "dừng lại",
    "Hủy đăng ký",
    "ngừng",
    "đừng nhắn tin nữa",
    "TC",
    "หยุด",
    "ยกเลิก",
    "หยุดส่งข้อความ",
    "配信停止",
    "解除",
    "やめてください",
    "送らないでください。",
    "수신거부",
    "수신 거부",
    "그만",
    "그만 보내세요",
    "구독취소",
    "wypisz mnie",
    "itigil",
    "acha",
]

NO_OPT_OUTS = [
    "stop by the shop tomorrow",
    "Can you stop by later?",
    "non-stop service?",
    "where is the bus stop",
    "I can't stop laughing",
    "don't stop",
    "stopover in Doha",
    "the weekend",
    "What happens at the end?",
    "How do I cancel my booking?",
    "cancel my order 1234",
    "please remove the onions",
    "quite good",
    "I quit my job",
    "should I unsubscribe from Netflix or can you help",
    "S",
    "st op by",
    "bila tarikh tamat?",
    "berhenti di mana?",
    "saya mahu berhenti kerja",
    "kedai tak berhenti ke",
    "停止营业了吗",
    "什么时候停止",
    "退订的流程是什么",
    "取消",
    "你好",
    "停车场在哪里",
    "está de baja el producto?",
    "precio más bajo",
    "¿dónde puedo parar el coche?",
    "sair com amigos",
    "vou sair agora",
    "arrêt de bus",
    "où est l'arrêt de bus ?",
    "Wo ist der Stoppschild-Laden",
    "wann kann ich mich anmelden",
    "Ende der Woche passt",
    "basta così",
    "quando finisce",
    "waar is de bushalte",
    "متى يتوقف العرض",
    "стоп-кран продаёте?",
    "когда остановится",
    "durak nerede",
    "duruyor mu",
    "đúng",
    "Đúng rồi",
    "dung",
    "dừng ở đâu vậy",
    "หยุดวันไหน",
    "ยกเลิกออเดอร์ได้ไหม",
    "停止線はどこ",
    "중지 방법",
    "그만큼",
    "",
    "   ",
    "🛑",
    "?",
    "...",
    "👍",
]


@pytest.mark.parametrize("text", OPT_OUTS)
def test_a_whole_message_that_says_stop_opts_out_and_is_confirmed_once(
    context: MakeContext, text: str
) -> None:
    decision = judge(context(text)).decision
    assert decision is not None
    assert (decision.consent, decision.label, decision.action) == ("opt_out", "opt_out", "auto_reply")
    assert decision.reply is not None
    assert "START" in decision.reply
    again = judge(context(text, opted_out=True)).decision
    assert again is not None
    assert (again.action, again.reason, again.consent) == ("ignore", "opted_out", None)


@pytest.mark.parametrize("text", NO_OPT_OUTS)
def test_a_message_that_only_contains_such_a_word_does_not_opt_out(context: MakeContext, text: str) -> None:
    decision = judge(context(text)).decision
    assert decision is None or decision.consent is None


def test_the_confirmation_is_in_the_customers_language(context: MakeContext) -> None:
    for text, expected in {
        "退订": "退订",
        "стоп": "Готово",
        "Keine Nachrichten mehr": "Erledigt",
        "jangan mesej lagi": "mesej kami",
        "수신거부": "처리되었습니다",
        "desabonner": "C'est fait",
    }.items():
        decision = judge(context(text)).decision
        assert decision is not None
        assert expected in (decision.reply or ""), text


@pytest.mark.parametrize(
    "text", ["START", "start!", "Unstop", "/start", "mula", "开始", "Alta", "старт", "ابدأ", "시작"]
)
def test_start_lifts_an_opt_out_and_means_nothing_to_others(context: MakeContext, text: str) -> None:
    back = judge(context(text, opted_out=True)).decision
    assert back is not None
    assert (back.consent, back.action, back.reason) == ("opt_in", "auto_reply", "opt_in")
    other = judge(context(text)).decision
    assert other is None


def test_the_last_word_of_a_burst_counts(context: MakeContext) -> None:
    stop = judge(context("what does it cost?", "STOP")).decision
    assert stop is not None
    assert stop.consent == "opt_out"
    changed = judge(context("STOP", "START")).decision
    assert changed is None
    still_out = judge(context("START", "STOP", opted_out=True)).decision
    assert still_out is not None
    assert (still_out.reason, still_out.consent) == ("opted_out", None)


@pytest.mark.parametrize(
    "fields",
    [
        {"handled_by": "human"},
        {"agent": False},
        {"status": "suspended"},
        {"traffic": Traffic(6, 6)},
    ],
)
def test_an_opt_out_is_recorded_in_silence_where_no_reply_is_allowed(
    context: MakeContext, fields: dict[str, object]
) -> None:
    decision = judge(context("STOP", **fields)).decision
    assert decision is not None
    assert (decision.consent, decision.action, decision.reply) == ("opt_out", "ignore", None)


def test_a_tenant_may_add_opt_out_words_and_its_own_confirmation(context: MakeContext) -> None:
    settings = {"opt_out_words": ["no promo"], "texts": {"opt_out": "Bye {name}, START brings you back"}}
    decision = judge(context("No promo!", settings=settings)).decision
    assert decision is not None
    assert decision.reply == "Bye Aisha, START brings you back"
    assert judge(context("No promo!")).decision is None


@pytest.mark.parametrize(
    ("message", "fields", "expected"),
    [
        (incoming("hi", direction="outbound"), {}, ("ignore", "own_message")),
        (incoming("hi", is_history=True), {}, ("ignore", "history")),
        (incoming("hi"), {"kind": "group"}, ("ignore", "group")),
        (incoming("STOP"), {"kind": "group"}, ("ignore", "group")),
        (incoming("👍", message_type=MessageType.REACTION), {}, ("ignore", "reaction")),
        (
            incoming("Blocked the bot", message_type=MessageType.UNSUPPORTED, media={"notice": True}),
            {},
            ("ignore", "notice"),
        ),
        (incoming(None, message_type=MessageType.DELETED), {}, ("ignore", "deleted")),
        (incoming("hi there", message_type=MessageType.EDITED), {}, ("ignore", "edited")),
    ],
)
def test_messages_that_need_nothing_are_settled_one_by_one(
    context: MakeContext, message: object, fields: dict[str, object], expected: tuple[str, str]
) -> None:
    verdict = judge(context(message, **fields))
    assert verdict.burst == ()
    (decision,) = verdict.settled.values()
    assert (decision.action, decision.reason, decision.consent) == (*expected, None)


@pytest.mark.parametrize(
    ("message", "fields", "expected"),
    [
        (incoming("hi"), {"opted_out": True}, ("ignore", "opted_out")),
        (incoming("hi"), {"handled_by": "human"}, ("human_takeover", "handled_by_human")),
        (incoming("hi"), {"agent": False}, ("human_takeover", "no_agent")),
        (incoming("hi"), {"status": "suspended"}, ("ignore", "tenant_suspended")),
        (incoming(None, message_type=MessageType.UNSUPPORTED), {}, ("human_takeover", "unsupported")),
        (
            incoming(None, message_type=MessageType.UNSUPPORTED, placeholder=True),
            {},
            ("human_takeover", "undecryptable"),
        ),
        (incoming("hi"), {"traffic": Traffic(6, 6)}, ("human_takeover", "reply_cap")),
        (incoming("hi"), {"traffic": Traffic(0, 40)}, ("human_takeover", "reply_cap")),
        (incoming("hi", at=NOW - timedelta(hours=13)), {}, ("human_takeover", "stale")),
        (incoming("hi", automatic=True), {}, ("ignore", "automatic_message")),
        (incoming("hi"), {}, None),
        (incoming("hi"), {"traffic": Traffic(5, 39)}, None),
        (incoming("hi", at=NOW - timedelta(hours=11)), {}, None),
    ],
)
def test_every_gate_has_its_reason(
    context: MakeContext, message: object, fields: dict[str, object], expected: tuple[str, str] | None
) -> None:
    decision = judge(context(message, **fields)).decision
    assert (decision and (decision.action, decision.reason)) == expected
    assert decision is None or decision.reply is None


def test_caps_and_age_come_from_the_agents_settings(context: MakeContext) -> None:
    settings = {"caps": {"per_10_minutes": 2, "per_day": 3}, "max_age": "30m"}
    for traffic in (Traffic(2, 2), Traffic(0, 3)):
        decision = judge(context("hi", settings=settings, traffic=traffic)).decision
        assert decision is not None
        assert decision.reason == "reply_cap"
    old = judge(context(incoming("hi", at=NOW - timedelta(minutes=31)), settings=settings)).decision
    assert old is not None
    assert old.reason == "stale"


def test_a_burst_with_one_fresh_message_is_not_stale(context: MakeContext) -> None:
    burst = (incoming("old", at=NOW - timedelta(hours=20)), incoming("new", 2))
    assert judge(context(*burst)).decision is None


def test_a_reaction_beside_a_question_leaves_the_question_to_the_decider(context: MakeContext) -> None:
    verdict = judge(context(incoming("👍", message_type=MessageType.REACTION), "how much?"))
    assert [message.content for message in verdict.burst] == ["how much?"]
    assert set(verdict.settled) == {MessageId(1)}
    assert verdict.decision is None


@pytest.mark.parametrize(
    "text",
    [
        "Automatic reply: I am out of the office until Monday.",
        "Thank you for contacting us! We will get back to you.",
        "I am on annual leave and have limited access to email",
        "Terima kasih kerana menghubungi kami. Kami akan membalas.",
        "自动回复：我正在休假",
        "Respuesta automática: estoy de vacaciones",
        "Réponse automatique : je suis absent du bureau",
        "Abwesenheitsnotiz: Ich bin im Urlaub",
        "Автоматический ответ",
        "自動返信です",
        "رد تلقائي: شكرا لتواصلك معنا",
    ],
)
def test_vacation_notices_and_greeting_bots_are_not_answered(context: MakeContext, text: str) -> None:
    assert written_by_a_machine(incoming(text))
    decision = judge(context(text)).decision
    assert decision is not None
    assert decision.reason == "automatic_message"


@pytest.mark.parametrize(
    "text", ["Is your office open?", "Do you sell automatic doors?", "thank you!", "我想休假"]
)
def test_people_who_mention_such_things_are_answered(context: MakeContext, text: str) -> None:
    assert judge(context(text)).decision is None


def test_the_same_text_after_each_answer_is_a_loop(context: MakeContext) -> None:
    looping = (
        turn("customer", "Hello, how can we help?", 50),
        turn("agent", "Hi!", 45),
        turn("customer", "Hello, how can we help?", 40),
        turn("agent", "Hi!", 35),
    )
    decision = judge(context("Hello, how can we help?", history=looping)).decision
    assert decision is not None
    assert (decision.action, decision.reason) == ("human_takeover", "loop")
    assert judge(context("something else", history=looping)).decision is None
    long_ago = tuple(turn(t.author, t.content or "", 3600 + n) for n, t in enumerate(looping))
    assert judge(context("Hello, how can we help?", history=long_ago)).decision is None
    unanswered = tuple(t for t in looping if t.author == "customer")
    assert judge(context("Hello, how can we help?", history=unanswered)).decision is None


def test_wrong_settings_do_not_disarm_the_gates(context: MakeContext) -> None:
    for settings in ({"caps": {"per_day": "many"}}, {"max_age": 7}, {"texts": []}, {"opt_out_words": 3}):
        assert judge(context("STOP", settings=settings)).decision is not None
        decision = judge(context("hi", settings=settings, traffic=Traffic(6, 6))).decision
        assert decision is not None
        assert decision.reason == "reply_cap"


def test_no_word_both_opts_out_and_in() -> None:
    from core.decide.wordlists import load

    outs = [word for words in load("opt_out").values() for word in words]
    ins = [word for words in load("opt_in").values() for word in words]
    assert [word for word in outs if OPT_IN.whole(word)] == []
    assert [word for word in ins if OPT_OUT.whole(word)] == []


@given(st.text(max_size=400))
def test_no_text_breaks_the_matcher(text: str) -> None:
    from core.decide.language import guess
    from core.decide.match import normalise

    form = normalise(text)
    assert normalise(form.plain).plain == form.plain
    OPT_OUT.whole(text)
    OPT_OUT.within(form)
    guess([text])
    written_by_a_machine(incoming(text))
