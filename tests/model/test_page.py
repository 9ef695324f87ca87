"""The page in a real browser, beside a real server with real vLLM: what an operator and a visitor do there.

Pictures of each view, at every width, stay in the test run's folder `pictures…`.
"""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Browser, Page, expect

from deployments.keys.file import Key, create_key
from tests.harness import checkpoints, workers
from tests.harness.browser import HOSTILE, Visit, articles, chromium, drop, grave_faults, keep, needs_chromium
from tests.harness.server import PATIENCE, START_SECONDS, Server, is_ready, serve, wait_for
from tests.model.conftest import MINILM

pytestmark = [pytest.mark.model, needs_chromium]
# In milliseconds; an engine that starts anew takes a quarter of a minute.
expect.set_options(timeout=PATIENCE * 10_000)
RESTART = PATIENCE * 60_000
PAIRS = [
    {"The cat sleeps on the sofa.", "A kitten naps on the couch."},
    {"How do I reset my password?", "I forgot my login and need a new one."},
]
SCHEMES = ("light", "dark")
VIEWS = ("models", "try-texts", "try-search", "try-map", "batches", "keys")


@pytest.fixture(scope="module")
def secrets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A key file, and the plaintexts by name: an operator's, and one with limits."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    now = datetime.now(UTC)

    def operator(sha256: str) -> Key:
        return Key(name="operator", sha256=sha256, created=now, operator=True)

    def app(sha256: str) -> Key:
        return Key(name="app", sha256=sha256, created=now, models=("all-*",), requests_per_minute=600)

    return file, {"operator": create_key(file, operator), "app": create_key(file, app)}


