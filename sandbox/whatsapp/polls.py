"""Votes: encrypted for everybody who holds the poll's secret, opened by trying both address forms of who is concerned."""

from __future__ import annotations

import os
from collections.abc import Iterable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from sandbox.whatsapp import bodies
from sandbox.whatsapp.keys import derive
from sandbox.whatsapp.nodes import JID
from sandbox.whatsapp.protos import e2e

_USE = b"Poll Vote"


def _key(secret: bytes, poll_id: str, author: JID, voter: JID) -> tuple[bytes, bytes]:
    """(key, additional data), as `generateMsgSecretKey` in whatsmeow derives them."""
    info = poll_id.encode() + str(author.bare).encode() + str(voter.bare).encode() + _USE
    return derive(secret, None, info, 32), f"{poll_id}\0{voter.bare}".encode()


def seal(secret: bytes, poll_id: str, author: JID, voter: JID, options: Iterable[str]) -> tuple[bytes, bytes]:
    """(payload, iv) of a vote for these options; none of them takes the vote back."""
    key, extra = _key(secret, poll_id, author, voter)
    vote = e2e.PollVoteMessage(selectedOptions=[bodies.option_hash(option) for option in options])
    iv = os.urandom(12)
    return AESGCM(key).encrypt(iv, vote.SerializeToString(), extra), iv


def open_vote(
    secret: bytes, poll_id: str, authors: Iterable[JID], voters: Iterable[JID], payload: bytes, iv: bytes
) -> list[bytes]:
    """Hashes of the chosen options. Raises ValueError when no combination of the addresses opens it."""
    voters = list(voters)
    for author in authors:
        for voter in voters:
            key, extra = _key(secret, poll_id, author, voter)
            try:
                plain = AESGCM(key).decrypt(iv, payload, extra)
            except InvalidTag:
                continue
            return list(e2e.PollVoteMessage.FromString(plain).selectedOptions)
    raise ValueError("the vote does not belong to this poll")
