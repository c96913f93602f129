"""What the end of a call means for its row, and how many calls a session gets at once."""

from __future__ import annotations

import pytest

from core import dispatch
from core.channel import MessageId, QueueId, SessionId, TenantId
from core.dispatch import Claimed, NotReady, Timings, Windows
from core.errors import NotSentError, RefusedError, ThrottledError, UnknownOutcomeError

TIMINGS = Timings(backoff=(5.0, 30.0))


def claimed(retry_count: int = 0) -> Claimed:
    return Claimed(QueueId(1), 3, TenantId(1), SessionId(1), MessageId(1), "whatsapp", retry_count)


@pytest.mark.parametrize(
    ("error", "retry_count", "status", "outcome", "counts"),
    [
        (NotSentError("no socket"), 0, "queued", "retried", True),
        (NotSentError("no socket"), 1, "queued", "retried", True),
        (NotSentError("no socket"), 2, "failed", "failed", True),
        (ThrottledError("slow down", retry_after=9), 2, "queued", "throttled", False),
        (NotReady("not here"), 2, "queued", "not_called", False),
        (RefusedError("not on WhatsApp"), 0, "failed", "refused", False),
        (UnknownOutcomeError("cut off"), 0, "unknown", "unknown", False),
        (TimeoutError(), 0, "unknown", "unknown", False),
        (ValueError("a bug after the send"), 0, "unknown", "unknown", False),
    ],
)
def test_what_an_error_means(
    error: Exception, retry_count: int, status: str, outcome: str, counts: bool
) -> None:
    verdict = dispatch.failed(claimed(retry_count), error, max_attempts=3, timings=TIMINGS, jitter=0.5)
    assert (verdict.mark.status, verdict.outcome, verdict.mark.counts) == (status, outcome, counts)
    assert (verdict.mark.queue_id, verdict.mark.claim_epoch) == (1, 3)


@pytest.mark.parametrize(("retry_count", "wait"), [(0, 5.0), (1, 30.0), (7, 30.0)])
def test_the_wait_grows_and_is_spread(retry_count: int, wait: float) -> None:
    def waits(jitter: float) -> float:
        error = NotSentError("x")
        return dispatch.failed(
            claimed(retry_count), error, max_attempts=99, timings=TIMINGS, jitter=jitter
        ).mark.retry_in

    assert waits(0.0) == pytest.approx(wait * 0.8)
    assert waits(1.0) == pytest.approx(wait * 1.2)


def test_a_throttled_message_comes_back_when_the_channel_said() -> None:
    error = ThrottledError("slow down", retry_after=90)
    verdict = dispatch.failed(claimed(), error, max_attempts=3, timings=TIMINGS, jitter=0.5)
    assert verdict.mark.retry_in == 90


def test_an_unexpected_error_says_no_more_than_its_kind() -> None:
    verdict = dispatch.failed(
        claimed(), ValueError("+60123456789"), max_attempts=3, timings=TIMINGS, jitter=0
    )
    assert verdict.mark.last_error is not None
    assert "+6012" not in verdict.mark.last_error
    assert "ValueError" in verdict.mark.last_error


def test_a_slow_channel_gets_few_calls_at_once_and_a_quick_one_more() -> None:
    session, windows = SessionId(1), Windows()
    for _ in range(100):
        windows.began(session)
        windows.ended(session, 3.0)
    assert windows.room(session) == Windows.LEAST
    for _ in range(100):
        while windows.room(session):
            windows.began(session)
        windows.ended(session, 0.001)
    assert windows.open[session] + windows.room(session) > 60
