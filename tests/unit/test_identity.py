"""One address, one external id."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.errors import Invalid
from core.identity import address_of, channel_of, checked, external_id, kind_of, phone_e164


@pytest.mark.parametrize(
    "text",
    [
        "60123456789",
        "+60123456789",
        " +60 12-345 6789 ",
        "+60 (0)12 345.6789",
        "0060123456789",
        "+60(12)3456789",
        "tel:+60-12-345-6789",
        "＋６０１２３４５６７８９",
        "+60\u00a012\u2011345\u20116789",
    ],
)
def test_every_way_of_writing_a_number_is_one_number(text: str) -> None:
    assert phone_e164(text) == "+60123456789"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("+", "empty"),
        ("0123456789", "no country code"),
        ("+60", "7 to 15 digits"),
        ("+6012345678901234", "7 to 15 digits"),
        ("+60 12 CALL ME", "not a digit"),
        ("++60123456789", "not a digit"),
        ("٠٦٠١٢٣٤٥٦٧٨٩", "not a digit"),
    ],
)
def test_a_bad_number_says_what_is_allowed(text: str, says: str) -> None:
    with pytest.raises(Invalid, match=says) as caught:
        phone_e164(text)
    assert "+60123456789" in caught.value.detail


def test_digits_of_a_number_are_never_rewritten() -> None:
    # Mexican mobiles exist with and without the 1 on WhatsApp: two different people to the channel.
    assert phone_e164("5215512345678") == "+5215512345678"
    assert phone_e164("525512345678") == "+525512345678"


@pytest.mark.parametrize(
    ("channel", "address", "expected"),
    [
        ("whatsapp", "60123456789", "whatsapp:+60123456789"),
        ("whatsapp", "+60 12-345 6789", "whatsapp:+60123456789"),
        ("whatsapp", "whatsapp:+60123456789", "whatsapp:+60123456789"),
        ("whatsapp", "60123456789@s.whatsapp.net", "whatsapp:+60123456789"),
        ("whatsapp", "60123456789:12@s.whatsapp.net", "whatsapp:+60123456789"),
        ("whatsapp", "60123456789.0:12@s.whatsapp.net", "whatsapp:+60123456789"),
        ("whatsapp", "60123456789@c.us", "whatsapp:+60123456789"),
        ("whatsapp", "100000000000002@lid", "whatsapp-lid:100000000000002"),
        ("whatsapp", "100000000000002:7@lid", "whatsapp-lid:100000000000002"),
        ("whatsapp", "whatsapp-lid:100000000000002", "whatsapp-lid:100000000000002"),
        ("whatsapp", "120363000000000000@g.us", "whatsapp-group:120363000000000000@g.us"),
        ("whatsapp", "60123456789-1400000000@g.us", "whatsapp-group:60123456789-1400000000@g.us"),
        ("whatsapp", "whatsapp-group:120363000000000000@g.us", "whatsapp-group:120363000000000000@g.us"),
        ("email", "John.Doe+tag@Example.COM", "email:john.doe+tag@example.com"),
        ("email", "email:john@example.com", "email:john@example.com"),
        ("email", "mailto:john@example.com", "email:john@example.com"),
        ("email", "john@bücher.de", "email:john@xn--bcher-kva.de"),
        ("email", "root@localhost", "email:root@localhost"),
        ("telegram", "123", "telegram:123"),
        ("telegram", "telegram:123", "telegram:123"),
        ("telegram", "-1001234567890", "telegram:-1001234567890"),
        ("discord", "123456", "discord:123456"),
        ("discord", "discord:123456", "discord:123456"),
    ],
)
def test_a_bare_address_becomes_its_external_id(channel: str, address: str, expected: str) -> None:
    assert external_id(channel, address) == expected
    assert checked(expected) == expected


@pytest.mark.parametrize(
    ("channel", "address", "allowed"),
    [
        ("whatsapp", "john@example.com", "country code"),
        ("whatsapp", "status@broadcast", "country code"),
        ("whatsapp", "1234567@newsletter", "country code"),
        ("whatsapp", "0@s.whatsapp.net", "country code"),
        ("whatsapp", "whatsapp-lid:me", "country code"),
        ("whatsapp", "whatsapp-group:60123456789", "group id"),
        ("whatsapp", "", "country code"),
        ("email", "+60123456789", "john@example.com"),
        ("email", "john@", "john@example.com"),
        ("email", "a@b@c.de", "john@example.com"),
        ("email", "john doe@example.com", "john@example.com"),
        ("email", "john@example..com", "john@example.com"),
        ("email", "john@example.com\nbcc: all@example.com", "john@example.com"),
        ("email", "x" * 65 + "@example.com", "john@example.com"),
        ("telegram", "@my_bot", "numeric"),
        ("telegram", "0", "numeric"),
        ("telegram", "12.5", "numeric"),
        ("Bad Channel", "1", "address"),
        ("discord", "", "address"),
        ("email", "\x00@example.com", "john@example.com"),
    ],
)
def test_a_bad_address_is_refused_with_what_is_allowed(channel: str, address: str, allowed: str) -> None:
    with pytest.raises(Invalid, match=allowed):
        external_id(channel, address)


@pytest.mark.parametrize(
    ("external", "address", "kind"),
    [
        ("whatsapp:+60123456789", "+60123456789", "person"),
        ("whatsapp-lid:100000000000002", "100000000000002@lid", "person"),
        ("whatsapp-group:120363000000000000@g.us", "120363000000000000@g.us", "group"),
        ("email:john@example.com", "john@example.com", "person"),
        ("telegram:123", "telegram:123", "person"),
        ("telegram:-100123", "telegram:-100123", "group"),
        ("discord:5", "discord:5", "person"),
    ],
)
def test_addresses_and_external_ids_are_two_ways_of_one(external: str, address: str, kind: str) -> None:
    assert address_of(external) == address
    assert external_id(channel_of(external), address) == external
    assert kind_of(external) == kind


@pytest.mark.parametrize(
    "text", ["", "whatsapp", "whatsapp:", ":x", "whatsapp-web:1", "email-lid:1", "+60123456789"]
)
def test_what_is_no_external_id_is_refused(text: str) -> None:
    with pytest.raises(Invalid, match="external id"):
        channel_of(text)


@given(st.sampled_from(["whatsapp", "email", "telegram", "discord"]), st.text(max_size=40))
def test_normalising_twice_changes_nothing(channel: str, text: str) -> None:
    try:
        once = external_id(channel, text)
    except Invalid:
        return
    assert external_id(channel, once) == once
    assert external_id(channel_of(once), address_of(once)) == once


@given(st.from_regex(r"\A[1-9][0-9]{6,14}(:[0-9]{1,2})?@s\.whatsapp\.net\Z"))
def test_every_phone_jid_is_a_phone(jid: str) -> None:
    external = external_id("whatsapp", jid)
    assert external == "whatsapp:+" + jid.partition("@")[0].partition(":")[0]
    assert external_id("whatsapp", address_of(external)) == checked(external) == external
