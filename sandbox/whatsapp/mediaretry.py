"""The talk between a client and its phone about a medium that the server has dropped. Pure, but for the upload."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Literal

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandbox.whatsapp.keys import derive
from sandbox.whatsapp.nodes import Attribute, Node
from sandbox.whatsapp.protos import mms_retry

Answer = Literal["yes", "no", "never"]
"""`yes`: put it back when the phone has it; `no`: say that it is gone; `never`: silence."""

_INFO = b"WhatsApp Media Retry Notification"
_NOT_FOUND = 2


def seal(media_key: bytes, message_id: str, plain: bytes) -> Node:
    iv = os.urandom(12)
    key = derive(media_key, None, _INFO, 32)
    cipher = AESGCM(key).encrypt(iv, plain, message_id.encode())
    return Node("encrypt", {}, [Node("enc_p", {}, cipher), Node("enc_iv", {}, iv)])


def unseal(media_key: bytes, message_id: str, node: Node) -> bytes:
    """Raises ValueError when it was made with another medium's key."""
    key = derive(media_key, None, _INFO, 32)
    try:
        return AESGCM(key).decrypt(node.get("enc_iv").data, node.get("enc_p").data, message_id.encode())
    except InvalidTag as error:
        raise ValueError("the request belongs to another medium") from error


def request(media_key: bytes, message_id: str, rmr: dict[str, Attribute]) -> list[Node]:
    """What a client puts into its `server-error` receipt."""
    plain = mms_retry.ServerErrorReceipt(stanzaID=message_id).SerializeToString()
    return [seal(media_key, message_id, plain), Node("rmr", rmr)]


def answer(
    receipt: Node, media_key: bytes, how: Answer, upload: Callable[[], str | None]
) -> tuple[Node | None, str]:
    """(the notification, or None for silence; what was answered, for the record)."""
    message_id = receipt.text("id")
    try:
        plain = unseal(media_key, message_id, receipt.get("encrypt"))
        if mms_retry.ServerErrorReceipt.FromString(plain).stanzaID != message_id:
            return None, "ignored: it names another message"
    except ValueError as error:
        return None, f"ignored: {error}"
    if how == "never":
        return None, "never"
    path = upload() if how == "yes" else None
    attrs: dict[str, Attribute] = {"id": message_id, "type": "mediaretry"}
    rmr = Node("rmr", dict(receipt.get("rmr").attrs))
    if path is None:
        return Node("notification", attrs, [rmr, Node("error", {"code": _NOT_FOUND})]), "gone"
    notice = mms_retry.MediaRetryNotification(
        stanzaID=message_id, directPath=path, result=mms_retry.MediaRetryNotification.SUCCESS
    )
    sealed = seal(media_key, message_id, notice.SerializeToString())
    return Node("notification", attrs, [rmr, sealed]), path
