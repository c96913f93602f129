"""The command line: `python -m gateway [serve|migrate|demo|tenant|key|session|import|doctor]`; `serve` when nothing is said.

Each command parses, calls one function and prints; an error of ours is one line on stderr and exit code 1.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Coroutine
from typing import Any, BinaryIO, TypeVar

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
    type=click.Choice(["worker", "child", "receipts", "mail", "telegram"]),
    help="Switch a part off, to see that --check notices.",
)
def demo(check: bool, without: tuple[str, ...]) -> None:
    """The whole product on this machine: embedded database, sandboxes of all three channels, a tenant and customers."""
    from gateway.commands import demo as story

    sys.exit(run(story.run(check=check, without=without)))


@main.command()
@click.option(
    "--legacy", is_flag=True, help="Also copy et_conversation_threads and et_chat_messages as history."
)
def migrate(legacy: bool) -> None:
    """Bring the database's schema up to date; the gateway does the same when it starts."""
    from gateway.commands import admin

    config = settings.load()
    log.configure("warning", stream=sys.stderr)
    applied = run(admin.apply_migrations(config))
    for name in applied:
        click.echo(f"applied {name}")
    if not applied:
        click.echo("the schema is up to date")
    if legacy:
        click.echo(str(run(admin.copy_legacy(config))))


@main.group()
def tenant() -> None:
    """Tenants: the businesses behind walls of their own."""


@tenant.command("create")
@click.argument("name")
def tenant_create(name: str) -> None:
    """Make a tenant; prints its id."""
    click.echo(_administer("create_tenant", name))


@tenant.command("list")
def tenant_list() -> None:
    """Id, status and name of each tenant."""
    for row in _administer("list_tenants"):
        click.echo(f"{row['id']}\t{row['status']}\t{row['name']}")


@main.group()
def key() -> None:
    """API keys: of one tenant, or of the platform."""


@key.command("create")
@click.option("--tenant", "tenant_id", type=int, help="The tenant's id; left out: a platform key.")
@click.option("--name", default="command line", show_default=True)
@click.option("--scopes", default="send,sessions,read,admin", show_default=True, help="Comma-separated.")
def key_create(tenant_id: int | None, name: str, scopes: str) -> None:
    """Make a key and print it, this once."""
    wanted = [scope.strip() for scope in scopes.split(",") if scope.strip()]
    if not wanted or not set(wanted) <= {"send", "sessions", "read", "admin"}:
        raise click.BadParameter("choose from send, sessions, read, admin", param_hint="--scopes")
    click.echo(_administer("create_key", tenant_id, name, wanted))


@key.command("list")
@click.option("--tenant", "tenant_id", type=int, help="The tenant's id; left out: the platform's keys.")
def key_list(tenant_id: int | None) -> None:
    """Id, prefix, scopes and name of each key."""
    for row in _administer("list_keys", tenant_id):
        revoked = "\trevoked" if row["revoked_at"] else ""
        click.echo(f"{row['id']}\t{row['prefix']}\t{','.join(row['scopes'])}\t{row['name']}{revoked}")


@key.command("revoke")
@click.argument("key_id", type=int)
def key_revoke(key_id: int) -> None:
    """A revoked key is refused within two seconds."""
    _administer("revoke_key", key_id)
    click.echo(f"key {key_id} is revoked")


@main.group()
def session() -> None:
    """Channel sessions: a running gateway acts on what is wanted."""


@session.command("list")
@click.argument("tenant_id", type=int)
def session_list(tenant_id: int) -> None:
    """Id, channel, identifier, status and reason of each session."""
    for row in _administer("list_sessions", tenant_id):
        reason = f" ({row.status_reason})" if row.status_reason else ""
        click.echo(f"{row.id}\t{row.channel_type}\t{row.identifier}\t{row.status}{reason}")


_CREDENTIALS = click.option(
    "--credentials",
    "file",
    type=click.File("rb"),
    help="A JSON file of them, - for standard input; left out: they are asked for. Never on the command line.",
)


@session.command("add")
@click.argument("tenant_id", type=int)
@click.argument("channel")
@click.option("--name", help="What you call it; customers do not see it.")
@click.option("--workspace", "workspace_id", type=int, help="Where new contacts go; its agent answers them.")
@click.option("--connect", is_flag=True, help="Want it live at once.")
@_CREDENTIALS
def session_add(
    tenant_id: int,
    channel: str,
    name: str | None,
    workspace_id: int | None,
    connect: bool,
    file: BinaryIO | None,
) -> None:
    """Add a session of CHANNEL (whatsapp, email, telegram); prints its id.

    Credentials are checked by logging in once, and kept encrypted. A WhatsApp number is linked with its phone afterwards,
    in the console.
    """
    from gateway.commands import admin, asking

    kind = admin.channel_kind(settings.load(), channel)
    given = asking.credentials(kind, file)
    row = _administer(
        "add_session", tenant_id, channel, given, name=name, workspace_id=workspace_id, connect=connect
    )
    if kind.check_credentials is None:
        click.echo(
            f"session {row.id}: link it with its phone in the console, or GET /sessions/{tenant_id}/{row.id}/qr"
        )
        return
    after = "" if connect else f"; start it with `python -m gateway session connect {row.id}`"
    click.echo(f"session {row.id}: {row.identifier} was accepted{after}")


@session.command("credentials")
@click.argument("session_id", type=int)
@_CREDENTIALS
def session_credentials(session_id: int, file: BinaryIO | None) -> None:
    """Give a session new credentials: all of them, of the same account. They are checked first."""
    from gateway.commands import admin, asking

    row = _administer("session_of", session_id)
    given = asking.credentials(admin.channel_kind(settings.load(), row.channel_type), file)
    row = _administer("change_credentials", session_id, given)
    click.echo(f"session {session_id}: the new credentials of {row.identifier} were accepted")


@session.command("connect")
@click.argument("session_id", type=int)
def session_connect(session_id: int) -> None:
    """Want this session live."""
    _administer("want_session", session_id, "connected")


@session.command("disconnect")
@click.argument("session_id", type=int)
def session_disconnect(session_id: int) -> None:
    """Want this session down; it stays paired."""
    _administer("want_session", session_id, "disconnected")


@main.command("import")
@click.option(
    "--session", "session_id", type=int, required=True, help="Whose history it is: the session's id."
)
@click.argument("file", type=click.File("rb"))
def import_history(session_id: int, file: BinaryIO) -> None:
    """Import history from FILE, JSON lines; - is standard input.

    Exit code 1 when lines were wrong. A repeat stores nothing twice.
    """
    from gateway.commands import importing

    log.configure("error", stream=sys.stderr)
    sys.exit(run(importing.run(settings.load(), session_id, file)))


@main.command()
def doctor() -> None:
    """Check every part and say what to mend. Exit code 1 when something must be mended."""
    from gateway.commands import doctor as checks

    log.configure("error", stream=sys.stderr)
    sys.exit(run(checks.run(settings.load())))


def _administer(function: str, *args: Any, **named: Any) -> Any:
    from gateway.commands import admin

    log.configure("error", stream=sys.stderr)
    return run(getattr(admin, function)(settings.load(), *args, **named))


if __name__ == "__main__":
    main()
