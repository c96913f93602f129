"""The command line: `python -m gateway [serve|migrate|demo|tenant|key|session|doctor]`; `serve` when nothing is said.

Each command parses, calls one function and prints; an error of ours is one line on stderr and exit code 1.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, TypeVar

import click

from core import faults, log, settings
from core.errors import GatewayError

T = TypeVar("T")


class _OneLine(click.Group):
    """Errors that are meant for a person end the command with their one line."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except GatewayError as error:
            raise click.ClickException(error.detail) from None


def run(work: Coroutine[Any, Any, T]) -> T:
    """Run on uvloop, in the main thread: children ask to die with the thread that made them."""
    if sys.platform == "win32":
        return asyncio.run(work)
    import uvloop

    return uvloop.run(work)


@click.group(cls=_OneLine, invoke_without_command=True, context_settings={"max_content_width": 110})
@click.version_option(package_name="channel-gateway")
@click.pass_context
def main(ctx: click.Context) -> None:
    """channel-gateway: customers on WhatsApp, email and Telegram; messages in PostgreSQL."""
    if ctx.invoked_subcommand is None:
        ctx.invoke(serve)


@main.command()
def serve() -> None:
    """Run the gateway until Ctrl-C or SIGTERM."""
    from gateway import app

    faults.arm_from_environment()
    config = settings.load()
    log.configure(config.log_level)
    run(app.serve(config))


@main.command()
@click.option(
    "--check", is_flag=True, help="Run the story unattended; exit 0 when every step was seen, else 1."
)
@click.option(
    "--without",
    multiple=True,
    type=click.Choice(["worker", "child", "receipts"]),
    help="Switch a part off, to see that --check notices.",
)
def demo(check: bool, without: tuple[str, ...]) -> None:
    """The whole product on this machine: embedded database, WhatsApp sandbox, a tenant and a customer."""
    from gateway.commands import demo as story

    sys.exit(run(story.run(check=check, without=without)))


if __name__ == "__main__":
    main()
