"""Every benchmark, in a short form, and its figures into docs/performance.md:

    python -m bench [--full] [--without NAME] [--no-page] [NAME …]

About five minutes; `--full` runs the minute of 1,000 messages, longer rounds, thirty sessions and five million messages,
about a quarter of an hour. Names given: only those, and the page is left alone. Everything ends by itself; a benchmark
that fails is named, and the others still run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path

from bench import (
    common,
    history,
    history_whatsapp,
    ingest,
    media_whatsapp,
    outbound,
    page,
    sessions,
    timeline,
    whatsapp,
)
from bench.common import Figure
from bench.rivals import __main__ as rivals

PAGE = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
Run = Callable[[list[str]], Awaitable[list[Figure]]]

BENCHES: dict[str, tuple[str, Run, str, str]] = {
    "ingest": ("Ingest: from the adapter to the commit", ingest.main, "--seconds 1.5 --rounds 3", "--seconds 3 --rounds 5"),
    "outbound": ("Queue, end to end, in thread order", outbound.main, "--items 10000", "--items 20000"),
    "rivals": (
        "Our queue beside others, everything waiting",
        rivals.main,
        "--rounds 1 --items 5000",
        "--rounds 3 --items 10000",
    ),
    "whatsapp": (
        "Through the real WhatsApp client",
        whatsapp.main,
        "--messages 250 --senders 100 --seconds 15 --outbound 100 --alone",
        "--messages 1000 --senders 100 --seconds 60 --outbound 300 --alone",
    ),
    "kills": (
        "The same while another session's child is being killed",
        whatsapp.main,
        "--messages 250 --senders 100 --seconds 15 --outbound 0 --kill-child",
        "--messages 1000 --senders 100 --seconds 60 --outbound 0 --kill-child",
    ),
    "webhook": (
        "Through /webhook, Baileys objects",
        whatsapp.main,
        "--messages 250 --senders 100 --seconds 15 --webhook",
        "--messages 1000 --senders 100 --seconds 60 --webhook",
    ),
    "history": ("Bulk import of history", history.main, "--rows 20000", "--rows 100000"),
    "phone": ("A phone's history after a pairing", history_whatsapp.main, "--messages 10000", "--messages 50000"),
    "media": ("Large files through the real client", media_whatsapp.main, "--rounds 1", "--rounds 3"),
    "timeline": (
        "Beside millions of messages",
        timeline.main,
        "--levels 100000 --rounds 2 --seconds 1",
        "--levels 1000000 5000000",
    ),
    "sessions": ("Sessions", sessions.main, "--sessions 1 10", "--sessions 1 10 30"),
}  # fmt: skip


async def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}")
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--no-page", action="store_true", help="print only")
    parser.add_argument(
        "--without", action="append", default=[], choices=BENCHES, metavar="NAME", help="leave it out"
    )
    options = parser.parse_args()
    if unknown := set(options.names) - set(BENCHES):
        parser.error(f"no benchmark is called {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    async with common.database(None) as url:
        machine = str(common.machine(await common.postgres_version(url)))
    sections: list[page.Section] = []
    failed: list[str] = []
    for name in [name for name in options.names or BENCHES if name not in options.without]:
        title, run, short, full = BENCHES[name]
        began = time.monotonic()
        try:
            found = await run((full if options.full else short).split())
        except Exception as caught:
            failed.append(name)
            error: BaseException = caught
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            reason = (str(error).splitlines() or [""])[0][:200]
            found = [common.figure("did not finish", f"{type(error).__name__}: {reason}")]
        sections.append((title, found))
        print(f"  ({name}: {time.monotonic() - began:.0f} s)", flush=True)
    if not options.names and not options.no_page:
        date = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
        command = "python -m bench" + (" --full" if options.full else "")
        command += "".join(f" --without {name}" for name in options.without)
        text = page.render(sections, date=date, machine=machine, command=command)
        PAGE.write_text(page.replace(PAGE.read_text(), text))
        print(f"written to {PAGE.name}", flush=True)
    if failed:
        print(f"did not finish: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    common.quiet()
    sys.exit(common.run(main()))
