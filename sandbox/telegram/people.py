"""The people of the sandbox: they write to bots and to groups, react, edit, vote, block, and keep what they are sent."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sandbox.telegram.world import Bot, Chat, File, Json, Received, World
from sandbox.whatsapp.ledger import Ledger

To = Bot | Chat


class Person:
    """`await mei.say(bot, "hi")`; ids that come back are the ones under which the message must be stored."""

    def __init__(self, world: World, name: str, *, username: str | None = None, language: str = "en") -> None:
        self._world = world
        self.id = world.new_person_id()
        first, _, last = name.partition(" ")
        self.user: Json = {"id": self.id, "is_bot": False, "first_name": first, "language_code": language}
        self.user |= ({"last_name": last} if last else {}) | ({"username": username} if username else {})
        self.started: set[int] = set()
        """Ids of the bots that may write here."""
        self.blocked: set[int] = set()
        self.received: Ledger[Received] = Ledger()
        self.typing_seen: Ledger[tuple[Bot, Any]] = Ledger()
        world.people[self.id] = self

    @property
    def address(self) -> str:
        return f"telegram:{self.id}"

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.user["first_name"], self.user.get("last_name"))))

    # ---- what the bot wrote ----

    async def next_message(self, timeout: float = 10) -> Received:
        """The next arrival that no earlier call returned, edits and reactions included. Raises TimeoutError."""
        return await self.received.next(timeout)

    async def wait_for(self, match: Callable[[Received], bool], timeout: float = 10) -> Received:
        return await self.received.wait_for(match, timeout=timeout)

    async def wait_for_text(self, part: str, timeout: float = 10) -> Received:
        return await self.wait_for(lambda seen: part in (seen.text or ""), timeout)

    @property
    def texts(self) -> list[str | None]:
        return [seen.text for seen in self.received]

    # ---- writing ----

    async def say(self, to: To, text: str, *, reply_to: str | None = None, topic: int | None = None) -> str:
        return self.send_raw(to, {"text": text}, reply_to=reply_to, topic=topic)

    async def start(self, bot: Bot, payload: str = "") -> str:
        text = f"/start {payload}".strip()
        entity = {"type": "bot_command", "offset": 0, "length": 6}
        return self.send_raw(bot, {"text": text, "entities": [entity]})

    async def send_photo(self, to: To, data: bytes, caption: str | None = None, **more: Any) -> str:
        file = self._world.add_file(data, "photos", ".jpg")
        small = self._world.add_file(data[:64], "thumbnails", ".jpg")
        sizes = [{**_about(small), "width": 90, "height": 45}, {**_about(file), "width": 320, "height": 160}]
        return self.send_raw(to, {"photo": sizes, **_caption(caption)}, **more)

    async def send_album(self, to: To, pictures: Sequence[bytes], caption: str | None = None) -> list[str]:
        """Several pictures at once: they come as messages of their own with one album id."""
        album = str(13_000_000_000_000_000 + int(time.time() * 1000) % 10**12)
        return [
            await self.send_photo(to, data, caption if n == 0 else None, extra={"media_group_id": album})
            for n, data in enumerate(pictures)
        ]

    async def send_file(self, to: To, kind: str, data: bytes, *, filename: str | None = None,
                        mime_type: str | None = None, caption: str | None = None, **about: Any) -> str:  # fmt: skip
        """`kind`: video, animation, audio, voice, video_note, document, sticker."""
        extension = "." + filename.rpartition(".")[2] if filename and "." in filename else ".bin"
        file = self._world.add_file(data, kind + "s", extension)
        part: Json = {**_about(file), **about}
        part |= ({"file_name": filename} if filename else {}) | (
            {"mime_type": mime_type} if mime_type else {}
        )
        body: Json = {kind: part, **_caption(caption)}
        if kind == "animation":
            body["document"] = part
        return self.send_raw(to, body)

    async def send_voice(self, to: To, data: bytes, seconds: int = 3) -> str:
        return await self.send_file(to, "voice", data, mime_type="audio/ogg", duration=seconds)

    async def send_location(
        self, to: To, latitude: float, longitude: float, *, live: int | None = None
    ) -> str:
        point: Json = {"latitude": latitude, "longitude": longitude}
        return self.send_raw(to, {"location": point | ({"live_period": live} if live else {})})

    async def send_venue(self, to: To, latitude: float, longitude: float, title: str, address: str) -> str:
        point = {"latitude": latitude, "longitude": longitude}
        return self.send_raw(
            to, {"venue": {"location": point, "title": title, "address": address}, "location": point}
        )

    async def send_contact(self, to: To, phone: str, name: str, *, user_id: int | None = None) -> str:
        first, _, last = name.partition(" ")
        card: Json = {"phone_number": phone, "first_name": first} | ({"last_name": last} if last else {})
        return self.send_raw(to, {"contact": card | ({"user_id": user_id} if user_id else {})})

    async def send_poll(self, to: To, question: str, options: Sequence[str]) -> str:
        poll = {
            "id": self._world.new_poll_id(),
            "question": question,
            "options": [{"text": option, "voter_count": 0} for option in options],
            "is_anonymous": True,
            "allows_multiple_answers": False,
        }
        return self.send_raw(to, {"poll": poll})

    def send_raw(self, to: To, body: Json, *, reply_to: str | None = None, topic: int | None = None,
                 extra: Json | None = None, message_id: int | None = None) -> str:  # fmt: skip
        """Any message, as the Bot API would describe it. Returns `chat:message`."""
        if isinstance(to, Bot):
            self._open(to)
            return self._write(to, self.id, body, reply_to, topic, extra, message_id)
        key = ""
        for bot in to.bots:
            key = self._write(bot, to.id, body, reply_to, topic, extra, message_id)
            message_id = int(key.partition(":")[2])
        return key

    def _open(self, bot: Bot) -> None:
        if bot.id in self.blocked:
            raise ValueError(f"{self.name} has blocked {bot.address}: unblock it first")
        self.started.add(bot.id)

    def _write(self, bot: Bot, chat_id: int, body: Json, reply_to: str | None, topic: int | None,
               extra: Json | None, message_id: int | None) -> str:  # fmt: skip
        world = self._world
        message: Json = {
            "message_id": message_id or world.message_number(bot, chat_id),
            "from": self.user,
            "chat": world.chat_json(chat_id),
            "date": int(time.time()),
            **body,
            **(extra or {}),
        }
        if topic is not None:
            message |= {"message_thread_id": topic, "is_topic_message": True}
        if reply_to is not None:
            answered = world.find(bot, *_split(reply_to))
            if answered is None:
                raise ValueError(f"there is no message {reply_to}")
            message["reply_to_message"] = {k: v for k, v in answered.items() if k != "reply_to_message"}
        world.keep(bot, message)
        bot.tell("message", message)
        return f"{chat_id}:{message['message_id']}"

    # ---- about messages ----

    async def edit(self, to: To, key: str, text: str) -> None:
        for bot, message in self._own(to, key):
            name = "text" if "text" in message else "caption"
            message |= {name: text, "edit_date": int(time.time())}
            bot.tell("edited_message", dict(message))

    async def move_live_location(self, to: To, key: str, latitude: float, longitude: float) -> None:
        for bot, message in self._own(to, key):
            message["location"] = message["location"] | {"latitude": latitude, "longitude": longitude}
            message["edit_date"] = int(time.time())
            bot.tell("edited_message", dict(message))

    async def react(self, to: To, key: str, emoji: str | None) -> None:
        """None takes it back."""
        for bot in [to] if isinstance(to, Bot) else to.bots:
            chat_id, number = _split(key)
            if self._world.find(bot, chat_id, number) is None:
                raise ValueError(f"there is no message {key}")
            shown = self._world.reactions.setdefault((bot.id, chat_id, number), {})
            before = shown.get(self.id, [])
            now = [{"type": "emoji", "emoji": emoji}] if emoji else []
            shown[self.id] = now
            bot.tell(
                "message_reaction",
                {
                    "chat": self._world.chat_json(chat_id),
                    "message_id": number,
                    "user": self.user,
                    "date": int(time.time()),
                    "old_reaction": before,
                    "new_reaction": now,
                },
            )

    async def vote(self, poll_id: str, options: Sequence[int]) -> None:
        """In a poll that a bot has sent; no options take the vote back."""
        bot, poll, _chat = self._world.polls[poll_id]
        bot.tell("poll", poll)
        bot.tell("poll_answer", {"poll_id": poll_id, "user": self.user, "option_ids": list(options)})

    async def press(self, bot: Bot, key: str, data: str) -> None:
        """A button under a message."""
        message = self._world.find(bot, *_split(key))
        bot.tell(
            "callback_query", {"id": str(time.time_ns()), "from": self.user, "message": message, "data": data}
        )

    async def redeliver(self, bot: Bot, key: str) -> None:
        """Have the server hand the message over again, as after a confirmation that got lost."""
        chat_id, number = _split(key)
        for update_id, update in reversed(bot.history.items()):
            message = update.get("message") or {}
            if message.get("message_id") == number and message.get("chat", {}).get("id") == chat_id:
                bot.tell_again(update_id)
                return
        raise ValueError(f"no update carries {key}")

    def _own(self, to: To, key: str) -> list[tuple[Bot, Json]]:
        found = [
            (bot, message)
            for bot in ([to] if isinstance(to, Bot) else to.bots)
            if (message := self._world.find(bot, *_split(key))) and message["from"]["id"] == self.id
        ]
        if not found:
            raise ValueError(f"{key} is no message of {self.name}")
        return found

    # ---- what people do to bots ----

    async def block(self, bot: Bot) -> None:
        self.blocked.add(bot.id)
        self._membership(bot, "member", "kicked")

    async def unblock(self, bot: Bot) -> None:
        self.blocked.discard(bot.id)
        self._membership(bot, "kicked", "member")

    def _membership(self, bot: Bot, before: str, now: str) -> None:
        bot.tell("my_chat_member", membership(self._world, bot, self.id, self.user, before, now))


def membership(world: World, bot: Bot, chat_id: int, actor: Json, before: str, now: str) -> Json:
    return {
        "chat": world.chat_json(chat_id),
        "from": actor,
        "date": int(time.time()),
        "old_chat_member": {"user": bot.user, "status": before},
        "new_chat_member": {"user": bot.user, "status": now},
    }


def _about(file: File) -> Json:
    return {"file_id": file.file_id, "file_unique_id": file.file_id[-12:], "file_size": len(file.data)}


def _caption(caption: str | None) -> Json:
    return {"caption": caption} if caption else {}


def _split(key: str) -> tuple[int, int]:
    chat, _, number = key.partition(":")
    return int(chat), int(number.partition(":")[0])
