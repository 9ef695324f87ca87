"""What the page at `/ui` takes: `make page`.

The bundled model, `embedding-cluster serve`, real Chromium on the same machine. The first view is timed in
the browser, from the navigation until the first model is shown, in a new profile each time, beside a server
that is kept busy. What ten pages take of the ingress is its CPU time with ten open less that with none. What
a person notices of them is timed beside the requests that ten pages send, without the browser's own work.
"""

import argparse
import asyncio
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from playwright.sync_api import Browser

import deployments
from benchmarks.load import Stream
from deployments.page.assets import assets
from tests.harness.browser import articles, chromium, drop
from tests.harness.server import Server, serve

BUNDLED = Path(deployments.__file__).parent / "workers"
MODEL = "all-minilm-l6-v2"
PAGES = 10
# As `models.js` has it.
LOOK_SECONDS = 5.0
PERSON_RATE = 20.0
SHOWN = """() => new Promise((done) => {
    const look = () => {
        if (document.querySelector("article")) done(performance.now());
        else requestAnimationFrame(look);
    };
    look();
})"""


def first_view(browser: Browser, url: str) -> float:
    """Return the milliseconds from the navigation until a model is shown, with nothing in a cache."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(f"{url}/ui", wait_until="commit")
    milliseconds: float = page.evaluate(SHOWN)
    context.close()
    return milliseconds


def ingress_share(server: Server, seconds: float) -> float:
    """Return the share of a core that the ingress takes, over so many seconds."""
    (ingress,) = server.titled("ServeReplica:default:ingress")
    begun, before = time.monotonic(), ingress.cpu_times()
    time.sleep(seconds)
    after, ended = ingress.cpu_times(), time.monotonic()
    share: float = (after.user + after.system - before.user - before.system) / (ended - begun)
    return share


@contextmanager
def open_pages(browser: Browser, url: str, number: int) -> Iterator[None]:
    """Keep so many pages open, each of which shows the models."""
    context = browser.new_context()
    for _ in range(number):
        page = context.new_page()
        page.goto(f"{url}/ui")
        page.wait_for_selector("article")
    try:
        yield
    finally:
        context.close()


@contextmanager
def lookers(url: str, number: int) -> Iterator[None]:
    """Ask as so many pages do."""
    stop = threading.Event()

    async def look() -> None:
        async with httpx.AsyncClient(timeout=60) as client:
            while not stop.is_set():
                (await client.get(f"{url}/status")).raise_for_status()
                await asyncio.sleep(LOOK_SECONDS)

    async def all_look() -> None:
        await asyncio.gather(*(look() for _ in range(number)))

    thread = threading.Thread(target=lambda: asyncio.run(all_look()))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def person(url: str, seconds: float, seed: int) -> tuple[float, float]:
    """Return p50 and p99 in milliseconds of single texts that come at random times."""
    seen = Stream(url, MODEL, rate=PERSON_RATE, seconds=seconds, seed=seed).run()
    assert len(seen.of(200).answers) == len(seen.answers)
    return seen.percentile(50), seen.percentile(99)


def keep_pictures(browser: Browser, url: str, folder: Path) -> None:
    """Keep the README's pictures: the models as they were used meanwhile, and a map of articles."""
    found, ((question, _), *_) = articles()
    page = browser.new_context(viewport={"width": 1200, "height": 720}).new_page()
    page.goto(f"{url}/ui")
    page.wait_for_selector("article")
    page.screenshot(path=folder / "page-models.png")
    page.goto(f"{url}/ui#try-map")
    drop(page, "articles.csv", "\n".join(["article,section", *(f'"{text}",{kind}' for text, kind in found)]))
    page.get_by_role("button", name="Draw the map").click()
    page.get_by_label("Search in these rows").fill(question)
    page.keyboard.press("Enter")
    page.get_by_role("heading", name="Nearest to").wait_for()
    page.get_by_role("heading", name="Nearest to").locator("..").get_by_role("button").first.click()
    page.get_by_role("search").evaluate("(form) => form.scrollIntoView()")
    page.screenshot(path=folder / "page-map.png")
    page.context.close()


def main() -> int:
    """Print each number with its bound."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--pictures", type=Path, help="a folder for the README's pictures")
    given = parser.parse_args()
    size = sum(len(asset.compressed) for asset in assets().values())
    print(f"all files, compressed: {size / 2**10:.1f} KiB (bound: 300)", flush=True)
    with tempfile.TemporaryDirectory() as folder, serve(BUNDLED, Path(folder)) as server:
        with chromium() as browser:
            first_view(browser, server.url)  # the browser's own first start isn't the page's
            with Stream(server.url, MODEL, clients=2, inputs=64).running():
                views = [first_view(browser, server.url) for _ in range(given.rounds)]
            told = ", ".join(f"{view:.0f}" for view in sorted(views))
            print(f"first view beside a busy server: {told} ms (bound: 1000)", flush=True)
            alone, with_pages = [], []
            for _ in range(given.rounds):
                alone.append(ingress_share(server, given.seconds))
                with open_pages(browser, server.url, PAGES):
                    with_pages.append(ingress_share(server, given.seconds))
            shares = statistics.median(alone), statistics.median(with_pages)
            print(
                f"ingress, share of a core: {shares[0]:.2%} alone, {shares[1]:.2%} with {PAGES} open pages"
                f" (bound: 2% more)",
                flush=True,
            )
        people: dict[str, list[tuple[float, float]]] = {"alone": [], f"beside {PAGES} pages": []}
        for seed in range(given.rounds):
            people["alone"].append(person(server.url, given.seconds, 2 * seed))
            with lookers(server.url, PAGES):
                people[f"beside {PAGES} pages"].append(person(server.url, given.seconds, 2 * seed + 1))
        if given.pictures:
            with chromium() as browser:
                keep_pictures(browser, server.url, given.pictures)
    for who, times in people.items():
        p50, p99 = (statistics.median(each) for each in zip(*times, strict=True))
        told = ", ".join(f"{each[1]:.1f}" for each in times)
        print(f"a person's time {who}: p50 {p50:.1f} ms, p99 {p99:.1f} ms (rounds: {told})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
