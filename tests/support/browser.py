"""Chromium for tests of the console: pages that note every request they make and every complaint they have."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import zxingcpp
from PIL import Image
from playwright.async_api import Browser, BrowserContext, Page, async_playwright

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
PATIENCE = 30_000.0
"""Milliseconds that anything on a page may take."""
DESKTOP = {"width": 1280, "height": 820}
PHONE = {"width": 360, "height": 740}


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path="/usr/bin/chromium", args=list(FLAGS))
        try:
            yield browser
        finally:
            await browser.close()


@dataclass
class Desk:
    """One browser window at the console."""

    url: str
    context: BrowserContext
    page: Page
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    @classmethod
    async def open(cls, browser: Browser, url: str, **options: Any) -> Desk:
        settings: dict[str, Any] = {"viewport": DESKTOP, "timezone_id": "Asia/Kuala_Lumpur", **options}
        context = await browser.new_context(**settings)
        context.set_default_timeout(PATIENCE)
        page = await context.new_page()
        desk = cls(url, context, page)
        # The context's, so that a pop-up or a worker would be seen as well.
        context.on("request", lambda request: desk.requests.append(request.url))
        page.on("pageerror", lambda error: desk.complaints.append(str(error)))
        page.on(
            "console",
            lambda message: (
                desk.complaints.append(message.text) if "Content Security Policy" in message.text else None
            ),
        )
        return desk

    async def close(self) -> None:
        await self.context.close()
        here = urlsplit(self.url).netloc
        elsewhere = [url for url in self.requests if urlsplit(url).netloc != here]
        assert elsewhere == [], "the page asked another host"
        assert self.complaints == []

    async def sign_in(self, key: str) -> None:
        await self.page.goto(self.url + "/")
        await self.page.fill("#key", key)
        await self.page.click("text=Sign in")
        await self.page.wait_for_url("**/console**")

    async def live(self) -> None:
        """Until the page's stream has begun."""
        await self.page.wait_for_selector("#connection.live", state="attached")

    async def sees(self, text: str, inside: str = "main") -> None:
        await self.page.locator(inside).get_by_text(text).first.wait_for()

    async def read_qr(self) -> str:
        """What a camera reads off the page."""
        code = self.page.locator("#qr svg")
        await code.wait_for()
        picture = Image.open(io.BytesIO(await code.screenshot())).convert("L")
        found = zxingcpp.read_barcodes(picture)
        assert len(found) == 1, "no camera could read this code"
        return str(found[0].text)

    async def press(self, name: str) -> None:
        await self.page.get_by_role("button", name=name, exact=True).click()

    async def fits(self) -> bool:
        """Nothing sticks out to the side."""
        script = "document.documentElement.scrollWidth <= document.documentElement.clientWidth"
        return bool(await self.page.evaluate(script))
