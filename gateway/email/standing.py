"""Where a session stands, put together from its parts: each folder that is read, and the way out. No IO."""

from __future__ import annotations

from collections.abc import Callable

from core.channel import SessionState, SessionStatus
from gateway.email.problems import Problem, state_of

SMTP = "smtp"


class Standing:
    """A part says `ok` or `bad`; `publish` is called when the whole changes. Active when every needed part is well."""

    def __init__(
        self, needed: tuple[str, ...], identifier: str, publish: Callable[[SessionState], None]
    ) -> None:
        self._needed = needed
        self._identifier = identifier
        self._publish = publish
        self._parts: dict[str, Problem | None] = {}
        self.state = SessionState(SessionStatus.DISCONNECTED, identifier=identifier)

    def starting(self) -> None:
        self._parts = {}
        self._say(SessionState(SessionStatus.CONNECTING, identifier=self._identifier))

    def stopped(self) -> None:
        self.state = SessionState(SessionStatus.DISCONNECTED, identifier=self._identifier)

    def tell(self, part: str, problem: Problem | None) -> None:
        self._parts[part] = problem
        problems = [p for p in (self._parts.get(name) for name in self._needed) if p is not None]
        if problems:
            # What a person must mend comes first.
            worst = next((p for p in problems if p.lasting), problems[0])
            self._say(state_of(worst, self._identifier))
        elif all(name in self._parts for name in self._needed):
            aside = next((p for p in self._parts.values() if p is not None), None)
            action = aside.action if aside is not None else None
            self._say(SessionState(SessionStatus.ACTIVE, action=action, identifier=self._identifier))
        elif self.state.status is not SessionStatus.CONNECTING:
            self._say(SessionState(SessionStatus.CONNECTING, identifier=self._identifier))

    def _say(self, state: SessionState) -> None:
        if state != self.state:
            self.state = state
            self._publish(state)
