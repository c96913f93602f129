"""Every wait of the WhatsApp channel in one place, so that tests can be quick and nothing waits without a limit."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds."""

    start: float = 60.0
    """From spawning a child to its first answer: thirty that start at once are slow, and ending them is no help."""
    command: float = 30.0
    """Any command but a send."""
    send: float = 90.0
    """whatsmeow may wait without an end after a reconnect."""
    resolve: float = 15.0
    """A question about a send that was cut off waits this long for the session's folder."""
    upload: float = 60.0
    """A file on its way to WhatsApp's media server. Nothing has been sent meanwhile."""
    download: float = 590.0
    """A file on its way from WhatsApp; the media worker gives up a little later."""
    typing: float = 3.0
    """How long "typing…" is shown before a text, at most."""
    name: tuple[float, ...] = (5.0, 30.0, 120.0)
    """Waits before the display name is tried again."""
    phone: float = 600.0
    """Between two looks at how long the phone has given no sign."""
    link: float = 3.0
    """A send that finds the link down waits this long for it to come back."""
    stop: float = 4.0
    """A polite stop before the kill."""
    ping: float = 5.0
    """Between two pings of the child."""
    pong: float = 5.0
    """For the answer."""
    silence: float = 60.0
    """WhatsApp said nothing for so long (its keep-alive answers come every 30 s): ask it something."""
    probe: float = 10.0
    """For that answer."""
    reconnect: float = 60.0
    """whatsmeow reconnects by itself, ever more slowly; after this long a new child does better."""
    first_login: float = 180.0
    """The same after a pairing: whatsmeow makes 812 keys first and waits for the disk after each of them."""
    grace: float = 5.0
    """A link that is back within this time was never reported as gone."""
    backoff_first: float = 0.2
    backoff_cap: float = 60.0
    steady: float = 60.0
    """A child that lived this long resets the backoff."""
    pairing: float = 180.0
    """Six codes: 60 s, then 20 s each, and a little."""
    first_qr: float = 60.0
    next_qr: float = 20.0
    code: float = 160.0
    """How long a phone code is good for, at most."""
    logout: float = 15.0
    poll: float = 1.0
    """How often the journal is looked at without a hint."""
    store_retry: float = 0.5
    """First wait when the database is away; doubles up to `store_retry_cap`."""
    store_retry_cap: float = 5.0
    look_back: float = 60.0
    """Until an entry that the database refused is tried again."""
    prune: float = 3600.0
    settled: float = 30.0
    """The look back at what was stored before begins once the session is connected, or after this long."""
    breath: float = 0.05
    """Between two steps of it, at least."""
    gate_alarm: float = 10.0
    gate_orphan: float = 30.0
    gate_quiet: float = 10.0
