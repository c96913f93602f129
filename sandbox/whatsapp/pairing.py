"""Linking a client to a phone: by the QR code the phone scans, or by the code its owner types."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import secrets
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandbox.whatsapp.hub import Hub
from sandbox.whatsapp.keys import KeyPair, agree, derive, mac, sign, verify
from sandbox.whatsapp.nodes import SERVER, Content, Node
from sandbox.whatsapp.protos import adv
from sandbox.whatsapp.world import Account, Device, message_id

if TYPE_CHECKING:
    from sandbox.whatsapp.connection import Connection

_CODE_ROUNDS = 1 << 17
_CODE_LIMIT = 15.0  # seconds the client may take to finish a pairing by code


class PairingRefused(Exception):
    """The client did not accept the pairing, or there is nothing to pair with any more."""


@dataclass
class _Offer:
    connection: Connection
    refs: list[str]


@dataclass
class _CodeOffer:
    connection: Connection
    ref: bytes
    wrapped: bytes
    finished: asyncio.Future[tuple[bytes, bytes]]


class PairingDesk:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub
        self._offers: dict[bytes, _Offer] = {}
        self._codes: dict[str, _CodeOffer] = {}

    async def offer(self, connection: Connection) -> None:
        """Give a new client its references, and close on it when nobody uses one in time."""
        terms = self._hub.terms
        refs = ["2@" + secrets.token_urlsafe(60) for _ in range(terms.refs)]
        self._offers[connection.noise] = _Offer(connection, refs)
        nodes = [Node("ref", {}, ref.encode()) for ref in refs]
        attrs = {"from": SERVER, "type": "set", "xmlns": "md"}
        try:
            await connection.ask(Node("iq", attrs, [Node("pair-device", {}, nodes)]))
        except ConnectionError:
            return
        await asyncio.sleep(terms.lifetime)
        if self._offers.get(connection.noise) is not None:
            self.withdraw(connection)
            await connection.close()

    def withdraw(self, connection: Connection) -> None:
        offer = self._offers.get(connection.noise)
        if offer is not None and offer.connection is connection:
            del self._offers[connection.noise]
        self._codes = {u: c for u, c in self._codes.items() if c.connection is not connection}

    # --- QR ---

    async def scan(self, qr: str, account: Account) -> Device:
        """What a phone does with the text of a QR code. Raises PairingRefused."""
        try:
            ref, noise, identity, secret = qr.rpartition("#")[2].split(",")[:4]
            noise_key = base64.b64decode(noise)
            identity_key, adv_secret = base64.b64decode(identity), base64.b64decode(secret)
        except ValueError as error:
            raise PairingRefused("this is not the text of a WhatsApp QR code") from error
        offer = self._offers.get(noise_key)
        if offer is None or ref not in offer.refs:
            raise PairingRefused("the QR code has expired, or its client is gone: show a new one")
        return await self._pair(offer.connection, account, identity_key, adv_secret)

    # --- phone code ---

    def link_code(self, connection: Connection, node: Node) -> Content:
        """The server's half of pairing by code."""
        if node.text("stage") == "companion_hello":
            jid = node.jid("jid")
            user = jid.user if jid else ""
            ref = secrets.token_bytes(12)
            wrapped = node.get("link_code_pairing_wrapped_companion_ephemeral_pub").data
            finished: asyncio.Future[tuple[bytes, bytes]] = asyncio.get_running_loop().create_future()
            self._codes[user] = _CodeOffer(connection, ref, wrapped, finished)
            hello = Node("link_code_companion_reg", {"stage": "companion_hello"})
            hello.content = [Node("link_code_pairing_ref", {}, ref)]
            return [hello]
        for offer in self._codes.values():
            if offer.connection is connection and not offer.finished.done():
                bundle = node.get("link_code_pairing_wrapped_key_bundle").data
                offer.finished.set_result((bundle, node.get("companion_identity_public").data))
        return None

    async def enter_code(self, code: str, account: Account) -> Device:
        """What a phone does with the eight characters. Raises PairingRefused."""
        offer = self._codes.get(account.phone.user)
        if offer is None:
            raise PairingRefused(f"nobody asked for a code for {account.number}")
        phone = account.keys.identity
        companion = _code_cipher(code, offer.wrapped[:32], offer.wrapped[32:48], offer.wrapped[48:80])
        ephemeral, salt, iv = KeyPair.generate(), os.urandom(32), os.urandom(16)
        wrapped = salt + iv + _code_cipher(code, salt, iv, ephemeral.public)
        registration = Node("link_code_companion_reg", {"stage": "primary_hello"})
        registration.content = [
            Node("link_code_pairing_wrapped_primary_ephemeral_pub", {}, wrapped),
            Node("primary_identity_pub", {}, phone.public),
            Node("link_code_pairing_ref", {}, offer.ref),
        ]
        attrs = {"from": SERVER, "type": "link_code_companion_reg", "id": message_id(), "t": int(time.time())}
        offer.connection.send(Node("notification", attrs, [registration]))
        try:
            async with asyncio.timeout(_CODE_LIMIT):
                bundle, identity = await offer.finished
        except TimeoutError as error:
            raise PairingRefused("the client did not answer: the code is wrong or too old") from error
        shared = agree(ephemeral.private, companion)
        key = derive(shared, bundle[:32], b"link_code_pairing_key_bundle_encryption_key", 32)
        plain = AESGCM(key).decrypt(bundle[32:44], bundle[44:], None)
        if plain[:32] != identity or plain[32:64] != phone.public:
            raise PairingRefused("the client's key bundle is not about this pairing")
        secret = shared + agree(phone.private, identity) + plain[64:]
        return await self._pair(offer.connection, account, identity, derive(secret, None, b"adv_secret", 32))

    # --- both ---

    async def _pair(self, connection: Connection, account: Account, identity: bytes, secret: bytes) -> Device:
        account.devices_made += 1
        number, phone = account.devices_made, account.keys.identity
        details = adv.ADVDeviceIdentity(
            rawID=secrets.randbelow(1 << 31), timestamp=int(time.time()), keyIndex=number
        ).SerializeToString()
        signed = adv.ADVSignedDeviceIdentity(
            details=details,
            accountSignatureKey=phone.public,
            accountSignature=sign(phone.private, b"\6\0" + details + identity),
        ).SerializeToString()
        container = adv.ADVSignedDeviceIdentityHMAC(
            details=signed, HMAC=mac(secret, signed)
        ).SerializeToString()
        device = Device(
            account.phone.of_device(number), account.lid.of_device(number), connection.noise, identity
        )
        success = Node("pair-success", {})
        success.content = [
            Node("device-identity", {}, container),
            Node("biz", {"name": ""}),
            Node("device", {"jid": device.jid, "lid": device.lid}),
            Node("platform", {"name": "android"}),
        ]
        attrs = {"from": SERVER, "type": "set", "xmlns": "md", "t": int(time.time())}
        try:
            answer = await connection.ask(Node("iq", attrs, [success]))
        except (TimeoutError, ConnectionError) as error:
            raise PairingRefused("the client went away while pairing") from error
        if answer.text("type") == "error":
            error_node = answer.find("error") or Node("error")
            raise PairingRefused(f"the client refused: {error_node.text('code')} {error_node.text('text')}")
        reply = adv.ADVSignedDeviceIdentity.FromString(answer.get("pair-device-sign", "device-identity").data)
        if not verify(identity, b"\6\1" + details + identity + phone.public, reply.deviceSignature):
            raise PairingRefused("the client's device signature is wrong")
        account.devices[number] = device
        self.withdraw(connection)
        self._hub.changed()
        self.announce(account)
        self._hub.phone_of(account).linked(device)
        # The client logs in again, as the device it has become.
        self._hub.spawn(connection.last_words(Node("stream:error", {"code": "515"})))
        return device

    def forget(self, account: Account, device: Device) -> None:
        """The device is no longer linked; what waited for it is gone."""
        account.devices.pop(device.number, None)
        self._hub.faults.silent.pop(device.jid, None)
        self._hub.changed()
        self.announce(account)

    def announce(self, account: Account) -> None:
        """Tell clients that this account's devices changed; a wrong hash makes them ask for the list."""
        for jid, connection in self._hub.post.online.items():
            if jid.user == account.phone.user and jid.device not in account.devices:
                continue
            for own, other in ((account.lid, None), (account.phone, account.lid)):
                change = Node(
                    "add", {"device_hash": "2:changed"}, [Node("device", {"jid": own.of_device(1)})]
                )
                attrs = {
                    "from": own,
                    "lid": other,
                    "type": "devices",
                    "id": message_id(),
                    "t": int(time.time()),
                }
                connection.send(Node("notification", attrs, [change]))


def _code_cipher(code: str, salt: bytes, iv: bytes, data: bytes) -> bytes:
    typed = code.replace("-", "").upper().encode()
    key = hashlib.pbkdf2_hmac("sha256", typed, salt, _CODE_ROUNDS, 32)
    return Cipher(algorithms.AES(key), modes.CTR(iv)).encryptor().update(data)
