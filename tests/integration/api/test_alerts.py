"""The files in `ops/`: promtool takes them, what they name is in a live scrape, and real trouble makes each alert fire."""

from __future__ import annotations

import asyncio
import json
import re
import time
from asyncio.subprocess import PIPE, STDOUT
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from core.channel import InboundMessage, MessageType, Person, SessionId, TenantId
from core.errors import Invalid
from core.metrics import Metrics
from core.outbound import OutboundWorker
from tests.support.api import Api, Tenant
from tests.support.outbound import enqueue, eventually, fetch, reached, value

OPS = Path(__file__).resolve().parents[3] / "ops"
ALERTS: dict[str, dict[str, Any]] = {
    rule["alert"]: rule
    for group in yaml.safe_load((OPS / "alerts.yaml").read_text())["groups"]
    for rule in group["rules"]
}


async def promtool(*args: str | Path) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec("promtool", *map(str, args), stdout=PIPE, stderr=STDOUT)
    async with asyncio.timeout(60):
        said, _ = await process.communicate()
    return process.returncode or 0, said.decode()


def board_queries() -> Iterator[tuple[str, str]]:
    board = json.loads((OPS / "grafana.json").read_text())
    for panel in board["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            yield variable["name"], variable["definition"].removeprefix("label_values(").rpartition(",")[0]


def plain(query: str) -> str:
    """As Prometheus gets it, with the board's variables filled in."""
    return query.replace("$__rate_interval", "5m").replace("$instance", ".*")


def named(query: str) -> Iterator[tuple[str, set[str]]]:
    """Every metric of a query with the labels that are asked of it there."""
    grouped: set[str] = set()
    for found in re.finditer(r"by \(([^)]*)\)", query):
        grouped |= {label.strip() for label in found[1].split(",")}
    for name, selector in re.findall(r"\b((?:wa|gateway)_[a-z_]+)(\{[^}]*\})?", query):
        yield name, set(re.findall(r"(\w+)\s*(?:=~|!=|!~|=)", selector)) | grouped


async def test_promtool_takes_the_rules_and_each_alert_fires_in_their_own_test() -> None:
    assert (await promtool("check", "rules", OPS / "alerts.yaml"))[0] == 0
    code, said = await promtool("test", "rules", OPS / "alerts.test.yaml")
    assert code == 0, said
    cases = [
        case
        for test in yaml.safe_load((OPS / "alerts.test.yaml").read_text())["tests"]
        for case in test["alert_rule_test"]
    ]
    for kind in (True, False):  # each fires once, and each stays silent once
        assert {case["alertname"] for case in cases if bool(case["exp_alerts"]) is kind} == set(ALERTS)


def test_each_alert_says_what_to_do_in_a_section_of_its_own() -> None:
    page = (OPS.parent / "docs" / "operations.md").read_text()
    for name, rule in ALERTS.items():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{name.lower()}"
        assert f"#### {name}\n" in page, f"docs/operations.md does not say what to do about {name}"


async def test_every_query_parses_and_names_what_a_scrape_shows(
    api: Api, shop: Tenant, tmp_path: Path
) -> None:
    queries = [(name, rule["expr"]) for name, rule in ALERTS.items()]
    queries += [(f"panel {title}", plain(query)) for title, query in board_queries()]
    rules = [{"record": f"check:{n}", "expr": query} for n, (_, query) in enumerate(queries)]
    checked = tmp_path / "queries.json"  # JSON is YAML
    checked.write_text(json.dumps({"groups": [{"name": "queries", "rules": rules}]}))
    assert await promtool("check", "rules", checked) == (
        0,
        f"Checking {checked}\n  SUCCESS: {len(rules)} rules found\n\n",
    )

    await shop.receive("hello")
    await api.post("/send", shop.send_body(), shop.key)
    scraped: dict[str, set[str]] = {}
    for family in text_string_to_metric_families((await api.get("/metrics")).body.decode()):
        suffix = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
        for name in (family.name + one for one in suffix):
            # Labels of series that are there; of those that are not there yet, as they are declared.
            declared = set(api.services.metrics.registry._names_to_collectors[family.name]._labelnames)
            shown = {label for sample in family.samples if sample.name == name for label in sample.labels}
            assert shown <= declared | {"le"}
            scraped[name] = declared | ({"le"} if name.endswith("_bucket") else set())
    assert {"wa_messages_written_total", "gateway_sends_total"} <= set(scraped)
    for title, query in queries:
        names = list(named(query))
        assert names, f"{title} asks for no metric of ours: {query}"
        for name, labels in names:
            assert name in scraped, f"{title}: there is no {name}"
            unknown = labels - scraped[name] - {"instance", "job"}
            # What one side of a division groups by need not exist on the other: look at the whole query's metrics.
            anywhere = set().union(*(scraped[other] for other, _ in names))
            assert unknown <= (anywhere if "(" in query else set()), f"{title}: {name} has no {unknown}"
            assert labels & {"le"} == set() or "_bucket" in name or len(names) > 1, title


def late(shop: Tenant, session_id: int, message_id: str, seconds: float = 0.0) -> InboundMessage:
    return InboundMessage(
        tenant_id=TenantId(shop.id),
        session_id=SessionId(session_id),
        channel="whatsapp",
        channel_message_id=message_id,
        person=Person("whatsapp:+60111222333"),
        message_type=MessageType.TEXT,
        content="hello",
        channel_timestamp=1_760_000_000_000,
        sender_identifier="+60111222333",
        arrived_at=time.time() - seconds,
    )


async def scrape(api: Api) -> dict[str, tuple[float, bool]]:
    """Each series with its value, and whether it is one that only grows."""
    text = (await api.get("/metrics")).body.decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = {**sample.labels, "instance": "gateway:3000", "job": "gateway"}
            inside = ",".join(f'{name}="{value}"' for name, value in sorted(labels.items()))
            found[f"{sample.name}{{{inside}}}"] = (sample.value, family.type != "gauge")
    return found


async def test_real_trouble_in_a_running_gateway_makes_each_alert_fire(
    api: Api, shop: Tenant, tmp_path: Path
) -> None:
    """Each condition is brought about in the real parts; what `/metrics` shows before and after is what promtool sees."""
    api.services.metrics.expect_channels(["whatsapp"])
    assert (await api.get("/health")).json["status"] == "ok"
    calm = await scrape(api)
    assert await firing(tmp_path, calm, calm) == set()

    # Messages that arrived four seconds before their commit, and some that cannot be stored.
    await api.services.ingest.submit([late(shop, shop.session_id, f"L{n}", 4) for n in range(3)])
    for n in range(3):
        with pytest.raises(Invalid):
            await api.services.ingest.submit([late(shop, 999_999, f"X{n}")])
    # A send that was cut off after it had left.
    api.platform.script("sent_then_lost", to="whatsapp:+60111222333")
    cut_off = await enqueue(api.db, shop.place, "torn", to="+60111222333")
    await reached(api.db, cut_off, "unknown")
    # A session that is wanted and that nobody runs, with a message that is due for ten minutes.
    idle = await api.another_session(shop, "disconnected")
    await fetch(
        api.db,
        "INSERT INTO et_session_runtime (session_id, tenant_id, wanted) VALUES ($1, $2, 'connected')",
        idle,
        shop.id,
    )
    waiting: int = await value(
        api.db,
        "SELECT queue_id FROM et_enqueue_outbound(tenant_id => $1, channel_session_id => $2,"
        " recipient => '+60111222444', content => 'late')",
        shop.id,
        idle,
    )
    await fetch(
        api.db,
        "UPDATE et_outbound_queue SET next_attempt_at = now() - INTERVAL '10 minutes' WHERE id = $1",
        waiting,
    )
    # A body on disk that nobody empties any more.
    await api.services.spool.stop()
    await api.services.spool.append(shop.id, shop.session_id, {})
    # What takes a WhatsApp child, a new version of its library or a blocked loop, as these parts report it.
    metrics = api.services.metrics
    metrics.journal_depth.labels("session-7").set(2000)
    metrics.possible_loss.labels("whatsapp").inc()
    metrics.gate_alarms.labels("whatsapp").inc()
    metrics.loop_lag.set(2)

    assert isinstance(api.services.outbound, OutboundWorker)
    await api.services.outbound._measure()  # as it does by itself every few seconds

    async def told() -> dict[str, tuple[float, bool]] | None:
        shown = await scrape(api)  # sessions are looked at once a second at most
        return shown if any(name.startswith("gateway_session_up") for name in shown) else None

    assert await firing(tmp_path, calm, await eventually(told)) == set(ALERTS)


async def firing(
    folder: Path, before: dict[str, tuple[float, bool]], after: dict[str, tuple[float, bool]]
) -> set[str]:
    """Which alerts fire 40 minutes into what happened between two scrapes, were it to go on like that."""
    series = []
    for name, (now, grows) in after.items():
        was = before.get(name, (0.0, grows))[0]
        series.append({"series": name, "values": f"{was}+{now - was}x60" if grows else f"{now}+0x60"})
    asked = {
        "expr": 'count by (alertname) (ALERTS{alertstate="firing"})',
        "eval_time": "40m",
        "exp_samples": [],
    }
    test = {"interval": "1m", "input_series": series, "promql_expr_test": [asked]}
    path = folder / "firing.json"
    path.write_text(
        json.dumps({"rule_files": [str(OPS / "alerts.yaml")], "evaluation_interval": "1m", "tests": [test]})
    )
    code, said = await promtool("test", "rules", path)
    # Nothing is expected, so what promtool complains of having got is what fires.
    assert code == 0 or "got:" in said, said
    return set(re.findall(r'alertname="(\w+)"', said.rpartition("got:")[2])) if code else set()


def test_counters_of_a_channel_begin_at_nought() -> None:
    """An increase is seen only in a series that was there before it."""
    metrics = Metrics()
    metrics.expect_channels(["email"])
    shown = {
        (s.name, s.labels.get("channel")): s.value for m in metrics.registry.collect() for s in m.samples
    }
    assert shown["gateway_possible_loss_total", "email"] == 0
    assert shown["gateway_duplicates_suppressed_total", "email"] == 0
