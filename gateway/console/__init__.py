"""The console: the pages a person uses in a browser. Reads and writes rows; never calls a channel, never the API."""

from gateway.console.access import Principal, SignInRefused
from gateway.console.app import install

__all__ = ["Principal", "SignInRefused", "install"]
