"""The sandbox from outside: its HTTP API, scripted people, and the command that runs it."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import pytest_asyncio

from sandbox.whatsapp import people
from sandbox.whatsapp.admin import AdminServer
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from tests.integration.sandbox.conftest import Linked, quick_folder
from tests.support.whatsapp_real import RealClient

pytestmark = pytest.mark.asyncio(loop_scope="package")


class Admin:
    def __init__(self, url: str, http: aiohttp.ClientSession) -> None:
        self._url, self._http = url, http

    async def call(self, method: str, path: str, expect: int | None = None, **body: Any) -> Any:
        async with self._http.request(method, self._url + path, json=body or None) as answer:
            if expect is None:
                assert answer.status < 300, await answer.text()
            else:
                assert answer.status == expect, await answer.text()
            return await answer.json() if answer.content_type == "application/json" else await answer.read()


@pytest_asyncio.fixture(scope="module", loop_scope="package")
async def admin(linked: Linked) -> AsyncIterator[Admin]:
    server = AdminServer(linked.wa)
    url = await server.start()
    async with aiohttp.ClientSession() as http:
        yield Admin(url, http)
    await server.stop()


async def test_the_overview_lists_people_devices_and_routes(admin: Admin, linked: Linked) -> None:
    overview = await admin.call("GET", "/")
    shop = next(p for p in overview["people"] if p["number"] == "+60123456789")
    (device,) = shop["devices"]
    assert (device["jid"], device["online"]) == (str(linked.device.jid), True)
    assert "POST /people/{number}/send" in overview["routes"]
    assert "sandbox.whatsapp.launcher" in overview["client_command"]


async def test_curl_can_play_the_customer(admin: Admin, linked: Linked) -> None:
    created = await admin.call("POST", "/people", number="+60111222777", name="Tan", auto_receipts=None)
    assert (created["number"], created["devices"]) == ("+60111222777", [])
    sent = await admin.call("POST", "/people/60111222777/send", to="+60123456789", text="by curl")
    assert (await linked.client.message(sent["id"]))["text"] == "by curl"
    await linked.wa.wait_acked(sent["id"])
    fate = await admin.call("GET", f"/acks/{sent['id']}")
    assert fate["acked"] >= fate["written"][0]
    waiting = asyncio.create_task(admin.call("GET", "/people/60111222777/messages?after=0&wait=10"))
    await asyncio.sleep(0)
    answer = await linked.client.do("send", to="60111222777", text="hello curl")
    got = await waiting
    assert [(m["id"], m["text"], m["from"]) for m in got["messages"]] == [
        (answer["ID"], "hello curl", "+60123456789")
    ]
    assert got["next"] == 1
    await admin.call("POST", "/people/60111222777/receipt", id=answer["ID"], kind="read")
    await linked.client.wait(
        "ReceiptEv", lambda e: e["data"].get("Type") == "READ" and answer["ID"] in e["data"]["MessageIDs"]
    )
    quote = await admin.call(
        "POST", "/people/60111222777/send", to="+60123456789", text="that one", quoted=answer["ID"]
    )
    assert (await linked.client.message(quote["id"]))["quoted"] == answer["ID"]
    calls = await admin.call("GET", "/calls?after=0")
    assert calls["calls"][-1]["outcome"] == "accepted"


async def test_media_groups_and_own_text_by_curl(admin: Admin, linked: Linked) -> None:
    photo = b"\x89PNG not really"
    sent = await admin.call(
        "POST",
        "/people/60111222333/send",
        to="+60123456789",
        kind="image",
        data=base64.b64encode(photo).decode(),
        mimetype="image/png",
        text="look",
    )
    assert (await linked.client.message(sent["id"]))["text"] == "look"
    assert await linked.client.do("download") == {
        "size": len(photo),
        "sha256": hashlib.sha256(photo).hexdigest(),
    }
    assert await admin.call("GET", f"/people/60123456789/messages/{sent['id']}/media") == photo
    group = await admin.call("POST", "/groups", name="Family", members=["+60111222333", "+60123456789"])
    sent = await admin.call("POST", "/people/60111222333/send", group=group["id"], text="in the group")
    await linked.client.wait("MessageEv", lambda e: (e["id"], e["text"]) == (sent["id"], "in the group"))
    own = await admin.call("POST", "/people/60123456789/send", to="+60111222333", text="typed")
    event = await linked.client.message(own["id"])
    assert event["info"]["MessageSource"]["IsFromMe"] is True


async def test_every_kind_by_curl(admin: Admin, linked: Linked) -> None:
    async def send(**body: Any) -> dict[str, Any]:
        sent = await admin.call("POST", "/people/60111222333/send", to="+60123456789", **body)
        event = await linked.client.message(sent["id"])
        found: dict[str, Any] = {"id": sent["id"], **event["message"]}
        return found

    data = base64.b64encode(b"OggS").decode()
    assert (await send(kind="voice", data=data, seconds=3))["audioMessage"]["PTT"] is True
    assert (await send(kind="location", latitude=3.1, longitude=101.6, name="Here"))["locationMessage"][
        "name"
    ] == "Here"
    cards = [{"name": "A", "phone": "+601"}, {"name": "B", "phone": "+602"}]
    assert len((await send(kind="contacts", contacts=cards))["contactsArrayMessage"]["contacts"]) == 2
    poll = await send(kind="poll", question="Which?", options=["Red", "Blue"])
    await send(kind="vote", target=poll["id"], options=["Red"])
    assert await admin.call("GET", f"/people/60123456789/polls/{poll['id']}") == {"+60111222333": ["Red"]}
    assert (await send(kind="reaction", target=poll["id"], emoji="🎈"))["reactionMessage"]["text"] == "🎈"
    words = await send(text="from an ad", forwarded=2, ad={"source_id": "a1", "title": "Bread"}, ephemeral=60)
    context = words["extendedTextMessage"]["contextInfo"]
    assert (context["forwardingScore"], context["externalAdReply"]["sourceID"], context["expiration"]) == (
        2,
        "a1",
        60,
    )
    assert (await send(kind="button", button="b1", text="Yes"))["buttonsResponseMessage"][
        "selectedButtonID"
    ] == "b1"
    assert "protocolMessage" in str(await send(kind="edit", target=words["id"], text="changed"))
    await send(kind="revoke", target=words["id"])
    messages = (await admin.call("GET", "/people/60123456789/messages"))["messages"]
    assert [m["kind"] for m in messages[-2:]] == ["edit", "revoke"]
    assert messages[-1]["about"] == {"target": words["id"]}


async def test_calls_groups_history_and_dropped_media_by_curl(admin: Admin, linked: Linked) -> None:
    ring = await admin.call("POST", "/people/60111222333/calls", to="+60123456789")
    await linked.client.wait("CallOfferEv", lambda e: e["data"]["basicCallMeta"]["callID"] == ring["call"])
    await admin.call("POST", f"/people/60111222333/calls/{ring['call']}/end", to="+60123456789")
    assert [r["what"] for r in await admin.call("GET", "/rings") if r["call"] == ring["call"]] == [
        "offer",
        "terminate",
    ]
    group = await admin.call("POST", "/groups", name="Old", members=["+60111222333", "+60123456789"])
    changed = await admin.call("POST", f"/groups/{group['id']}", by="+60111222333", do="rename", text="New")
    assert changed["name"] == "New"
    start = len(linked.client.events)
    made = await admin.call("POST", "/people/60123456789/history", people=["+60111222333"], each=7, send=True)
    assert made["messages"] == 7
    await linked.client.wait("HistorySyncEv", lambda e: len(e["ids"]) == 5, start=start)
    linked.shop.archive.chats.clear()
    sent = await admin.call(
        "POST",
        "/people/60111222333/send",
        to="+60123456789",
        kind="image",
        data=base64.b64encode(b"x").decode(),
    )
    await linked.client.message(sent["id"])
    await admin.call("POST", "/media/drop", id=sent["id"], status=404)
    with pytest.raises(Exception, match="404"):
        await linked.client.do("download", of=sent["id"])
    habits = await admin.call("PATCH", "/people/60123456789", answers_media_retries="no")
    assert (habits["number"], linked.shop.answers_media_retries) == ("+60123456789", "no")
    await admin.call("PATCH", "/people/60123456789", answers_media_retries="yes")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "says"),
    [
        ("POST", "/people", {"number": "mei"}, 422, "not a phone number"),
        ("POST", "/people", {"nummer": "1"}, 422, "nummer"),
        ("POST", "/people/123/send", {"to": "+1", "text": "x"}, 404, "POST /people first"),
        ("POST", "/people/60111222333/send", {"text": "x"}, 422, "either"),
        ("POST", "/people/60111222333/send", {"to": "+60123456789"}, 422, "empty"),
        (
            "POST",
            "/people/60111222333/send",
            {"to": "+60123456789", "kind": "image", "data": "%"},
            422,
            "base64",
        ),
        ("POST", "/people/60111222333/send", {"group": "1", "text": "x"}, 404, "no group"),
        ("POST", "/people/60111222333/scan", {"qr": "no"}, 409, "not the text"),
        ("POST", "/people/60111222333/code", {"code": "ABCD-EFGH"}, 409, "nobody asked"),
        ("POST", "/people/60111222333/receipt", {"id": "none"}, 422, "not received"),
        ("POST", "/people/60123456789/devices/9", {"do": "drop"}, 404, "it has: 1"),
        ("GET", "/people/60111222333/messages?after=x", {}, 422, "after"),
        (
            "POST",
            "/people/60111222333/send",
            {"to": "+60123456789", "kind": "edit", "text": "x"},
            422,
            "target",
        ),
        ("POST", "/people/60111222333/send", {"to": "+60123456789", "kind": "poll"}, 422, "options"),
        ("POST", "/people/60111222333/send", {"to": "+60123456789", "kind": "song"}, 422, "kind"),
        (
            "POST",
            "/people/60111222333/send",
            {"to": "+60123456789", "kind": "vote", "target": "none", "options": ["x"]},
            422,
            "not a poll",
        ),
        ("POST", "/media/drop", {"id": "none"}, 422, "nobody has sent media"),
        ("POST", "/people/60123456789/history", {"people": ["+1"]}, 404, "POST /people first"),
        ("POST", "/people/60111222333/script", {"to": "+60123456789", "script": "sing"}, 422, "line 1"),
    ],
)
async def test_a_wrong_request_says_what_is_wrong(
    admin: Admin, method: str, path: str, body: dict[str, Any], status: int, says: str
) -> None:
    assert says in (await admin.call(method, path, status, **body))["error"]


async def test_only_loopback_names_are_answered(admin: Admin) -> None:
    async with admin._http.get(admin._url + "/", headers={"Host": "evil.example"}) as answer:
        assert answer.status == 403


async def test_a_scripted_person_holds_a_conversation(admin: Admin, linked: Linked) -> None:
    async def shop() -> None:
        for question, answer in (
            ("how much", "The price is RM 5"),
            ("delivery", "Yes, RM 2 more"),
            ("thanks", "Bye"),
        ):
            await linked.client.wait("MessageEv", lambda e, q=question: q in e["text"].lower())
            await linked.client.do("send", to="60111222888", text=answer)

    await admin.call("POST", "/people", number="+60111222888", name="Lim")
    answering = asyncio.create_task(shop())
    played = await admin.call(
        "POST",
        "/people/60111222888/script",
        to="+60123456789",
        script="""
            # a customer
            on price: And with delivery?
            typing
            say Hi, how much is it?
            expect price
            read
            expect
            say Thanks!
            expect bye
            wait 0.01
        """,
        patience=10,
    )
    await answering
    assert played["played"][-1] == "wait 0.01"
    late = await admin.call(
        "POST",
        "/people/60111222888/script",
        409,
        to="+60123456789",
        script="expect a miracle",
        patience=0.05,
    )
    assert "line 1: Lim waited 0.05 s for an answer with 'a miracle'" in late["error"]


@pytest.mark.parametrize("script", ["say", "on price", "wait long", "sing a song"])
async def test_a_wrong_script_is_refused_before_it_runs(script: str) -> None:
    with pytest.raises(people.ScriptError, match="line 2"):
        people.parse("# first line\n" + script)


async def test_faults_by_curl(admin: Admin, linked: Linked) -> None:
    await admin.call("POST", "/faults/sends", action="nack", code=475, times=1)
    with pytest.raises(Exception, match="475"):
        await linked.client.do("send", to="60111222333", text="refused")
    await admin.call("POST", "/people/60123456789/devices/1", do="deafen")
    sent = await admin.call("POST", "/people/60111222333/send", to="+60123456789", text="deaf")
    assert (await admin.call("GET", f"/acks/{sent['id']}"))["written"] == []
    await admin.call("DELETE", "/faults")
    await linked.client.message(sent["id"])
    garbage = await admin.call("POST", "/people/60111222333/garbage", to="+60123456789", text="now clear")
    await linked.client.message(garbage["id"])
    start = len(linked.client.events)
    await admin.call("POST", "/restart")
    await linked.client.wait("ConnectedEv", start=start)
    await linked.wa.wait_online(linked.device)


async def start_command(state: Path) -> tuple[asyncio.subprocess.Process, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sandbox",
        "--state",
        str(state),
        "--port",
        "0",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    async with asyncio.timeout(15):
        while line := (await process.stdout.readline()).decode():
            if found := re.search(r"Admin API: (\S+)", line):
                return process, found[1]
    raise AssertionError((await process.stderr.read()).decode() if process.stderr else "")


async def finish(process: asyncio.subprocess.Process) -> str:
    _, err = await asyncio.wait_for(process.communicate(), 10)
    return err.decode()


async def test_the_command_can_be_killed_and_started_again_under_a_linked_client() -> None:
    with quick_folder() as folder:
        await _killed_and_started(folder)


async def _killed_and_started(folder: Path) -> None:
    process, url = await start_command(folder)
    client = None
    try:
        async with aiohttp.ClientSession() as http:
            admin = Admin(url, http)
            client = await RealClient.start(
                WhatsAppSandbox(folder)
            )  # for its launch file; it is never started
            await client.do("connect", db=f"{folder}/session.db")
            await admin.call("POST", "/people/60123456789/scan", qr=(await client.wait("qr"))["qr"])
            await client.wait("ConnectedEv")
            first = await admin.call("POST", "/people/60111222333/send", to="+60123456789", text="before")
            await client.message(first["id"])
            await client.do("send", to="60111222333", text="before the kill")
            launch = json.loads((folder / "launch.json").read_text())
            await asyncio.sleep(1.2)  # the state is written once in half a second
            start = len(client.events)
            process.kill()
            await finish(process)
            process, admin._url = await start_command(folder)
            assert json.loads((folder / "launch.json").read_text()) == launch
            await client.wait("ConnectedEv", start=start, timeout=30)
            second = await admin.call("POST", "/people/60111222333/send", to="+60123456789", text="after")
            assert (await client.message(second["id"]))["text"] == "after"
            await client.do("send", to="60111222333", text="after the kill")
            got = await admin.call("GET", "/people/60111222333/messages?after=0&wait=5")
            assert [m["text"] for m in got["messages"] if not m["duplicate"]][-1] == "after the kill"
            _, err = await start_second(folder)
            assert "is running" in err
            await admin.call("POST", "/people/60123456789/devices/1", do="remove")
            await client.wait("LoggedOutEv")
            process.send_signal(signal.SIGTERM)
            assert await finish(process) == ""
            assert process.returncode == 0
    finally:
        if client is not None:
            await client.kill()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def start_second(state: Path) -> tuple[int, str]:
    other = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "sandbox",
        "--state",
        str(state),
        "--port",
        "0",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    err = await finish(other)
    return other.returncode or 0, err
