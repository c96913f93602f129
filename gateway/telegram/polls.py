"""The polls a bot has sent, so that a vote can be told in words: votes name a poll by its own id, options by number.

The newest hundred are kept in a cursor of the session, and so move with it to whichever gateway runs it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

from core.channel import Cursor
from gateway.telegram.convert import SentPoll
from gateway.telegram.values import Json, items, message_key, name_of, number_of, obj, text_of

NAME = "polls"
KEPT = 100


class Polls:
    def __init__(self) -> None:
        self._known: OrderedDict[str, SentPoll] = OrderedDict()

    @property
    def known(self) -> Mapping[str, SentPoll]:
        return self._known

    def load(self, cursor: Cursor | None) -> None:
        for poll_id, stored in obj((cursor.value if cursor else {}).get("polls")).items():
            fields = obj(stored)
            options = tuple(str(option) for option in items(fields.get("options")))
            self._add(poll_id, SentPoll(str(fields.get("key")), str(fields.get("question") or ""), options))

    def sent(self, result: Json) -> Cursor | None:
        """A message that went out: when it is a poll, the cursor that keeps it."""
        poll, chat = obj(result.get("poll")), obj(result.get("chat"))
        poll_id, chat_id = name_of(poll.get("id")), number_of(chat.get("id"))
        message_id = number_of(result.get("message_id"))
        if poll_id is None or not chat_id or not message_id:
            return None
        options = tuple(text_of(obj(option).get("text")) or "" for option in items(poll.get("options")))
        key = message_key(chat_id, message_id)
        self._add(poll_id, SentPoll(key, text_of(poll.get("question")) or "", options))
        return self.cursor

    @property
    def cursor(self) -> Cursor:
        polls = {
            poll_id: {"key": poll.message_key, "question": poll.question, "options": list(poll.options)}
            for poll_id, poll in self._known.items()
        }
        return Cursor(NAME, {"polls": polls})

    def _add(self, poll_id: str, poll: SentPoll) -> None:
        self._known[poll_id] = poll
        self._known.move_to_end(poll_id)
        while len(self._known) > KEPT:
            self._known.popitem(last=False)
