"""The built-in texts in the customers' languages, and filling in `{name}`, `{agent}`, `{business}`.

Data and pure functions. A tenant's own texts (agents.settings) win over these.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

Wording = str | Mapping[str, str]
"""One text for everybody, or a text per language code."""

VARIABLES = ("name", "agent", "business")
NAMES = ("greeting", "opt_out", "opt_in", "handover", "out_of_hours", "follow_up", "thanks")

BUILT_IN: dict[str, dict[str, str]] = {
    "greeting": {
        "en": "Hello {name}, how can we help you?",
        "ms": "Hai {name}, apa yang boleh kami bantu?",
        "id": "Halo {name}, ada yang bisa kami bantu?",
        "zh": "您好 {name}，请问有什么可以帮您？",
        "ta": "வணக்கம் {name}, உங்களுக்கு எப்படி உதவலாம்?",
        "hi": "नमस्ते {name}, हम आपकी क्या मदद कर सकते हैं?",
        "es": "Hola {name}, ¿en qué podemos ayudarle?",
        "pt": "Olá {name}, como podemos ajudar?",
        "fr": "Bonjour {name}, comment pouvons-nous vous aider ?",
        "de": "Hallo {name}, wie können wir helfen?",
        "it": "Ciao {name}, come possiamo aiutarti?",
        "nl": "Hallo {name}, waarmee kunnen we helpen?",
        "ar": "مرحباً {name}، كيف يمكننا مساعدتك؟",
        "ru": "Здравствуйте, {name}! Чем мы можем помочь?",
        "tr": "Merhaba {name}, nasıl yardımcı olabiliriz?",
        "vi": "Xin chào {name}, chúng tôi có thể giúp gì cho bạn?",
        "th": "สวัสดี {name} มีอะไรให้ช่วยไหม",
        "ja": "こんにちは {name}、どのようなご用件でしょうか。",
        "ko": "안녕하세요 {name}, 무엇을 도와드릴까요?",
    },
    "opt_out": {
        "en": "Done: you will get no more messages from us. Write START to come back.",
        "ms": "Selesai: anda tidak akan menerima mesej kami lagi. Tulis START untuk kembali.",
        "id": "Selesai: Anda tidak akan menerima pesan kami lagi. Tulis START untuk kembali.",
        "zh": "已退订：您不会再收到我们的消息。回复 START 可恢复。",
        "ta": "முடிந்தது: இனி எங்கள் செய்திகள் வராது. மீண்டும் பெற START என எழுதவும்.",
        "hi": "हो गया: अब आपको हमारे संदेश नहीं मिलेंगे। वापस आने के लिए START लिखें।",
        "es": "Listo: no recibirá más mensajes nuestros. Escriba START para volver.",
        "pt": "Pronto: você não receberá mais mensagens nossas. Escreva START para voltar.",
        "fr": "C'est fait : vous ne recevrez plus nos messages. Écrivez START pour revenir.",
        "de": "Erledigt: Sie bekommen keine Nachrichten mehr von uns. Mit START kommen Sie zurück.",
        "it": "Fatto: non riceverà più nostri messaggi. Scriva START per tornare.",
        "nl": "Gedaan: u krijgt geen berichten meer van ons. Schrijf START om terug te komen.",
        "ar": "تم: لن تصلك رسائل منا بعد الآن. اكتب START للعودة.",
        "ru": "Готово: мы больше не будем вам писать. Чтобы вернуться, напишите START.",
        "tr": "Tamam: artık bizden mesaj almayacaksınız. Geri dönmek için START yazın.",
        "vi": "Xong: bạn sẽ không nhận tin nhắn của chúng tôi nữa. Nhắn START để nhận lại.",
        "th": "เรียบร้อย: คุณจะไม่ได้รับข้อความจากเราอีก พิมพ์ START เพื่อกลับมา",
        "ja": "配信を停止しました。再開するには START と送ってください。",
        "ko": "처리되었습니다. 더 이상 메시지를 보내지 않습니다. 다시 받으려면 START 라고 보내세요.",
    },
    "opt_in": {
        "en": "Welcome back: you will get our messages again.",
        "ms": "Selamat kembali: anda akan menerima mesej kami semula.",
        "id": "Selamat datang kembali: Anda akan menerima pesan kami lagi.",
        "zh": "欢迎回来：您将重新收到我们的消息。",
        "ta": "மீண்டும் வரவேற்கிறோம்: எங்கள் செய்திகள் மீண்டும் வரும்.",
        "hi": "फिर से स्वागत है: अब आपको हमारे संदेश मिलेंगे।",
        "es": "Bienvenido de nuevo: volverá a recibir nuestros mensajes.",
        "pt": "Bem-vindo de volta: você receberá nossas mensagens novamente.",
        "fr": "Bon retour : vous recevrez à nouveau nos messages.",
        "de": "Willkommen zurück: Sie bekommen unsere Nachrichten wieder.",
        "it": "Bentornato: riceverà di nuovo i nostri messaggi.",
        "nl": "Welkom terug: u krijgt onze berichten weer.",
        "ar": "أهلاً بعودتك: ستصلك رسائلنا من جديد.",
        "ru": "С возвращением: вы снова будете получать наши сообщения.",
        "tr": "Tekrar hoş geldiniz: mesajlarımızı yeniden alacaksınız.",
        "vi": "Chào mừng trở lại: bạn sẽ lại nhận tin nhắn của chúng tôi.",
        "th": "ยินดีต้อนรับกลับ คุณจะได้รับข้อความจากเราอีกครั้ง",
        "ja": "おかえりなさい。配信を再開しました。",
        "ko": "다시 오신 것을 환영합니다. 메시지를 다시 보내드립니다.",
    },
    "handover": {
        "en": "A colleague will answer you here.",
        "ms": "Rakan sekerja kami akan membalas anda di sini.",
        "id": "Rekan kami akan membalas Anda di sini.",
        "zh": "我们的同事会在这里回复您。",
        "ta": "எங்கள் சக ஊழியர் இங்கே பதிலளிப்பார்.",
        "hi": "हमारे एक सहकर्मी आपको यहीं जवाब देंगे।",
        "es": "Un compañero le responderá aquí.",
        "pt": "Um colega vai responder por aqui.",
        "fr": "Un collègue vous répondra ici.",
        "de": "Ein Kollege antwortet Ihnen hier.",
        "it": "Un collega le risponderà qui.",
        "nl": "Een collega antwoordt u hier.",
        "ar": "سيرد عليك أحد زملائنا هنا.",
        "ru": "Вам ответит наш сотрудник.",
        "tr": "Bir arkadaşımız size buradan yanıt verecek.",
        "vi": "Nhân viên của chúng tôi sẽ trả lời bạn tại đây.",
        "th": "เจ้าหน้าที่ของเราจะตอบคุณที่นี่",
        "ja": "担当者がこちらでお返事いたします。",
        "ko": "담당자가 여기에서 답변드리겠습니다.",
    },
    "out_of_hours": {
        "en": "We are closed right now and will answer when we are back.",
        "ms": "Kami tutup sekarang dan akan membalas apabila kami buka semula.",
        "id": "Kami sedang tutup dan akan membalas saat buka kembali.",
        "zh": "我们现在休息，上班后会回复您。",
        "ta": "நாங்கள் இப்போது மூடியுள்ளோம்; திறந்ததும் பதிலளிப்போம்.",
        "hi": "अभी हम बंद हैं; खुलने पर जवाब देंगे।",
        "es": "Ahora estamos cerrados; le responderemos cuando abramos.",
        "pt": "Estamos fechados agora e responderemos quando abrirmos.",
        "fr": "Nous sommes fermés pour le moment et vous répondrons à l'ouverture.",
        "de": "Wir haben gerade geschlossen und antworten, sobald wir wieder da sind.",
        "it": "Ora siamo chiusi e risponderemo alla riapertura.",
        "nl": "We zijn nu gesloten en antwoorden zodra we er weer zijn.",
        "ar": "نحن مغلقون الآن وسنرد عليك عند عودتنا.",
        "ru": "Сейчас мы закрыты и ответим, когда откроемся.",
        "tr": "Şu anda kapalıyız; açıldığımızda yanıt vereceğiz.",
        "vi": "Hiện chúng tôi đã đóng cửa và sẽ trả lời khi mở cửa lại.",
        "th": "ขณะนี้เราปิดทำการ และจะตอบเมื่อเปิดอีกครั้ง",
        "ja": "ただいま営業時間外です。営業再開後にお返事いたします。",
        "ko": "지금은 영업시간이 아닙니다. 문을 열면 답변드리겠습니다.",
    },
    "follow_up": {
        "en": "Noted, we will get back to you then.",
        "ms": "Baik, kami akan hubungi anda nanti.",
        "id": "Baik, kami akan menghubungi Anda nanti.",
        "zh": "好的，到时我们再联系您。",
        "ta": "சரி, அப்போது உங்களைத் தொடர்பு கொள்கிறோம்.",
        "hi": "ठीक है, हम तब आपसे संपर्क करेंगे।",
        "es": "Anotado, le contactaremos entonces.",
        "pt": "Anotado, entraremos em contato então.",
        "fr": "C'est noté, nous reviendrons vers vous.",
        "de": "Notiert, wir melden uns dann.",
        "it": "Annotato, la ricontatteremo allora.",
        "nl": "Genoteerd, we nemen dan contact op.",
        "ar": "حسناً، سنتواصل معك حينها.",
        "ru": "Записали, свяжемся с вами тогда.",
        "tr": "Not aldık, o zaman size döneceğiz.",
        "vi": "Đã ghi nhận, chúng tôi sẽ liên hệ lại với bạn.",
        "th": "รับทราบ เราจะติดต่อกลับ",
        "ja": "承知しました。改めてご連絡いたします。",
        "ko": "알겠습니다. 그때 다시 연락드리겠습니다.",
    },
    # thanks: nothing is said unless the tenant wants it; a bye needs no answer.
}

LANGUAGES = tuple(BUILT_IN["opt_out"])

_VARIABLE = re.compile(r"\{([^{}]*)\}")
_WITH_GAP = re.compile(r"[ \t]*[,،、]?[ \t]*\{(" + "|".join(VARIABLES) + r")\}")


def unknown_variables(text: str) -> list[str]:
    """The `{…}` of a text that nothing will fill in."""
    return [name for name in _VARIABLE.findall(text) if name not in VARIABLES]


def pick(wording: Wording, language: str, fallback: str = "en") -> str | None:
    """The text in this language, else in the fallback, else the first there is."""
    if isinstance(wording, str):
        return wording
    return wording.get(language) or wording.get(fallback) or next(iter(wording.values()), None)


def fill(text: str, values: Mapping[str, str | None]) -> str:
    """Fill in the variables; one without a value goes together with the space before it ("Hello {name}, …")."""
    clean = {name: _one_line(values.get(name) or "") for name in VARIABLES}
    filled = _WITH_GAP.sub(lambda match: match[0] if clean[match[1]] else "", text)
    if filled != text:
        filled = filled.lstrip(" \t,،、，")
    return _VARIABLE.sub(lambda match: clean.get(match[1], match[0]), filled).strip()


def _one_line(value: str) -> str:
    """A customer chooses their own name: no line breaks, no braces, no novel."""
    return " ".join(value.replace("{", "").replace("}", "").split())[:60]
