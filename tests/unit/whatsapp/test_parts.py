"""The small parts: addresses, quotes, error texts, the folder, whatsmeow's file, the pairing's clock."""

from __future__ import annotations

import os
import sqlite3
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from core.channel import Quoted
from core.errors import ChannelError, NotSentError, RefusedError, ThrottledError
from gateway.whatsapp import sending, store
from gateway.whatsapp.folder import FolderLock, FolderTaken, forget_device, message_secret, take
from gateway.whatsapp.intents import Intent, Intents
from gateway.whatsapp.pairing import Pairing, is_expected
from gateway.whatsapp.pump import lids_without_phone
from gateway.whatsapp.timings import Timings

DEVICE = store.Device(
    "60123456789:3@s.whatsapp.net", "60123456789@s.whatsapp.net", "100000000000001@lid", "Shop"
)


# ---- sending


@pytest.mark.parametrize(
    ("recipient", "jid"),
    [
        ("whatsapp:+60111222333", "60111222333@s.whatsapp.net"),
        ("whatsapp-lid:100000000000002", "100000000000002@lid"),
        ("whatsapp-group:120363000000000001@g.us", "120363000000000001@g.us"),
    ],
)
def test_an_external_id_becomes_a_jid(recipient: str, jid: str) -> None:
    assert sending.jid_of(recipient) == jid


@pytest.mark.parametrize("recipient", ["email:a@b.co", "+60111222333", "whatsapp:", "whatsapp:nobody"])
def test_another_address_is_refused(recipient: str) -> None:
    with pytest.raises(RefusedError) as error:
        sending.jid_of(recipient)
    assert error.value.code == "invalid_recipient"


def test_a_quote_goes_one_level_deep_and_names_the_author() -> None:
    raw = {
        "Info": {"MessageSource": {"Sender": {"User": "100000000000002", "Server": "lid"}}},
        "Message": {
            "extendedTextMessage": {"text": "first", "contextInfo": {"stanzaID": "OLD"}},
            "messageContextInfo": {"messageSecret": "AAAA"},
        },
    }
    found = sending.quote(Quoted("ID1", "+60111222333", "first", False, raw), DEVICE)
    assert found == {
        "stanzaID": "ID1",
        "participant": "100000000000002@lid",
        "quotedMessage": {"extendedTextMessage": {"text": "first"}},
    }


def test_a_quote_of_our_own_or_a_webhooks_message_carries_its_text() -> None:
    own = sending.quote(Quoted("ID1", None, "ours", True), DEVICE)
    assert own == {
        "stanzaID": "ID1",
        "participant": "60123456789@s.whatsapp.net",
        "quotedMessage": {"conversation": "ours"},
    }
    theirs = sending.quote(Quoted("ID2", "+60111222333", "theirs", False, {"message": {"x": 1}}), DEVICE)
    assert theirs["participant"] == "60111222333@s.whatsapp.net"
    assert theirs["quotedMessage"] == {"conversation": "theirs"}


@pytest.mark.parametrize(
    ("text", "kind", "code"),
    [
        ("no LID found for 1@s.whatsapp.net from server", RefusedError, "not_on_whatsapp"),
        ("server returned error 463", ThrottledError, "reachout_limit"),
        ("server returned error 475", ThrottledError, "reachout_capped"),
        ("failed to send message node: websocket not connected", ThrottledError, "websocket_not_connected"),
        ("server returned error 479", NotSentError, "refused"),
        ("invalid message: no field", RefusedError, "invalid_message"),
    ],
)
def test_whatsmeows_texts_have_a_meaning(text: str, kind: type[ChannelError], code: str) -> None:
    error = sending.refusal(text)
    assert type(error) is kind
    assert error.code == code


def test_a_text_that_proves_nothing_has_none() -> None:
    assert sending.refusal("timed out waiting for message send response") is None


# ---- the folder


