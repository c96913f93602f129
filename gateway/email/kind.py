"""The email channel's line for the registry."""

from __future__ import annotations

from functools import partial

from core.channel import Channel, ChannelKind, SessionContext, Sink
from core.metrics import Metrics
from gateway.email import settings
from gateway.email.channel import EmailChannel
from gateway.email.log_in import FORM, check_credentials
from gateway.email.parser import MailParser
from gateway.email.timings import Timings
from gateway.media.guard import Guard


def email_kind(
    metrics: Metrics, timings: Timings | None = None, *, guard: Guard | None = None
) -> ChannelKind:
    """All sessions share the process that reads mails. `guard`: where servers that tenants name may be, the public internet
    alone when left out. `timings`: tests shorten them."""
    parser = MailParser()

    def make(context: SessionContext, sink: Sink) -> Channel:
        return EmailChannel(context, sink, parser=parser, metrics=metrics, guard=guard, timings=timings)

    return ChannelKind(
        "email",
        make,
        settings=settings.check,
        files=False,
        check_credentials=partial(check_credentials, guard=guard),
        form=FORM,
    )
