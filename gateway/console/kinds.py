"""How the console speaks of each channel: what its sessions are called, their icon, and what would prove a send.

Only words: a channel that is not named here is spoken of in general ones, and works all the same.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ChannelWords:
    label: str
    thing: str
    """What one session is: “number”, “mailbox”, “bot”."""
    a_thing: str
    icon: str
    about: str
    """What it takes to add one."""
    proof: str
    """How it may come out whether a message arrived whose sending was cut off."""


WORDS = {
    "whatsapp": ChannelWords(
        "WhatsApp",
        "number",
        "a WhatsApp number",
        "i-whatsapp",
        "Linked with its phone, the way WhatsApp Web is linked.",
        "A receipt from WhatsApp settles it by itself, also when it comes days later. Until then the chat on the shop’s own"
        " phone shows whether the message is there.",
    ),
    "email": ChannelWords(
        "E-mail",
        "mailbox",
        "a mailbox",
        "i-email",
        "With the mail server’s address, user name and password.",
        "The mailbox’s Sent folder was looked through and does not show it. A delivery report or an answer that comes later"
        " tells; until then only the recipient knows.",
    ),
    "telegram": ChannelWords(
        "Telegram",
        "bot",
        "a Telegram bot",
        "i-telegram",
        "With the token that @BotFather gives.",
        "Telegram does not tell a bot what became of a message whose sending was cut off: only the person it was for can say"
        " whether it is in their chat.",
    ),
}


def of(channel: str) -> ChannelWords:
    label = channel.replace("_", " ").capitalize()
    return WORDS.get(channel) or ChannelWords(
        label,
        "account",
        f"{'an' if label[:1] in 'AEIOU' else 'a'} {label} account",
        "i-channel",
        "With its credentials.",
        "The channel cannot tell: look at the other side whether the message is there.",
    )
