"""Every Prometheus metric of the product, in one place. The five `wa_` ones are a frozen contract with tenants' dashboards.

A registry per process object (not the library's global one), so that tests can run several gateways in one process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

LATENCY_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2, 5)


_no_created_series: Callable[[], None] = disable_created_metrics  # untyped in the library
_no_created_series()  # a `_created` gauge beside each counter helps nobody who scrapes


class Metrics:
    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()

        # --- the contract's five
        self.received = Counter(
            "wa_messages_received", "Messages received from a channel.", ["tenant_id"], registry=r
        )
        self.written = Counter(
            "wa_messages_written", "Messages written to the database.", ["tenant_id"], registry=r
        )
        self.write_errors = Counter(
            "wa_write_errors",
            "Writes of inbound messages that failed.",
            ["tenant_id", "error_type"],
            registry=r,
        )
        self.write_latency = Histogram(
            "wa_write_latency_seconds",
            "From arrival of a message to its commit.",
            ["tenant_id"],
            buckets=LATENCY_BUCKETS,
            registry=r,
        )
        self.sessions_active = Gauge(
            "wa_sessions_active", "WhatsApp sessions that are active.", ["tenant_id"], registry=r
        )

        # --- ours
        self.messages = Counter(
            "gateway_messages",
            "Messages stored, by channel and direction.",
            ["channel", "direction"],
            registry=r,
        )
        self.duplicates = Counter(
            "gateway_duplicates_suppressed",
            "Redelivered messages that were already stored.",
            ["channel"],
            registry=r,
        )
        self.sends = Counter(
            "gateway_sends", "Finished send attempts, by outcome.", ["channel", "outcome"], registry=r
        )
        self.retries = Counter(
            "gateway_send_retries", "Sends put back after a definite failure.", ["channel"], registry=r
        )
        self.sends_held = Counter(
            "gateway_sends_held",
            "Rows put off by pacing, by reason; `rate`: how often a session had to wait for its rate.",
            ["channel", "reason"],
            registry=r,
        )
        self.queue_depth = Gauge("gateway_queue_depth", "Queue rows by status.", ["status"], registry=r)
        self.queue_oldest = Gauge(
            "gateway_queue_oldest_due_seconds", "Age of the oldest due row that still waits.", registry=r
        )
        self.sends_unknown = Gauge(
            "gateway_sends_unknown", "Queue rows whose outcome is unknown.", registry=r
        )
        self.send_latency = Histogram(
            "gateway_send_latency_seconds",
            "From a row being due to the channel's acceptance.",
            ["channel"],
            buckets=(0.01, 0.05, 0.1, 0.25, 0.5, 1, 2, 5, 30),
            registry=r,
        )
        self.journal_depth = Gauge(
            "gateway_journal_depth", "Durable entries not yet committed.", ["journal"], registry=r
        )
        self.decisions = Counter(
            "gateway_decisions", "Decisions by decider and action.", ["decider", "action"], registry=r
        )
        self.decision_latency = Histogram(
            "gateway_decision_latency_seconds",
            "From claim to stored decision.",
            buckets=(0.005, 0.01, 0.05, 0.1, 0.5, 1, 5, 30),
            registry=r,
        )
        self.llm_tokens = Counter(
            "gateway_llm_tokens", "Tokens used.", ["provider", "model", "kind"], registry=r
        )
        self.llm_cost = Counter("gateway_llm_cost_usd", "Estimated cost.", ["provider", "model"], registry=r)
        self.session_last_event = Gauge(
            "gateway_session_last_event_timestamp_seconds",
            "When the session's channel last said anything.",
            ["tenant_id", "session_id"],
            registry=r,
        )
        self.phone_seen = Gauge(
            "gateway_phone_seen_timestamp_seconds",
            "When the phone of a linked WhatsApp session last gave a sign of its own.",
            ["tenant_id", "session_id"],
            registry=r,
        )
        self.session_up = Gauge(
            "gateway_session_up",
            "1 when a wanted session is active, else 0.",
            ["tenant_id", "session_id", "channel"],
            registry=r,
        )
        self.reconnects = Counter("gateway_session_reconnects", "Reconnects.", ["channel"], registry=r)
        self.child_exits = Counter(
            "gateway_channel_child_exits", "Child processes that ended unasked.", ["channel"], registry=r
        )
        self.undecryptable = Counter(
            "gateway_undecryptable_messages",
            "Messages the client could not decrypt at first.",
            ["channel"],
            registry=r,
        )
        self.possible_loss = Counter(
            "gateway_possible_loss", "Messages reported as possibly lost.", ["channel"], registry=r
        )
        self.gate_alarms = Counter(
            "gateway_gate_alarms",
            "Stored messages whose acknowledgement did not pass the gate: the client library may have changed.",
            ["channel"],
            registry=r,
        )
        self.media = Counter(
            "gateway_media_downloads",
            "Downloads of messages' media, by outcome.",
            ["channel", "outcome"],
            registry=r,
        )
        self.media_waiting = Gauge(
            "gateway_media_waiting", "Messages of own sessions whose media is not downloaded yet.", registry=r
        )
        self.media_fetches = Counter(
            "gateway_media_fetches", "Files fetched for sending, by outcome.", ["outcome"], registry=r
        )
        self.loop_lag = Gauge(
            "gateway_event_loop_lag_seconds", "Worst event-loop lag in the last interval.", registry=r
        )
        self.http_requests = Counter(
            "gateway_http_requests",
            "HTTP requests by route and status.",
            ["method", "route", "status"],
            registry=r,
        )
        self.http_latency = Histogram(
            "gateway_http_request_seconds", "HTTP request duration.", ["method", "route"], registry=r
        )

        # --- what the pilot is judged by: of the last 24 hours, all gateways of the database together (core.pilot)
        self.pilot_success = Gauge(
            "gateway_pilot_send_success_ratio",
            "Share of the last day's finished sends that the channel accepted.",
            ["channel"],
            registry=r,
        )
        self.pilot_retries = Gauge(
            "gateway_pilot_retries_per_send",
            "Definite failures per finished send of the last day.",
            ["channel"],
            registry=r,
        )
        self.pilot_duplicates = Gauge(
            "gateway_pilot_duplicates_suppressed",
            "Redelivered messages of the last day that were already stored.",
            ["channel"],
            registry=r,
        )

    def expect_channels(self, channels: Iterable[str]) -> None:
        """Have these channels' counters begin at nought: Prometheus sees no increase in a series that begins at one, and
        the first loss would go unnoticed."""
        counters = (
            self.duplicates, self.retries, self.reconnects, self.child_exits, self.undecryptable, self.possible_loss,
            self.gate_alarms,
        )  # fmt: skip
        for channel in channels:
            for counter in counters:
                counter.labels(channel)
            for outcome in ("sent", "failed", "refused", "unknown"):
                self.sends.labels(channel, outcome)
            for direction in ("inbound", "outbound"):
                self.messages.labels(channel, direction)
            self.pilot_duplicates.labels(channel)

    def duplicates_by_channel(self) -> dict[str, int]:
        """Suppressed since this process began."""
        samples = (sample for metric in self.duplicates.collect() for sample in metric.samples)
        return {s.labels["channel"]: int(s.value) for s in samples if s.name.endswith("_total")}

    def pilot_channels(self) -> set[str]:
        """Those that show a figure now."""
        return {
            sample.labels["channel"] for metric in self.pilot_success.collect() for sample in metric.samples
        }