@pytest.fixture(scope="module")
def starting(
    secrets: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """The bundled model, described by markup, behind keys; it may not be loaded yet."""
    folder = tmp_path_factory.mktemp("server")
    file = folder / "minilm.toml"
    table = f'[queue.models."{MINILM}"'
    described = f"{table}]\ndescription = {json.dumps(HOSTILE)}\n{table}."
    file.write_text(workers.vllm(MINILM, checkpoints.minilm()).replace(f"{table}.", described))
    with serve(file, folder, keys=secrets[0], until=lambda url: is_ready(url, "/ui")) as server:
        yield server


@pytest.fixture(scope="module")
def server(starting: Server) -> Server:
    """The same, with its model loaded."""
    wait_for(lambda: is_ready(starting.url), START_SECONDS, starting.log)
    return starting


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One browser for all."""
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where pictures are kept."""
    return tmp_path_factory.mktemp("pictures")


@pytest.fixture
def visit(browser: Browser, server: Server) -> Iterator[Visit]:
    """A visitor, who has seen nothing fail in the end."""
    visit = Visit(browser, server.url)
    yield visit
    visit.leave()


def test_the_model_is_seen_to_become_ready(
    browser: Browser, starting: Server, secrets: tuple[Path, dict[str, str]], pictures: Path
) -> None:
    """Who opens the page while the model is loaded sees that it isn't ready, and then that it is."""
    visit = Visit(browser, starting.url)
    page = visit.enter(secrets[1]["operator"])
    model = page.get_by_role("article", name=MINILM)
    expect(model.locator(".pill")).to_have_text("not ready")
    expect(page.locator(".notice.bad")).to_contain_text(f"{MINILM}: no replica answers: 1 starting")
    keep(page, pictures, "starting")
    expect(page.get_by_text("Every model answers.")).to_be_visible(timeout=RESTART)
    expect(model.locator(".pill")).to_have_text("ready")
    expect(model).to_contain_text("1 running")
    visit.leave()


def test_a_key_is_asked_for_and_a_wrong_one_refused(
    visit: Visit, secrets: tuple[Path, dict[str, str]], pictures: Path
) -> None:
    """The right one stands in no address and no storage, and is gone with the page."""
    page, secret = visit.page, secrets[1]["app"]
    page.goto(f"{visit.url}/")
    page.get_by_role("link", name="See it and try it").click()
    told = page.get_by_role("alert")
    expect(told).to_have_text("401: a key is needed: Authorization: Bearer KEY")
    keep(page, pictures, "key")
    for wrong, refusal in (
        ("wrong", "401: this key isn't valid"),
        ("a b", "This can't be a key: keys have no"),
    ):
        page.get_by_label("Key").fill(wrong)
        page.keyboard.press("Enter")
        expect(told).to_contain_text(refusal)
    page.get_by_label("Key").fill(secret)
    page.keyboard.press("Enter")
    expect(page.get_by_role("article", name=MINILM)).to_be_visible()
    assert secret not in page.url
    assert not any(secret in url for url in visit.asked)
    assert page.evaluate("[localStorage.length, sessionStorage.length, document.cookie]") == [0, 0, ""]
    page.get_by_role("button", name="Forget the key").click()
    expect(told).to_have_text("The key is forgotten.")
    page.reload()
    expect(page.get_by_label("Key")).to_be_visible()


def test_six_texts_show_which_belong_together(
    visit: Visit, secrets: tuple[Path, dict[str, str]], pictures: Path
) -> None:
    """The two pairs of one meaning are the nearest; the request runs as it is shown."""
    page = visit.enter(secrets[1]["app"], "try-texts")
    page.get_by_role("button", name="Compare").click()
    pairs = page.locator("section:not([hidden]) .ranking .pair")
    expect(pairs).to_have_count(5)
    assert [set(pairs.nth(n).inner_text().splitlines()) for n in (0, 1)] == PAIRS
    cells = page.locator(".matrix tbody td").all_inner_texts()
    assert [cells[7 * n] for n in range(6)] == ["1.00"] * 6
    page.get_by_text("This request as code").first.click()
    keep(page, pictures, "texts")
    curl, python = page.locator("section:not([hidden]) pre").all_inner_texts()
    environ = os.environ | {"EMBEDDING_CLUSTER_KEY": secrets[1]["app"]}
    ran = subprocess.run(["bash", "-c", curl], capture_output=True, env=environ, check=True)
    assert len(json.loads(ran.stdout)["data"]) == 6
    check = "\nassert len(vectors) == 6 and len(vectors[0]) == 384\n"
    subprocess.run([sys.executable, "-c", python + check], env=environ, check=True)


def test_a_query_finds_the_document_that_answers_it(
    visit: Visit, secrets: tuple[Path, dict[str, str]], pictures: Path
) -> None:
    """By meaning: they share no word. Markup in a document stays text."""
    page = visit.enter(secrets[1]["app"], "try-search")
    documents = page.get_by_label("Documents, one on each line")
    documents.fill(f"{documents.input_value()}\n{HOSTILE}")
    page.get_by_role("button", name="Rank").click()
    ranked = page.locator("section:not([hidden]) .ranking li > span:last-child")
    expect(ranked).to_have_count(5)
    assert ranked.first.inner_text() == "Goods may be returned within thirty days of purchase."
    assert HOSTILE in ranked.all_inner_texts()
    keep(page, pictures, "search")


def test_a_dropped_file_becomes_a_map_in_which_questions_find_their_article(
    visit: Visit, secrets: tuple[Path, dict[str, str]], pictures: Path
) -> None:
    """300 articles; neighbours by pointer and by keyboard; markup in names and cells stays text."""
    rows, questions = articles()
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(["article", HOSTILE, "note"])
    writer.writerows(
        [article, section, f'{HOSTILE} "{n}",\nnew line'] for n, (article, section) in enumerate(rows)
    )
    page = visit.enter(secrets[1]["app"], "try-map")
    drop(page, f"{HOSTILE}.csv", text.getvalue())
    expect(page.get_by_text(f"{HOSTILE}.csv: 300 rows, 3 columns")).to_be_visible()
    page.get_by_role("combobox", name="Text", exact=True).select_option("article")
    page.get_by_role("combobox", name="Colour by").select_option(HOSTILE)
    page.get_by_role("button", name="Draw the map").click()
    expect(page.locator(".map circle.dot")).to_have_count(300)
    expect(page.locator(".legend li")).to_have_count(10)
    found = page.locator("section.card", has=page.get_by_role("heading", name="Nearest to"))
    for question, answer in questions:
        page.get_by_label("Search in these rows").fill(question)
        page.keyboard.press("Enter")
        expect(page.get_by_role("heading", name=f"Nearest to “{question}”")).to_be_visible()
        assert found.get_by_role("button").first.inner_text() == answer
    found.get_by_role("button").first.click()
    chosen = page.locator("p.chosen")
    expect(chosen).to_have_text(answer)
    page.locator(".map").focus()
    before = chosen.inner_text()
    for key in ("ArrowRight", "ArrowLeft", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    page.keyboard.press("ArrowUp")
    expect(chosen).not_to_have_text(before)
    page.locator(".map circle.dot").nth(17).hover(force=True)  # others may lie over it
    expect(chosen).to_have_text(rows[17][0])
    expect(page.locator(".map circle.near")).to_have_count(5)
    expect(page.locator(".cells dd").last).to_contain_text(HOSTILE)
    keep(page, pictures, "map")


def test_a_batch_is_run_watched_and_fetched(
    visit: Visit, secrets: tuple[Path, dict[str, str]], pictures: Path, tmp_path: Path
) -> None:
    """To its end; one with a bad line shows it; one is cancelled; a file is removed."""
    page = visit.enter(secrets[1]["app"], "batches")

    def run(name: str, inputs: list[object]) -> None:
        body = [{"model": MINILM, "input": text} for text in inputs]
        asked = [
            {"custom_id": f"row-{n}", "method": "POST", "url": "/v1/embeddings", "body": each}
            for n, each in enumerate(body)
        ]
        content = "\n".join(map(json.dumps, asked)).encode()
        page.get_by_label("A file of requests").set_input_files(
            {"name": name, "mimeType": "", "buffer": content}
        )
        page.get_by_role("button", name="Upload and run").click()
        expect(page.get_by_role("cell", name=name).first).to_be_visible()

    newest = page.get_by_role("region", name="Batches").locator("tbody tr").first
    run(f"{HOSTILE}.jsonl", ["Hello", "world", 1.5])
    expect(newest).to_contain_text("completed")
    expect(newest).to_contain_text("2 of 3, 1 failed")
    with page.expect_download() as download:
        newest.get_by_role("button", name="Output").click()
    lines = download.value.path().read_text().splitlines()
    assert len(json.loads(lines[0])["response"]["body"]["data"][0]["embedding"]) == 384
    assert len(lines) == 2
    with page.expect_download() as download:
        newest.get_by_role("button", name="Errors").click()
    assert json.loads(download.value.path().read_text())["custom_id"] == "row-2"
    keep(page, pictures, "batches")
    run("long.jsonl", [" ".join(["word"] * 200)] * 3000)
    newest.get_by_role("button", name="Cancel").click()
    expect(newest).to_contain_text("cancelled")
    page.get_by_role("button", name="Delete long.jsonl").click()
    expect(page.get_by_role("cell", name="long.jsonl")).to_have_count(0)


def test_a_key_sees_what_it_has_used_and_an_operator_what_all_have(
    browser: Browser, server: Server, secrets: tuple[Path, dict[str, str]], pictures: Path
) -> None:
    """The numbers of the metrics, by key and model."""
    visit = Visit(browser, server.url)
    page = visit.enter(secrets[1]["app"], "try-texts")
    page.get_by_role("button", name="Compare").click()
    expect(page.locator(".matrix")).to_be_visible()
    page.get_by_role("link", name="Keys").click()
    own = page.get_by_role("region", name="What this key has used").get_by_role("row", name=MINILM)
    expect(own).to_be_visible()
    expect(page.get_by_text("600")).to_be_visible()
    expect(page.get_by_text("all-*")).to_be_visible()
    expect(page.get_by_role("heading", name="All keys")).to_have_count(0)
    visit.leave()
    visit = Visit(browser, server.url)
    page = visit.enter(secrets[1]["operator"], "keys")
    row = page.get_by_role("region", name="What all keys have used").get_by_role("row", name=f"app {MINILM}")
    expect(row).to_be_visible()
    row = page.get_by_role("region", name="What all keys may use").get_by_role("row", name="app all-* 600")
    expect(row).to_be_visible()
    keep(page, pictures, "keys")
    visit.leave()


def ask_module(page: Page, module: str, call: str, given: object) -> Any:
    """Return what a call of one of the page's modules gives; `m` is the module, `given` what is given."""
    script = f"(given) => import(new URL('ui/{module}', document.baseURI)).then((m) => {call})"
    return page.evaluate(script, given)


FILES = [
    ("a,b\n1,2\n", ["a", "b"], [["1", "2"]]),
    ("\ufeffa;b\r\n1;2\r\n", ["a", "b"], [["1", "2"]]),
    ("a\tb\n1\t2", ["a", "b"], [["1", "2"]]),
    ('a,b\n"x, ""y""\nz",2\n\n', ["a", "b"], [['x, "y"\nz', "2"]]),
    ("a,b\n1\n1,2,3\n", ["a", "b"], [["1", ""], ["1", "2"]]),
    ("a,\n1,2\n", ["a", "column 2"], [["1", "2"]]),
    ("a text here\nanother one\n", ["text"], [["a text here"], ["another one"]]),
    ('{"a": "x", "b": 1}\n{"c": null, "a": ["y"]}\n', ["a", "b", "c"], [["x", "1", ""], ['["y"]', "", ""]]),
    ('{"a": "x", "toString": 1}\n{"a": "y"}\n', ["a", "toString"], [["x", "1"], ["y", ""]]),
    ('[{"a": "x"}, {"a": "y"}]', ["a"], [["x"], ["y"]]),
    ('"x"\n"y"\n', ["text"], [["x"], ["y"]]),
    ('{"a", "b"}\n{1},2\n', ['{"a"', '"b"}'], [["{1}", "2"]]),
    (f'"{HOSTILE}",b\n1,2\n', [HOSTILE, "b"], [["1", "2"]]),
]


def test_files_are_read_as_people_have_them(visit: Visit) -> None:
    """CSV with any separator, JSON lines, one JSON array, a text on each line; 1,000 rows and no more."""
    page = visit.page
    page.goto(f"{visit.url}/ui")
    for text, columns, rows in FILES:
        found = ask_module(page, "rows.js", "m.readRows(given)", text)
        assert found == {"columns": columns, "rows": rows, "left": 0}, text
    found = ask_module(page, "rows.js", "m.readRows(given)", "a,b\n" + "1,2\n" * 1003)
    assert (len(found["rows"]), found["left"]) == (1000, 3)
    told = ask_module(
        page, "rows.js", "{ try { m.readRows(given) } catch (e) { return e.message } }", "a,b\n,\n"
    )
    assert told == "There is no row in this."
    for encoding in ("utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"):
        marked = ("" if encoding.startswith("utf-8") else "\ufeff") + "a,ü\n"
        told = ask_module(page, "rows.js", "m.textIn(Uint8Array.from(given))", list(marked.encode(encoding)))
        assert told == "a,ü\n", encoding
    numbers = [[str(n)] for n in range(100)]
    found = ask_module(page, "rows.js", "m.groups(given, 0, 8)", numbers)
    assert found["names"] == ["0 to 20", "20 to 40", "40 to 60", "60 to 80", "80 and more"]
    assert found["of"] == [n // 20 for n in range(100)]


def test_the_map_is_that_of_the_principal_components(visit: Visit) -> None:
    """As numpy's singular value decomposition has them, but for the signs."""
    vectors = np.random.default_rng(0).normal(size=(200, 30)) * np.linspace(5, 1, 30)
    centred = vectors - vectors.mean(axis=0)
    _, _, components = np.linalg.svd(centred, full_matrices=False)
    visit.page.goto(f"{visit.url}/ui")
    found = np.array(ask_module(visit.page, "vectors.js", "m.project(given)", vectors.tolist()))
    spread = found.var(axis=0).sum()
    assert spread == pytest.approx((centred @ components[:2].T).var(axis=0).sum(), rel=0.01)
    apart = vectors.copy()
    apart[:, 0] += np.repeat([-40, 40], 100)
    found = np.array(ask_module(visit.page, "vectors.js", "m.project(given)", apart.tolist()))
    _, _, components = np.linalg.svd(apart - apart.mean(axis=0), full_matrices=False)
    expected = (apart - apart.mean(axis=0)) @ components[0]
    assert abs(np.corrcoef(found[:, 0], expected)[0, 1]) > 0.9999


def test_a_page_that_nobody_looks_at_asks_nothing(visit: Visit, secrets: tuple[Path, dict[str, str]]) -> None:
    """Of a minute on the page's clock; when somebody looks again it asks at once, and every five seconds."""
    page = visit.page
    page.clock.install()
    visit.enter(secrets[1]["app"])
    expect(page.get_by_role("article", name=MINILM)).to_be_visible()

    def looks() -> int:
        # What was asked before this one has been noted by then.
        page.evaluate("fetch('health').then((answer) => answer.text())")
        return sum(url.endswith("/status") for url in visit.asked)

    def show(state: str) -> None:
        page.evaluate(
            """(state) => {
                Object.defineProperty(document, "visibilityState", { configurable: true, get: () => state });
                document.dispatchEvent(new Event("visibilitychange"));
            }""",
            state,
        )

    with page.expect_response("**/status"):
        page.clock.fast_forward(5000)
    show("hidden")
    before = looks()
    page.clock.fast_forward(60_000)
    assert looks() == before
    with page.expect_response("**/status"):
        show("visible")
    with page.expect_response("**/status"):
        page.clock.fast_forward(5000)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_people_with_a_screen_reader_or_a_keyboard_get_everything(
    browser: Browser, server: Server, secrets: tuple[Path, dict[str, str]], scheme: str
) -> None:
    """axe-core finds no serious fault in any view; the keyboard reaches them."""
    visit = Visit(browser, server.url, color_scheme=scheme)
    page = visit.page
    for address in ("/", "/ui"):
        page.goto(f"{server.url}{address}")
        page.wait_for_load_state("networkidle")
        assert grave_faults(page) == [], address
    visit.enter(secrets[1]["operator"])
    rows = "text,kind\n" + "\n".join(f"{text},{kind}" for text, kind in articles()[0][:40])
    for view in VIEWS:
        page.goto(f"{server.url}/ui#{view}")
        for name in ("Compare", "Rank"):
            button = page.get_by_role("button", name=name)
            if button.is_visible():
                button.click()
                page.get_by_text("This request as code").locator("visible=true").click()
        if view == "try-map":
            drop(page, "rows.csv", rows)
            page.get_by_role("button", name="Draw the map").click()
            expect(page.locator(".map circle.dot")).to_have_count(40)
        page.wait_for_load_state("networkidle")
        assert grave_faults(page) == [], view
    page.goto(f"{server.url}/ui")
    visit.enter(secrets[1]["operator"])
    for name in ("To the content", "Models", "Try it", "Batches", "Keys"):
        page.keyboard.press("Tab")
        focused = page.evaluate("document.activeElement.innerText")
        assert focused == name
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Keys", level=1)).to_be_visible()
    visit.leave()


def test_the_browser_refuses_markup_even_if_the_page_made_some(visit: Visit) -> None:
    """By the policy that comes with it."""
    page = visit.page
    page.goto(f"{visit.url}/ui")
    with pytest.raises(Exception, match="requires 'TrustedHTML'"):
        page.evaluate("document.body.innerHTML = '<b>x</b>'")
    assert page.evaluate("fetch('http://127.0.0.1:9/').then(() => 'asked', () => 'refused')") == "refused"


def test_a_replica_that_is_killed_is_seen_to_go_and_to_come_back(
    visit: Visit, server: Server, secrets: tuple[Path, dict[str, str]], pictures: Path
) -> None:
    """On top of the page, with what to do, and without anybody touching the page."""
    page = visit.enter(secrets[1]["operator"])
    model = page.get_by_role("article", name=MINILM)
    expect(page.get_by_text("Every model answers.")).to_be_visible()
    expect(model.locator(".pill")).to_have_text("ready")
    expect(model).to_contain_text("1 running")
    expect(model).to_contain_text(HOSTILE)
    keep(page, pictures, "models")
    (replica,) = server.titled(f"ServeReplica:default:{MINILM}")
    os.kill(replica.pid, signal.SIGKILL)
    expect(model.locator(".pill")).to_have_text("not ready", timeout=RESTART)
    told = page.locator(".notice.bad")
    expect(told).to_contain_text(f"{MINILM}: no replica answers")
    expect(told.locator(".action")).not_to_be_empty()
    keep(page, pictures, "trouble")
    expect(page.get_by_text("Every model answers.")).to_be_visible(timeout=RESTART)
    expect(model).to_contain_text("1 running")
