"""Scripted people: what a customer says, waits for and answers, so that a conversation runs by itself.

A script is text, one step a line:

    # a comment
    say Hi, do you deliver to Ipoh?
    expect deliver
    wait 1.5
    typing
    say Great, thanks!
    read
    on price: How much with delivery?

`expect` waits for an answer with this in it, or for any answer; `wait` takes seconds; `read` gives the last
answer its blue ticks; `on` answers, from there to the end of the script, every message with the word in it.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass

from sandbox.whatsapp.phone import Phone, Received

_VERBS = ("say", "expect", "wait", "typing", "read", "on")
_ANSWERS_LIMIT = 20  # per script, so that two machines do not talk for ever


class ScriptError(ValueError):
    """A line that is not a step."""


class ScriptFailed(Exception):
    """An answer that was expected did not come in time."""


@dataclass(frozen=True)
class Step:
    line: int
    verb: str
    text: str


def parse(script: str) -> list[Step]:
    """Raises ScriptError naming the line."""
    steps: list[Step] = []
    for number, raw in enumerate(script.splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        verb, _, text = line.partition(" ")
        step = Step(number, verb.lower(), text.strip())
        if step.verb not in _VERBS:
            raise ScriptError(f"line {number}: {verb!r} is none of {', '.join(_VERBS)}")
        if step.verb in ("say", "on") and not step.text:
            raise ScriptError(f"line {number}: {verb} what?")
        if step.verb == "on" and ":" not in step.text:
            raise ScriptError(f"line {number}: write `on WORD: answer`")
        if step.verb == "wait":
            try:
                float(step.text)
            except ValueError:
                raise ScriptError(f"line {number}: wait how many seconds?") from None
        steps.append(step)
    return steps


class Script:
    """One run of a script: `person` talks to `to`."""

    def __init__(
        self,
        person: Phone,
        to: Phone,
        script: str,
        *,
        patience: float = 30.0,
        told: Callable[[Step], None] = lambda _: None,
    ) -> None:
        self._person = person
        self._to = to
        self._steps = parse(script)
        self._patience = patience
        self._told = told
        self._rules: list[tuple[str, str]] = []
        self._heard = len(person.received)  # what was said before is not an answer
        self._last: Received | None = None

    async def run(self) -> None:
        """Play every step. Raises ScriptFailed when an expected answer does not come within `patience` seconds."""
        answering = asyncio.create_task(self._answer())
        try:
            for step in self._steps:
                await self._play(step)
                self._told(step)
        finally:
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answering

    async def _play(self, step: Step) -> None:
        if step.verb == "say":
            await self._person.send_text(self._to, step.text)
        elif step.verb == "expect":
            await self._expect(step)
        elif step.verb == "wait":
            await asyncio.sleep(float(step.text))
        elif step.verb == "typing":
            await self._person.typing(self._to)
        elif step.verb == "read" and self._last is not None:
            await self._person.read(self._last.id)
        elif step.verb == "on":
            word, _, answer = step.text.partition(":")
            self._rules.append((word.strip().lower(), answer.strip()))

    async def _expect(self, step: Step) -> None:
        def wanted(message: Received) -> bool:
            return self._is_answer(message) and step.text.lower() in message.text.lower()

        try:
            found = await self._person.received.wait_for(wanted, start=self._heard, timeout=self._patience)
        except TimeoutError:
            raise ScriptFailed(
                f"line {step.line}: {self._person.name} waited {self._patience:g} s for an answer"
                + (f" with {step.text!r}" if step.text else "")
            ) from None
        self._last = found
        self._heard = self._person.received.items.index(found, self._heard) + 1

    def _is_answer(self, message: Received) -> bool:
        return message.sender == self._to.number and not message.duplicate and not message.from_me

    async def _answer(self) -> None:
        at = len(self._person.received)
        for _ in range(_ANSWERS_LIMIT):
            answer = ""
            while not answer:
                await self._person.received.wait_for(lambda _: True, start=at, timeout=86_400)
                message = self._person.received[at]
                at += 1
                if self._is_answer(message):
                    answer = next((reply for word, reply in self._rules if word in message.text.lower()), "")
            await self._person.send_text(self._to, answer)