def test_one_holder_at_a_time_and_the_next_learns_who_it_is(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        with pytest.raises(FolderTaken) as taken:
            FolderLock(tmp_path)
        assert taken.value.pid == os.getpid()
    FolderLock(tmp_path).release()


def test_a_taker_ends_a_recorded_child_of_this_folder_and_nobody_else(tmp_path: Path) -> None:
    holder = (
        "import sys, time; from pathlib import Path; from gateway.whatsapp.folder import FolderLock\n"
        "lock = FolderLock(Path(sys.argv[-1])); print('held', flush=True); time.sleep(60)"
    )
    for words, ends in (([str(tmp_path)], False), (["--folder", str(tmp_path)], True)):
        process = subprocess.Popen([sys.executable, "-c", holder, *words], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "held\n"
            if ends:
                take(tmp_path, seconds=3).release()
                assert process.wait(3) == -9
            else:
                with pytest.raises(FolderTaken):
                    take(tmp_path, seconds=0.5)
                assert process.poll() is None
        finally:
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()


def test_a_secret_belongs_to_one_attempt_of_one_session(tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    first = message_secret(tmp_path, 1, 1)
    assert len(first) == 32
    assert message_secret(tmp_path, 1, 1) == first
    assert (
        len(
            {
                first,
                message_secret(tmp_path, 1, 2),
                message_secret(tmp_path, 2, 1),
                message_secret(other, 1, 1),
            }
        )
        == 4
    )
    assert (tmp_path / "secret.key").stat().st_mode & 0o777 == 0o600


def test_forgetting_the_device_keeps_the_journal(tmp_path: Path) -> None:
    for name in ("whatsapp.db", "whatsapp.db-journal", "journal.db"):
        (tmp_path / name).touch()
    forget_device(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["journal.db"]


def test_intents_outlive_the_process(tmp_path: Path) -> None:
    path, intent = tmp_path / "intents.db", Intent(7, 2, DEVICE.jid)
    first = Intents(path)
    first.write([(b"s" * 32, intent)])
    first.close()
    second = Intents(path)
    assert second.find(b"s" * 32) == intent
    assert second.find(b"t" * 32) is None
    second.close()


# ---- whatsmeow's file


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "whatsapp.db"
    conn = sqlite3.connect(path)
    conn.executescript(
        """
        CREATE TABLE whatsmeow_device (jid TEXT, lid TEXT, push_name TEXT);
        CREATE TABLE whatsmeow_message_secrets (our_jid TEXT, chat_jid TEXT, sender_jid TEXT, message_id TEXT, key BLOB);
        CREATE TABLE whatsmeow_lid_map (lid TEXT, pn TEXT);
        CREATE TABLE whatsmeow_sessions (our_jid TEXT, their_id TEXT, session BLOB);
        CREATE TABLE whatsmeow_sender_keys (our_jid TEXT, chat_id TEXT, sender_id TEXT, sender_key BLOB);
        INSERT INTO whatsmeow_device VALUES ('60123456789:3@s.whatsapp.net', '100000000000001:3@lid', 'Shop');
        INSERT INTO whatsmeow_lid_map VALUES ('200', '60200'), ('2000', '602000');
        INSERT INTO whatsmeow_sessions VALUES
            ('me', '200_1:0', x''), ('me', '200_1:5', x''), ('me', '60200:0', x''), ('me', '2000_1:0', x'');
        INSERT INTO whatsmeow_sender_keys VALUES
            ('me', '1@g.us', '200_1:0', x''), ('me', '2@g.us', '200_1:0', x''), ('me', '1@g.us', '2000_1:0', x'');
        INSERT INTO whatsmeow_message_secrets VALUES ('me', '200@lid', 'me', 'ID1', x'0102');
        """
    )
    conn.commit()
    conn.close()
    return path


def remaining(path: Path) -> tuple[list[str], list[tuple[str, str]]]:
    conn = sqlite3.connect(path)
    try:
        sessions = [row[0] for row in conn.execute("SELECT their_id FROM whatsmeow_sessions ORDER BY 1")]
        keys = conn.execute("SELECT chat_id, sender_id FROM whatsmeow_sender_keys ORDER BY 1, 2").fetchall()
        return sessions, keys
    finally:
        conn.close()


def test_the_file_says_who_we_are_and_what_was_sent(database: Path) -> None:
    assert store.device(database) == DEVICE
    assert DEVICE.identifier == "+60123456789"
    assert store.find_secret(database, b"\1\2") == store.SecretRow("ID1", "200@lid")
    assert store.find_secret(database, b"\1\3") is None
    assert store.phone_of_lid(database, "200") == "60200"
    assert store.phone_of_lid(database, "999") is None


def test_a_missing_or_empty_file_holds_nothing(tmp_path: Path) -> None:
    assert store.device(tmp_path / "none.db") is None
    assert not (tmp_path / "none.db").exists()
    sqlite3.connect(tmp_path / "empty.db").close()
    (tmp_path / "empty.db").touch()
    assert store.device(tmp_path / "empty.db") is None


def test_healing_drops_exactly_the_senders_sessions_in_both_forms(database: Path) -> None:
    assert store.drop_sessions(database, [("200@lid", "200@lid", "failed to decrypt normal message: x")]) == 3
    sessions, keys = remaining(database)
    assert sessions == ["2000_1:0"]
    assert len(keys) == 3


def test_healing_a_group_message_drops_the_group_key_alone(database: Path) -> None:
    assert store.drop_sessions(database, [("200@lid", "1@g.us", "failed to decrypt group message: x")]) == 1
    sessions, keys = remaining(database)
    assert len(sessions) == 4
    assert keys == [("1@g.us", "2000_1:0"), ("2@g.us", "200_1:0")]


def test_healing_a_group_messages_key_hand_over_drops_both(database: Path) -> None:
    assert (
        store.drop_sessions(
            database, [("60200@s.whatsapp.net", "1@g.us", "failed to decrypt normal message")]
        )
        == 4
    )
    assert store.drop_sessions(database, [("%@lid", "1@g.us", "x")]) == 0


@pytest.mark.parametrize("how", ["delete", "wal"])
def test_a_file_left_in_the_middle_of_a_transaction_can_be_read(database: Path, how: str) -> None:
    """As after a `kill -9`: the journal is still there and has to be played back, or left aside, first."""
    program = (
        "import os, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.execute('PRAGMA journal_mode = ' + sys.argv[2])\n"
        "c.execute('PRAGMA cache_size = 1'); c.execute('BEGIN IMMEDIATE')\n"
        "c.execute(\"UPDATE whatsmeow_device SET push_name = 'torn'\")\n"
        "rows = [('x', str(n), b'y' * 4000) for n in range(200)]\n"
        "c.executemany('INSERT INTO whatsmeow_sessions VALUES (?, ?, ?)', rows)\n"
        "os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", program, str(database), how], check=False)
    assert database.with_name("whatsapp.db-journal" if how == "delete" else "whatsapp.db-wal").exists()
    assert store.device(database) == DEVICE


# ---- pairing


def test_codes_say_how_long_they_are_good_for() -> None:
    now = datetime(2026, 1, 1, tzinfo=UTC)
    pairing = Pairing(Timings(), time.monotonic() + 1)
    assert pairing.qr("one", now).expires_at == now + timedelta(seconds=60)
    assert pairing.qr("two", now).expires_at == now + timedelta(seconds=20)
    assert pairing.code("ABCDEFGH", now).code == "ABCD-EFGH"
    assert pairing.code("ABCD-EFGH", now).code == "ABCD-EFGH"


@pytest.mark.parametrize(
    ("expected", "fits"),
    [(None, True), ("", True), ("60 12-345 6789", True), ("+60123456780", False), ("nonsense", False)],
)
def test_only_the_expected_number_is_taken(expected: object, fits: bool) -> None:
    assert is_expected("+60123456789", expected) is fits


@pytest.mark.parametrize(
    ("body", "lids"),
    [
        ({"data": {"Info": {"MessageSource": {"Sender": {"User": "1", "Server": "lid"}}}}}, ["1"]),
        (
            {
                "data": {
                    "MessageSource": {
                        "Sender": {"User": "1", "Server": "lid"},
                        "SenderAlt": {"User": "60", "Server": "s.whatsapp.net"},
                    }
                }
            },
            [],
        ),
        ({"data": {"sender": "1@lid", "chat": "2@g.us"}}, ["1"]),
        ({"data": 7}, []),
        ("garbage", []),
    ],
)
def test_lids_without_a_phone_are_looked_up(body: object, lids: list[str]) -> None:
    assert lids_without_phone(body) == lids
