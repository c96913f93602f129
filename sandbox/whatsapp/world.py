"""What survives a restart of the sandbox: accounts, linked devices, keys, groups and what waits to be delivered.

Plain data without behaviour or connections, so that the whole of it can be saved to one file.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import pickle
import secrets
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.whatsapp.keys import KeyPair, sign
from sandbox.whatsapp.nodes import GROUP_SERVER, JID, LID_SERVER, Node
from sandbox.whatsapp.noise import certificate_chain
from sandbox.whatsapp.signal import Bundle, SenderKey, Session

_ONE_TIME_KEYS = 100
_FORMAT = 1
_KEYS_LOST_BY_KILL = 50


def message_id() -> str:
    """An id of the form that WhatsApp's own clients make."""
    return "3EB0" + secrets.token_hex(9).upper()


def digits(phone: str) -> str:
    number = phone.removeprefix("+").replace(" ", "")
    if not number.isdigit():
        raise ValueError(f"{phone!r} is not a phone number: write it like +60123456789")
    return number


@dataclass
class Queued:
    """One stanza that a device has not acknowledged yet."""

    number: int
    kind: str  # message, receipt, notification
    id: str
    author: str  # user part of whoever it comes from
    node: Node


@dataclass
class Mailbox:
    """What waits for one device, in order of arrival."""

    waiting: dict[int, Queued] = field(default_factory=dict)
    by_id: dict[str, list[int]] = field(default_factory=dict)
    retried: Counter[str] = field(default_factory=Counter)

    def put(self, item: Queued) -> None:
        self.waiting[item.number] = item
        self.by_id.setdefault(item.id, []).append(item.number)

    def find(self, kind: str, item_id: str, author: str | None) -> Queued | None:
        """The oldest stanza with this id; the author decides when two people used the same id."""
        found = [self.waiting[n] for n in self.by_id.get(item_id, ()) if self.waiting[n].kind == kind]
        return next((item for item in found if item.author == author), found[0] if found else None)

    def remove(self, item: Queued) -> None:
        del self.waiting[item.number]
        numbers = self.by_id[item.id]
        numbers.remove(item.number)
        if not numbers:
            del self.by_id[item.id]


@dataclass
class Device:
    """A linked client: its public keys and its mailbox."""

    jid: JID
    lid: JID
    noise: bytes
    identity: bytes
    registration: int = 0
    signed_id: int = 0
    signed_key: bytes = b""
    signature: bytes = b""
    one_time: list[tuple[int, bytes]] = field(default_factory=list)
    mailbox: Mailbox = field(default_factory=Mailbox)

    @property
    def number(self) -> int:
        return self.jid.device

    def bundle(self) -> Bundle:
        key_id, key = self.one_time.pop(0) if self.one_time else (None, None)
        return Bundle(
            self.registration, self.identity, self.signed_id, self.signed_key, self.signature, key_id, key
        )


@dataclass
class PhoneKeys:
    """The private keys of a phone that the sandbox plays."""

    registration: int
    identity: KeyPair
    signed: KeyPair
    signature: bytes
    one_time: dict[int, KeyPair]
    given: int = 0

    @classmethod
    def generate(cls) -> PhoneKeys:
        identity, signed = KeyPair.generate(), KeyPair.generate()
        return cls(
            secrets.randbelow(16000) + 1,
            identity,
            signed,
            sign(identity.private, signed.typed),
            {number: KeyPair.generate() for number in range(1, _ONE_TIME_KEYS + 1)},
        )

    def bundle(self) -> Bundle:
        self.given += 1
        key = self.one_time.get(self.given)
        if key is None:  # a real phone uploads new ones in time
            key = self.one_time[self.given] = KeyPair.generate()
        return Bundle(
            self.registration,
            self.identity.public,
            1,
            self.signed.public,
            self.signature,
            self.given,
            key.public,
        )


@dataclass
class Sent:
    """A message kept by the phone that sent it, to encrypt it anew when a device asks."""

    body: bytes
    mode: str
    to: str  # lid user of the recipient, or the group's id
    group: bool
    attrs: dict[str, str]
    enc_attrs: dict[str, str]
    repair: str = "yes"  # what a retry receipt brings: yes, never, garbage


