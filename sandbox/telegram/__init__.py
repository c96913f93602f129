"""A Bot API server on loopback, with people who write to bots and read what bots write: for tests and the demo.

Never talks to another machine. `TelegramSandbox` is the way in; see docs/sandbox.md.
"""

from sandbox.telegram.sandbox import TelegramSandbox

__all__ = ["TelegramSandbox"]
