"""The HTTP side: one module per resource over one route table. It reads and writes rows; it never calls a channel
except through what a live session offers, and never speaks SQL itself (that stands in `core.store`)."""

from gateway.api.app import all_routes, make_app
from gateway.api.auth import ensure_platform_key
from gateway.api.server import Runner
from gateway.api.services import Limits, Services
from gateway.api.spool import WebhookSpool

__all__ = ["Limits", "Runner", "Services", "WebhookSpool", "all_routes", "ensure_platform_key", "make_app"]