@dataclass
class Account:
    phone: JID
    lid: JID
    name: str
    keys: PhoneKeys
    auto_receipts: str | None = "delivered"
    about: str = ""  # the line under the name
    picture: str = ""  # path of the profile picture on the media server
    devices: dict[int, Device] = field(default_factory=dict)
    devices_made: int = 0
    sessions: dict[JID, list[Session]] = field(default_factory=dict)
    own_sender_keys: dict[str, SenderKey] = field(default_factory=dict)
    key_holders: dict[str, set[JID]] = field(default_factory=dict)
    sender_keys: dict[tuple[str, JID], SenderKey] = field(default_factory=dict)
    sent: dict[str, Sent] = field(default_factory=dict)

    @property
    def number(self) -> str:
        """E.164, with its plus sign."""
        return "+" + self.phone.user


@dataclass
class Group:
    id: str
    name: str
    members: list[str]  # lid users, the owner first

    @property
    def jid(self) -> JID:
        return JID(self.id, GROUP_SERVER)


@dataclass
class World:
    root: KeyPair
    static: KeyPair
    certificates: bytes
    accounts: dict[str, Account] = field(default_factory=dict)  # by lid user
    numbers: dict[str, str] = field(default_factory=dict)  # phone user to lid user
    groups: dict[str, Group] = field(default_factory=dict)
    ports: dict[str, int] = field(default_factory=dict)
    stanzas: int = 0
    clean: bool = False  # saved by an orderly stop, nothing happened since
    format: int = _FORMAT

    @classmethod
    def create(cls) -> World:
        root, static = KeyPair.generate(), KeyPair.generate()
        return cls(root, static, certificate_chain(root, static))

    def add_account(self, phone: str, name: str) -> Account:
        user = digits(phone)
        number = int.from_bytes(hashlib.sha256(user.encode()).digest()[:8], "big")
        lid = str(10**14 + number % (9 * 10**14))
        account = Account(JID(user), JID(lid, LID_SERVER), name, PhoneKeys.generate())
        self.accounts[lid] = account
        self.numbers[user] = lid
        return account

    def account(self, user: str) -> Account | None:
        """By the user part of a phone or LID address."""
        return self.accounts.get(self.numbers.get(user, user))

    def account_at(self, jid: JID | None) -> Account | None:
        return self.account(jid.user) if jid else None

    def device_at(self, jid: JID) -> Device | None:
        account = self.account(jid.user)
        return account.devices.get(jid.device) if account else None

    def devices(self) -> Iterator[Device]:
        return itertools.chain.from_iterable(a.devices.values() for a in self.accounts.values())

    def recover(self) -> None:
        """After a kill: the clients may know more than this file does.

        A ratchet step taken twice would look like a repeated message, which a client drops without a word, so
        every phone opens new sessions; one-time keys handed out since the last save are skipped.
        """
        for account in self.accounts.values():
            account.sessions.clear()
            account.own_sender_keys.clear()
            account.key_holders.clear()
            for device in account.devices.values():
                del device.one_time[:_KEYS_LOST_BY_KILL]
        self.stanzas += 10_000

    def next_stanza(self) -> int:
        self.stanzas += 1
        return self.stanzas


def save(world: World, path: Path, *, clean: bool) -> None:
    """Write the state so that a kill at any moment leaves the old file or the new one."""
    world.clean = clean
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        pickle.dump(world, file, protocol=pickle.HIGHEST_PROTOCOL)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def load(path: Path) -> World | None:
    """The saved state, or None when there is none. Raises ValueError when it is from another version."""
    if not path.exists():
        return None
    try:
        with path.open("rb") as file:
            world = pickle.load(file)  # noqa: S301 - our own file, in a folder of our own
    except (pickle.UnpicklingError, AttributeError, EOFError, ImportError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it to start with a new sandbox") from error
    if not isinstance(world, World) or world.format != _FORMAT:
        raise ValueError(f"{path} is from another version: delete it to start with a new sandbox")
    if not world.clean:
        world.recover()
    return world
