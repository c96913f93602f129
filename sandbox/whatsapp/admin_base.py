"""What every part of the admin API needs: finding people, devices and groups, reading bodies, describing things."""

from __future__ import annotations

from typing import Any, TypeVar

from aiohttp import web
from pydantic import ValidationError

from sandbox.whatsapp import reading, requests
from sandbox.whatsapp.phone import Phone, Received
from sandbox.whatsapp.sandbox import WhatsAppSandbox
from sandbox.whatsapp.world import Device, Group, digits

LONGEST_POLL = 60.0

_Model = TypeVar("_Model", bound=requests.Body)


class AdminBase:
    def __init__(self, wa: WhatsAppSandbox) -> None:
        self._wa = wa

    def _named(self, number: str) -> Phone:
        wanted = "+" + digits(number)
        for phone in self._wa.people:
            if phone.number == wanted:
                return phone
        raise web.HTTPNotFound(text=f"nobody here has the number {wanted}: POST /people first")

    def _person(self, request: web.Request) -> Phone:
        return self._named(request.match_info["number"])

    def _device(self, request: web.Request) -> Device:
        phone = self._person(request)
        try:
            return phone.account.devices[int(request.match_info["device"])]
        except (KeyError, ValueError):
            numbers = ", ".join(map(str, phone.account.devices)) or "none"
            raise web.HTTPNotFound(
                text=f"{phone.number} has no such linked device; it has: {numbers}"
            ) from None

    def _group(self, group_id: str) -> Group:
        for group in self._wa.groups:
            if group_id in (group.id, str(group.jid)):
                return group
        raise web.HTTPNotFound(text=f"there is no group {group_id}")

    def _describe(self, phone: Phone) -> dict[str, Any]:
        devices = [
            {
                "device": device.number,
                "jid": str(device.jid),
                "online": self._wa.is_online(device),
                "waiting": len(device.mailbox.waiting),
            }
            for device in phone.devices
        ]
        return {
            "number": phone.number,
            "name": phone.name,
            "lid": phone.lid,
            "auto_receipts": phone.auto_receipts,
            "devices": devices,
            "received": len(phone.received),
        }


def describe_group(group: Group) -> dict[str, Any]:
    return {"id": group.id, "name": group.name, "members": group.members}


def describe_message(message: Received) -> dict[str, Any]:
    found = reading.media_of(message.message)
    return {
        "id": message.id,
        "from": message.sender,
        "chat": message.chat,
        "kind": message.kind,
        "text": message.text,
        "about": message.about,
        "media": found[0] if found else None,
        "from_me": message.from_me,
        "duplicate": message.duplicate,
        "at": message.at,
    }


def number_of(request: web.Request, name: str) -> float:
    try:
        return max(0.0, float(request.query.get(name, "0")))
    except ValueError:
        raise web.HTTPUnprocessableEntity(text=f"`{name}` is not a number") from None


async def read(request: web.Request, model: type[_Model]) -> _Model:
    try:
        return model.model_validate_json(await request.read() or b"{}")
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
        raise web.HTTPUnprocessableEntity(text=problems) from None
