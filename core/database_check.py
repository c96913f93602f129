"""Whether a server, a login and a schema keep the promises the gateway builds on: durability and walls.

Only reads catalogs; never changes anything. Every refusal says what to do.
"""

from __future__ import annotations

from typing import Any

from core.errors import DatabaseError, DatabaseRoleError

MINIMUM_VERSION = 15
WORKER_ROLE = "et_worker"
API_ROLE = "et_api"


async def check_server(conn: Any, *, allow_superuser: bool = False) -> None:
    """Raise DatabaseError for a server that is too old or may lose what it acknowledged, DatabaseRoleError for a
    login that walks through row-level security. Call it before migrating: it needs no schema.
    """
    row = await conn.fetchrow(
        """
        SELECT current_setting('server_version_num')::int / 10000 AS major,
               current_setting('server_version') AS version,
               current_setting('fsync') AS fsync,
               current_setting('synchronous_commit') AS synchronous_commit,
               pg_is_in_recovery() AS replica,
               current_setting('server_encoding') AS encoding,
               session_user::text AS login,
               current_database()::text AS database,
               r.rolsuper AS superuser,
               r.rolbypassrls AS bypasses
          FROM pg_catalog.pg_roles r
         WHERE r.rolname = session_user
        """
    )
    if row["major"] < MINIMUM_VERSION:
        raise DatabaseError(
            f"DATABASE_URL: PostgreSQL {row['version']} is too old; {MINIMUM_VERSION} or newer is needed"
        )
    for setting in ("fsync", "synchronous_commit"):
        if row[setting] == "off":
            raise DatabaseError(
                f"DATABASE_URL: the server runs with {setting} = off and may lose acknowledged messages; "
                f"turn it on (for this login, database and server) and start again"
            )
    if row["replica"]:
        raise DatabaseError("DATABASE_URL: this server is a read-only replica; give the primary's address")
    if row["encoding"] != "UTF8":
        raise DatabaseError(
            f"DATABASE_URL: the database's encoding is {row['encoding']}; create one with ENCODING 'UTF8'"
        )
    if not allow_superuser and (row["superuser"] or row["bypasses"]):
        what = "a superuser" if row["superuser"] else "a role with BYPASSRLS"
        raise DatabaseRoleError(
            f"DATABASE_URL: the login {row['login']} is {what} and would bypass the tenants' walls; "
            f"make one of its own: CREATE ROLE gateway LOGIN CREATEROLE PASSWORD '…'; "
            f'ALTER DATABASE "{row["database"]}" OWNER TO gateway'
        )


async def check_roles(conn: Any) -> None:
    """Raise DatabaseRoleError unless both roles exist, this login may become them, and neither bypasses a policy."""
    major = conn.get_server_version().major
    # Before 16 a member could always SET ROLE; since then the membership itself says so.
    may_set = "SET" if major >= 16 else "MEMBER"
    rows = {
        row["rolname"]: row
        for row in await conn.fetch(
            """
            SELECT rolname::text, rolsuper, rolbypassrls,
                   pg_has_role(session_user, oid, $1) AS may_set
              FROM pg_catalog.pg_roles
             WHERE rolname = ANY($2)
            """,
            may_set,
            [WORKER_ROLE, API_ROLE],
        )
    }
    login = await conn.fetchval("SELECT session_user::text")
    for role in (WORKER_ROLE, API_ROLE):
        row = rows.get(role)
        if row is None:
            raise DatabaseRoleError(
                f"the role {role} does not exist: run `python -m gateway migrate` with a login that may create roles"
            )
        if row["rolsuper"] or row["rolbypassrls"]:
            raise DatabaseRoleError(
                f"the role {role} bypasses row-level security: ALTER ROLE {role} NOSUPERUSER NOBYPASSRLS"
            )
        if not row["may_set"]:
            with_set = " WITH SET TRUE" if major >= 16 else ""
            raise DatabaseRoleError(
                f'the login {login} may not act as {role}: GRANT {role} TO "{login}"{with_set}'
            )
    if await conn.fetchval(f"SELECT pg_has_role('{API_ROLE}', '{WORKER_ROLE}', 'MEMBER')"):
        raise DatabaseRoleError(
            f"the role {API_ROLE} is a member of {WORKER_ROLE}, so its policies are worth nothing: "
            f"REVOKE {WORKER_ROLE} FROM {API_ROLE} (and from what it belongs to)"
        )
    await _check_policies(conn)


async def _check_policies(conn: Any) -> None:
    """Every tenant-owned table that the API role can touch must force its policies, on the owner too."""
    rows = await conn.fetch(
        """
        SELECT c.relname::text AS name,
               c.relrowsecurity AND c.relforcerowsecurity AS walled,
               has_table_privilege($1, c.oid, 'SELECT, INSERT, UPDATE, DELETE') AS reachable
          FROM pg_catalog.pg_class c
          JOIN pg_catalog.pg_attribute a ON a.attrelid = c.oid AND a.attname = 'tenant_id' AND NOT a.attisdropped
         WHERE c.relkind IN ('r', 'p')
           AND starts_with(c.relname::text, 'et_')
           AND pg_table_is_visible(c.oid)
         ORDER BY c.relname
        """,
        API_ROLE,
    )
    names = {row["name"] for row in rows}
    if "et_messages" not in names:
        raise DatabaseRoleError("the schema is missing in this database: run `python -m gateway migrate`")
    open_tables = [row["name"] for row in rows if row["reachable"] and not row["walled"]]
    if open_tables:
        raise DatabaseRoleError(
            f"row-level security is not forced on {', '.join(open_tables)}: "
            "ALTER TABLE … ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY"
        )
