"""The methods of the Bot API that the sandbox knows: parameters in, a result out, or ApiError in Telegram's own words."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from sandbox.telegram.world import Accepted, ApiError, Bot, File, Json, Received, Webhook, World

MAX_TEXT, MAX_CAPTION = 4096, 1024
MAX_DOWNLOAD, MAX_UPLOAD, MAX_PHOTO = 20 << 20, 50 << 20, 10 << 20
_EXTENSIONS = {"photo": ".jpg", "video": ".mp4", "animation": ".mp4", "voice": ".oga", "audio": ".mp3",
               "sticker": ".webp", "video_note": ".mp4", "document": ""}  # fmt: skip
_REACTIONS = "👍 👎 ❤ 🔥 🥰 👏 😁 🤔 🤯 😱 🤬 😢 🎉 🤩 🤮 💩 🙏 👌 🕊 🤡 🥱 🥴 😍 🐳 ❤‍🔥 🌚 🌭 💯 🤣 ⚡ 🍌 🏆 💔".split()  # noqa: SIM905


class Methods:
    def __init__(self, world: World) -> None:
        self._world = world
        self._known: dict[str, Callable[[Bot, Json], Any]] = {
            "getme": lambda bot, _params: {
                **bot.user,
                "can_join_groups": True,
                "can_read_all_group_messages": True,
            },
            "setwebhook": self._set_webhook,
            "deletewebhook": self._delete_webhook,
            "getwebhookinfo": self._webhook_info,
            "getfile": self._get_file,
            "getchat": self._get_chat,
            "sendmessage": self._send_message,
            "sendlocation": self._send_location,
            "sendvenue": self._send_venue,
            "sendcontact": self._send_contact,
            "sendpoll": self._send_poll,
            "sendchataction": self._chat_action,
            "setmessagereaction": self._react,
            "editmessagetext": self._edit_text,
            "editmessagecaption": self._edit_caption,
            "deletemessage": self._delete,
        }
        for name in _EXTENSIONS:
            self._known["send" + name.replace("_", "")] = self._sender_of(name)

    def call(self, bot: Bot, method: str, params: Json) -> Any:
        """Raises ApiError."""
        known = self._known.get(method.lower())
        if known is None:
            raise ApiError(404, "Not Found: method not found")
        return known(bot, params)

    # ---- how updates are delivered ----

    def _set_webhook(self, bot: Bot, params: Json) -> bool:
        url = str(params.get("url") or "")
        if not url:
            return self._delete_webhook(bot, params)
        bot.webhook = Webhook(url, str(params.get("secret_token") or ""))
        if params.get("allowed_updates") is not None:
            bot.allowed = tuple(params["allowed_updates"]) or None
        bot.news.set()
        return True

    def _delete_webhook(self, bot: Bot, params: Json) -> bool:
        bot.webhook = None
        if params.get("drop_pending_updates") is True:
            bot.updates.clear()
        return True

    def _webhook_info(self, bot: Bot, _params: Json) -> Json:
        hook = bot.webhook
        info: Json = {"url": hook.url if hook else "", "pending_update_count": len(bot.updates)}
        if hook and hook.last_error:
            info |= {"last_error_message": hook.last_error, "last_error_date": hook.last_error_at}
        return info

    def _get_chat(self, bot: Bot, params: Json) -> Json:
        chat_id = _chat_id(params)
        person = self._world.people.get(chat_id)
        if chat_id not in self._world.groups and (person is None or bot.id not in person.started):
            raise ApiError(400, "Bad Request: chat not found")
        return self._world.chat_json(chat_id)

    # ---- files ----

    def _get_file(self, _bot: Bot, params: Json) -> Json:
        file = self._world.files.get(str(params.get("file_id")))
        if file is None:
            raise ApiError(400, "Bad Request: invalid file_id")
        if len(file.data) > MAX_DOWNLOAD:
            raise ApiError(400, "Bad Request: file is too big")
        return {"file_id": file.file_id, "file_size": len(file.data), "file_path": file.path}

    # ---- sending ----

    def _send_message(self, bot: Bot, params: Json) -> Json:
        text = str(params.get("text") or "").strip()
        if not text:
            raise ApiError(400, "Bad Request: message text is empty")
        if len(text) > MAX_TEXT:
            raise ApiError(400, "Bad Request: message is too long")
        entities = {"entities": params["entities"]} if params.get("entities") else {}
        return self._deliver(bot, "sendMessage", params, {"text": text, **entities})

    def _sender_of(self, name: str) -> Callable[[Bot, Json], Json]:
        method = "send" + "".join(part.title() for part in name.split("_"))

        def send(bot: Bot, params: Json) -> Json:
            upload = params.get(name)
            if not isinstance(upload, tuple):
                raise ApiError(400, f"Bad Request: there is no {name} in the request")
            filename, data = upload
            if len(data) > (MAX_PHOTO if name == "photo" else MAX_UPLOAD):
                raise ApiError(413, "Request Entity Too Large")
            caption = str(params.get("caption") or "").strip()
            if len(caption) > MAX_CAPTION:
                raise ApiError(400, "Bad Request: message caption is too long")
            file = self._world.add_file(data, name + "s", _EXTENSIONS[name])
            about: Json = {
                "file_id": file.file_id,
                "file_unique_id": file.file_id[-12:],
                "file_size": len(data),
            }
            if name in ("document", "audio", "video", "animation"):
                about["file_name"] = filename
            about |= {key: params[key] for key in ("duration", "width", "height") if key in params}
            body: Json = {name: [{**about, "width": 320, "height": 160}] if name == "photo" else about}
            if caption:
                body["caption"] = caption
                if params.get("caption_entities"):
                    body["caption_entities"] = params["caption_entities"]
            return self._deliver(bot, method, params, body, file)

        return send

    def _send_location(self, bot: Bot, params: Json) -> Json:
        return self._deliver(bot, "sendLocation", params, {"location": _point(params)})

    def _send_venue(self, bot: Bot, params: Json) -> Json:
        place = _point(params)
        venue = {"location": place, "title": params["title"], "address": params["address"]}
        return self._deliver(bot, "sendVenue", params, {"venue": venue, "location": place})

    def _send_contact(self, bot: Bot, params: Json) -> Json:
        names = ("phone_number", "first_name", "last_name", "vcard")
        return self._deliver(
            bot, "sendContact", params, {"contact": {n: str(params[n]) for n in names if n in params}}
        )

    def _send_poll(self, bot: Bot, params: Json) -> Json:
        poll = {
            "id": self._world.new_poll_id(),
            "question": params["question"],
            "options": [{"text": option["text"], "voter_count": 0} for option in params["options"]],
            "total_voter_count": 0,
            "is_closed": False,
            "is_anonymous": params.get("is_anonymous") is not False,
            "type": "regular",
            "allows_multiple_answers": params.get("allows_multiple_answers") is True,
        }
        message = self._deliver(bot, "sendPoll", params, {"poll": poll})
        self._world.polls[poll["id"]] = (bot, poll, int(params["chat_id"]))
        return message

    def _chat_action(self, bot: Bot, params: Json) -> bool:
        chat_id = _chat_id(params)
        self._world.chat_for(bot, chat_id)
        for person in self._people(chat_id):
            person.typing_seen.add((bot, params.get("action")))
        return True

    def _deliver(self, bot: Bot, method: str, params: Json, body: Json, file: File | None = None) -> Json:
        world, chat_id = self._world, _chat_id(params)
        world.chat_for(bot, chat_id)
        message: Json = {
            "message_id": 0,
            "from": bot.user,
            "chat": world.chat_json(chat_id),
            "date": int(time.time()),
            **body,
        }
        if "message_thread_id" in params:
            message |= {"message_thread_id": params["message_thread_id"], "is_topic_message": True}
        reply = params.get("reply_parameters")
        answered: Json | None = None
        if isinstance(reply, dict):
            answered = world.find(bot, int(reply.get("chat_id", chat_id)), int(reply["message_id"]))
            if answered is None and reply.get("allow_sending_without_reply") is not True:
                raise ApiError(400, "Bad Request: message to be replied not found")
            if answered is not None:
                message["reply_to_message"] = {k: v for k, v in answered.items() if k != "reply_to_message"}
        message["message_id"] = world.message_number(bot, chat_id)
        world.keep(bot, message)
        words = body.get("text") or body.get("caption")
        world.accepted.add(Accepted(method, bot, chat_id, message["message_id"], words, _shown(params)))
        seen = Received(
            key=f"{chat_id}:{message['message_id']}",
            kind=next((name for name in _KINDS if name in body), "text"),
            text=words,
            message=message,
            bot=bot,
            chat_id=chat_id,
            message_id=message["message_id"],
            file=file,
            reply_to=f"{answered['chat']['id']}:{answered['message_id']}" if answered else None,
        )
        for person in self._people(chat_id):
            person.received.add(seen)
        return message

    # ---- about messages ----

    def _target(self, bot: Bot, params: Json, what: str) -> Json:
        self._world.chat_for(bot, _chat_id(params))
        found = self._world.find(bot, _chat_id(params), int(params.get("message_id") or 0))
        if found is None:
            raise ApiError(400, f"Bad Request: message to {what} not found")
        return found

    def _react(self, bot: Bot, params: Json) -> bool:
        message = self._target(bot, params, "react")
        emoji = [one["emoji"] for one in params.get("reaction") or []]
        if any(one not in _REACTIONS for one in emoji):
            raise ApiError(400, "Bad Request: REACTION_INVALID")
        self._note(bot, "setMessageReaction", params, "reaction", (emoji or [None])[0], message)
        return True

    def _edit_text(self, bot: Bot, params: Json) -> Json:
        return self._edit(bot, params, "text", "Bad Request: there is no text in the message to edit")

    def _edit_caption(self, bot: Bot, params: Json) -> Json:
        return self._edit(bot, params, "caption", "Bad Request: there is no caption in the message to edit")

    def _edit(self, bot: Bot, params: Json, name: str, missing: str) -> Json:
        message = self._target(bot, params, "edit")
        if message["from"]["id"] != bot.id:
            raise ApiError(400, "Bad Request: message can't be edited")
        if name == "text" and "text" not in message:
            raise ApiError(400, missing)
        if message.get(name) == params.get(name):
            raise ApiError(
                400,
                "Bad Request: message is not modified: specified new message content and reply markup are exactly the "
                "same as a current content and reply markup of the message",
            )
        message[name], message["edit_date"] = params.get(name), int(time.time())
        self._note(bot, f"editMessage{name.title()}", params, "edited", params.get(name), message)
        return message

    def _delete(self, bot: Bot, params: Json) -> bool:
        message = self._target(bot, params, "delete")
        del self._world.messages[bot.id, message["chat"]["id"], message["message_id"]]
        self._note(bot, "deleteMessage", params, "deleted", None, message)
        return True

    def _note(self, bot: Bot, method: str, params: Json, kind: str, text: str | None, message: Json) -> None:
        """Something that happened to a message, as the other side sees it."""
        chat_id, number = message["chat"]["id"], message["message_id"]
        self._world.accepted.add(Accepted(method, bot, chat_id, number, text, _shown(params)))
        seen = Received(f"{chat_id}:{number}", kind, text, message, bot, chat_id, number)
        for person in self._people(chat_id):
            person.received.add(replace(seen))

    def _people(self, chat_id: int) -> list[Any]:
        if chat_id in self._world.groups:
            return list(self._world.groups[chat_id].members)
        return [self._world.people[chat_id]]


_KINDS = (*_EXTENSIONS, "venue", "location", "contact", "poll")


def _chat_id(params: Json) -> int:
    try:
        return int(params["chat_id"])
    except (KeyError, ValueError):
        raise ApiError(400, "Bad Request: chat_id is empty") from None


def _point(params: Json) -> Json:
    return {name: float(params[name]) for name in ("latitude", "longitude")}


def _shown(params: Json) -> Json:
    return {name: value[0] if isinstance(value, tuple) else value for name, value in params.items()}
