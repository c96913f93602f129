"""The sandbox's own halves of the protocol, without a client: nodes, Signal, media, the ledger, what is saved."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.whatsapp import ciphers, media, tokens
from sandbox.whatsapp.keys import KeyPair, sign, verify
from sandbox.whatsapp.ledger import Ledger
from sandbox.whatsapp.nodes import JID, Node, decode, encode
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from sandbox.whatsapp.signal import Bundle, DecryptError, SenderKey, Session, pack, unpack
from sandbox.whatsapp.world import Mailbox, PhoneKeys, Queued, digits, load


def test_the_token_tables_are_found_in_the_installed_library() -> None:
    table = tokens.load()
    assert (table.single[0], table.single[3], len(table.single)) == ("", "s.whatsapp.net", 236)
    assert [len(words) for words in table.double] == [256] * 4


def test_a_library_without_the_tables_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "library.so"
    other.write_bytes(b"not a library")
    with pytest.raises(tokens.TokensNotFound):
        tokens._Library(other)


_texts = st.one_of(
    st.text(min_size=1, max_size=40), st.sampled_from(["message", "read-self", "12345", "0A1B", "lid"])
)
_jids = st.builds(
    JID,
    st.from_regex(r"[0-9]{1,15}", fullmatch=True),
    st.sampled_from(["lid", "s.whatsapp.net"]),
    st.integers(0, 99),
)
_nodes = st.recursive(
    st.builds(Node, _texts, st.dictionaries(_texts, st.one_of(_texts, _jids), max_size=4), st.none()),
    lambda children: st.builds(
        Node,
        _texts,
        st.dictionaries(_texts, st.one_of(_texts, _jids), max_size=4),
        st.one_of(st.binary(min_size=1, max_size=400), st.lists(children, min_size=1, max_size=3)),
    ),
    max_leaves=8,
)


@given(_nodes)
def test_a_node_survives_the_wire(node: Node) -> None:
    assert decode(encode(node)) == node


def test_a_cut_node_is_an_error_and_not_a_short_node() -> None:
    frame = encode(Node("message", {"id": "ABCDEF0123456789"}, b"x" * 50))
    with pytest.raises(ValueError, match="too early"):
        decode(frame[:-10])


def test_a_signature_is_bound_to_key_and_message() -> None:
    keys, other = KeyPair.generate(), KeyPair.generate()
    signature = sign(keys.private, b"message")
    assert verify(keys.public, b"message", signature)
    assert not verify(other.public, b"message", signature)
    assert not verify(keys.public, b"massage", signature)


def test_small_protobufs_survive() -> None:
    fields = unpack(pack({1: 300, 2: b"blob", 3: None, 4: 0}))
    assert (fields.numbers, fields.blobs) == ({1: 300, 4: 0}, {2: b"blob"})


def _pair_of_sessions() -> tuple[Session, Session]:
    alice, bob = PhoneKeys.generate(), PhoneKeys.generate()
    offered: Bundle = bob.bundle()
    mine = Session.initiate(alice.identity, alice.registration, offered)
    kind, first = mine.encrypt(b"first")
    assert kind == "pkmsg"
    fields = unpack(first[1:])
    theirs = Session.respond(bob.identity, bob.signed, bob.one_time[fields.numbers[1]], fields)
    assert theirs.decrypt(fields.blob(4)) == b"first"
    return mine, theirs


def test_a_session_turns_its_ratchet_and_takes_messages_out_of_order() -> None:
    alice, bob = _pair_of_sessions()
    kind, answer = bob.encrypt(b"answer")
    assert (kind, alice.decrypt(answer)) == ("msg", b"answer")
    late, *rest = [alice.encrypt(str(n).encode())[1] for n in range(5)]
    assert [bob.decrypt(message) for message in rest] == [b"1", b"2", b"3", b"4"]
    bob.encrypt(b"turns nothing yet")
    assert bob.decrypt(late) == b"0"


def test_a_message_is_read_once_and_a_changed_one_never() -> None:
    alice, bob = _pair_of_sessions()
    message = unpack(alice.encrypt(b"again")[1][1:]).blob(4)
    with pytest.raises(DecryptError):
        bob.decrypt(message[:-1] + bytes([message[-1] ^ 1]))
    assert bob.decrypt(message) == b"again"
    with pytest.raises(DecryptError):
        bob.decrypt(message)


def test_a_sender_key_takes_messages_out_of_order_and_only_its_own() -> None:
    mine = SenderKey.generate()
    theirs = SenderKey.from_distribution(mine.distribution())
    first, second = mine.encrypt(b"first"), mine.encrypt(b"second")
    assert (theirs.decrypt(second), theirs.decrypt(first)) == (b"second", b"first")
    with pytest.raises(DecryptError):
        theirs.decrypt(SenderKey.generate().encrypt(b"stranger"))


def test_a_phone_without_a_session_cannot_read(tmp_path: Path) -> None:
    async def run() -> None:
        async with WhatsAppSandbox(tmp_path) as wa:
            phone = wa.person("+60111222333")
            device = phone.account.phone.of_device(1)
            from sandbox.whatsapp.world import Device

            stranger = Device(device, phone.account.lid.of_device(1), b"", b"")
            with pytest.raises(DecryptError):
                ciphers.decrypt(phone.account, stranger, Node("enc", {"type": "msg"}, os.urandom(80)))

    asyncio.run(run())


def test_media_come_back_whole_or_not_at_all() -> None:
    data = os.urandom(100_000)
    stored = media.encrypt(data, "image")
    assert media.decrypt(stored.blob, stored.key, "image") == data
    with pytest.raises(ValueError, match="changed"):
        media.decrypt(stored.blob[:-1] + b"x", stored.key, "image")


def _queued(number: int, item_id: str, author: str) -> Queued:
    return Queued(number, "message", item_id, author, Node("message", {"id": item_id}))


def test_two_people_may_use_the_same_id() -> None:
    box = Mailbox()
    for number, author in enumerate(("mei", "ali")):
        box.put(_queued(number, "SAME", author))
    found = box.find("message", "SAME", "ali")
    assert found is not None
    assert found.author == "ali"
    box.remove(found)
    rest = box.find("message", "SAME", "ali")
    assert rest is not None
    assert rest.author == "mei"
    assert box.find("receipt", "SAME", "mei") is None


async def test_a_ledger_hands_out_each_item_once_and_times_out() -> None:
    ledger: Ledger[int] = Ledger()
    waiting = asyncio.create_task(ledger.next())
    await asyncio.sleep(0)
    ledger.add(1)
    ledger.add(2)
    assert [await waiting, await ledger.next()] == [1, 2]
    assert await ledger.wait_for(lambda item: item == 1) == 1
    with pytest.raises(TimeoutError):
        await ledger.next(timeout=0.01)


def test_a_wrong_number_is_named() -> None:
    assert digits("+60 12 345") == "6012345"
    with pytest.raises(ValueError, match="'mei'"):
        digits("mei")


async def test_accounts_groups_and_ports_come_back_after_a_restart(tmp_path: Path) -> None:
    async with WhatsAppSandbox(tmp_path) as wa:
        mei, ali = wa.person("+60111222333", "Mei"), wa.person("+60111222444", "Ali", auto_receipts=None)
        wa.group([mei, ali], "Family")
        launch = wa.launch_file.read_text()
    async with WhatsAppSandbox(tmp_path) as wa:
        assert [(p.number, p.name, p.lid, p.auto_receipts) for p in wa.people] == [
            ("+60111222333", "Mei", mei.lid, "delivered"),
            ("+60111222444", "Ali", ali.lid, None),
        ]
        assert [(g.name, g.members) for g in wa.groups] == [("Family", [mei.lid, ali.lid])]
        assert wa.launch_file.read_text() == launch


async def test_a_state_file_of_another_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "state.pickle").write_bytes(b"garbage")
    with pytest.raises(ValueError, match="delete it"):
        load(tmp_path / "state.pickle")
    with pytest.raises(ValueError, match="delete it"):
        WhatsAppSandbox(tmp_path)


async def test_the_proxy_refuses_every_other_host(tmp_path: Path) -> None:
    async with WhatsAppSandbox(tmp_path) as wa:
        port = int(wa._server.proxy_url.rpartition(":")[2])
        for request in (
            b"CONNECT example.com:443 HTTP/1.1\r\n\r\n",
            b"GET http://web.whatsapp.com/ HTTP/1.1\r\n\r\n",
        ):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            assert (await reader.readline()).startswith(b"HTTP/1.1 403")
            writer.close()
            await writer.wait_closed()
        assert [event.kind for event in wa.events] == ["host_refused", "host_refused"]
