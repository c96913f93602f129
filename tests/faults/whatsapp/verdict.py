"""What became of every message that people wrote: read off the ledger and off et_messages when everything is calm again."""

from __future__ import annotations

import contextlib
from collections import Counter

from tests.faults import checker
from tests.faults.checker import Report
from tests.faults.ledger import OFFERED, Entry, read
from tests.faults.whatsapp.rig import Rig


async def settle(rig: Rig) -> None:
    """Until everything is acknowledged and stored; what is missing after that is counted, not raised."""
    for line in rig.lines:
        await rig.drained(line)
    with contextlib.suppress(AssertionError):
        await rig.stored(list(rig.witness.said), within=60)


async def judge_inbound(rig: Rig, report: Report) -> None:
    witness, rows = rig.witness, await rig.rows()
    rows = [row for row in rows if not (row["content"] or "").startswith("order ")]  # our own
    ledger = read(rig.ledger.path)
    for msg_id in witness.said:  # what was put on the wire more than once
        ledger += [Entry(OFFERED, msg_id, w.monotonic, w.at) for w in rig.sandbox.written(msg_id)[1:]]
    report.figures["messages"] = dict(Counter(said.how for said in witness.said.values()))
    report.add("stored", checker.inbound(ledger, (row["item"] for row in rows)))
    report.zero("acknowledged before durable", len(witness.early))
    report.problems += witness.early[:8]
    report.zero("never acknowledged", len(witness.said.keys() - witness.acked.keys()))
    known = [row for row in rows if row["item"] in witness.said]
    wrong = [
        r["item"] for r in known if not r["placeholder"] and r["content"] != witness.said[r["item"]].text
    ]
    report.zero("stored with another text", len(wrong))
    report.zero("left unreadable", sum(row["placeholder"] for row in rows))
    report.figures["reported as possible loss"] = int(await rig.metric("gateway_possible_loss_total"))
    report.figures["encrypted anew by the sender's phone"] = len(witness.asked_again)
    # What had to be encrypted anew arrived later than what was written after it.
    order = [
        (row["thread_id"], witness.said[row["item"]].number)
        for row in known
        if row["item"] not in witness.asked_again
    ]
    report.zero("inversions", checker.inversions(order))
    report.zero("gate alarms", await rig.metric("gateway_gate_alarms_total"))
