"""Debian's Chromium, driven by Playwright, where it is installed; what a page asks; what axe says of it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from tests.harness import checkpoints

CHROMIUM = shutil.which("chromium")
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason="Chromium isn't installed (Debian: apt-get install chromium)"
)
# What axe calls a fault that keeps people out.
GRAVE = ("serious", "critical")
WIDTHS = (400, 900, 1600)
# Markup that would say so if anything took it for markup.
HOSTILE = "<img src=x onerror=window.taken=1>"


@contextmanager
def chromium() -> Iterator[Browser]:
    """Start the browser; no name but this machine's leads anywhere."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=["--no-sandbox", "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"],
        )
        try:
            yield browser
        finally:
            browser.close()


class Visit:
    """One visitor's page at `/ui`, and everything that it asks and says."""

    def __init__(self, browser: Browser, url: str, **options: Any) -> None:
        """Open nothing yet; `options` are those of Playwright's contexts."""
        self.url = url
        self.context = browser.new_context(**{"viewport": {"width": 1600, "height": 1000}, **options})
        self.page: Page = self.context.new_page()
        self.asked: list[str] = []
        self.failures: list[str] = []
        self.context.on("request", lambda request: self.asked.append(request.url))
        self.page.on("pageerror", lambda error: self.failures.append(str(error)))

    def enter(self, secret: str, view: str = "models") -> Page:
        """Open a view, and answer the question for a key."""
        self.page.goto(f"{self.url}/ui#{view}")
        self.page.get_by_label("Key").fill(secret)
        self.page.get_by_role("button", name="Go on").click()
        self.page.get_by_label("Key").wait_for(state="detached")
        return self.page

    def leave(self) -> None:
        """Close it. Nothing may have failed in it, become markup, or been asked of another host."""
        assert self.failures == []
        assert self.page.evaluate("[window.taken, document.images.length]") == [None, 0]
        hosts = {urlsplit(url).netloc for url in self.asked if not url.startswith("blob:")}
        assert hosts == {urlsplit(self.url).netloc}
        self.context.close()


def grave_faults(page: Page) -> list[str]:
    """Return what axe-core finds wrong: the serious and the critical."""
    script = checkpoints.package_folder("axe_playwright_python", "") / "axe.min.js"
    page.evaluate(script.read_text())
    found = page.evaluate("axe.run()")
    assert found["passes"]
    return [
        f"{fault['id']}: {node['html']}"
        for fault in found["violations"]
        if fault["impact"] in GRAVE
        for node in fault["nodes"]
    ]


def drop(page: Page, name: str, content: str) -> None:
    """Drop a file where files are dropped."""
    data = page.evaluate_handle(
        """([name, content]) => {
            const data = new DataTransfer();
            data.items.add(new File([content], name, { type: "text/csv" }));
            return data;
        }""",
        [name, content],
    )
    page.locator(".drop").dispatch_event("drop", {"dataTransfer": data})


def keep(page: Page, folder: Path, name: str) -> None:
    """Keep pictures of what is shown, at every width; nothing may stand out at its side."""
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 1000})
        page.screenshot(path=folder / f"{name}-{width}.png", full_page=True)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, f"{name} at {width}"
    page.set_viewport_size({"width": 1600, "height": 1000})


def articles() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return 300 short articles, each with its section, and questions with the article that answers each."""
    found = [
        (template.format(thing), section)
        for section, template in SECTIONS.items()
        for thing in THINGS.split(", ")
    ]
    asked = [(question, SECTIONS[section].format(thing)) for question, section, thing in QUESTIONS]
    assert len(found) == 300
    return found, asked


THINGS = (
    "violins, bicycles, umbrellas, tomatoes, bees, lighthouses, sailing boats, wrist watches, oak trees, "
    "wool sweaters, kitchen knives, old maps, telescopes, horses, candles, chess boards, coffee beans, "
    "leather shoes, steam trains, pianos, garden roses, salmon, mirrors, kites, postage stamps, bread ovens, "
    "glass bottles, wooden chairs, running tracks, hot air balloons"
)
SECTIONS = {
    "crime": "Last night thieves broke in and stole {}; the police are looking for witnesses.",
    "advice": "With a little patience anybody can repair {} at home.",
    "history": "A new book tells the history of {} from the Middle Ages until today.",
    "money": "Prices of {} rose by a third this year, traders say.",
    "art": "The painter fills whole walls of the gallery with pictures of {}.",
    "school": "Pupils spent a week on a school project about {}.",
    "health": "Doctors found that looking at {} lowers the blood pressure.",
    "law": "Parliament passed a law that forbids the import of {}.",
    "sport": "At the village games the children raced around {}.",
    "technology": "Engineers built a robot that recognises {} with a camera.",
}
QUESTIONS = [
    ("Did anybody steal violins at night?", "crime", "violins"),
    ("How do I fix a broken umbrella myself?", "advice", "umbrellas"),
    ("Is it still legal to bring salmon into the country?", "law", "salmon"),
    ("Have coffee beans become more expensive?", "money", "coffee beans"),
    ("Which artist paints lighthouses?", "art", "lighthouses"),
]
