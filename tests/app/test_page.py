"""The page's files: what is open, how it is sent, what stands in it. A browser looks in `tests/model`."""

import gzip
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from typing import ClassVar

import httpx
import pytest

from deployments.page.assets import FOLDER, PAGE, TYPES, WELCOME, assets
from tests.app.conftest import LocalHandle
from tests.app.test_logs import application

ROOT = Path(__file__).parents[2]
OURS = sorted(file for file in FOLDER.glob("*") if file.suffix == ".js")
VENDORED = sorted(file for file in (FOLDER / "vendor").glob("*.js"))
README = (ROOT / "deployments" / "page" / "README.md").read_text()
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
    "trusted-types 'none'"
)
PLAIN = {"accept-encoding": "identity"}
# Compressed, in all.
MAX_BYTES = 300 * 2**10


@pytest.fixture
def keyed(handles: dict[str, LocalHandle]) -> httpx.AsyncClient:
    """The application with keys, asked without one."""
    return application(handles, "http://cluster", key=None)


async def test_every_file_is_open_to_anybody_and_sent_as_it_is(keyed: httpx.AsyncClient) -> None:
    """At either prefix, with its type and the strict policy; compressed where that is asked for."""
    for prefix in ("", "/v1"):
        for name, asset in assets().items():
            path = {PAGE: "/ui", WELCOME: "/"}.get(name, f"/ui/{name}")
            plain = await keyed.get(f"{prefix}{path}", headers=PLAIN)
            assert (plain.status_code, plain.content) == (200, (FOLDER / name).read_bytes()), path
            assert plain.headers["content-type"] == f"{TYPES[Path(name).suffix]}; charset=utf-8".replace(
                "svg+xml; charset=utf-8", "svg+xml"
            )
            assert "content-encoding" not in plain.headers
            sent = await keyed.get(f"{prefix}{path}")  # httpx asks for gzip
            assert sent.content == plain.content
            assert sent.headers["content-encoding"] == "gzip"
            assert int(sent.headers["content-length"]) == len(asset.compressed)
            for answer in (plain, sent):
                assert answer.headers["content-security-policy"] == POLICY
                assert answer.headers["x-content-type-options"] == "nosniff"
                assert answer.headers["referrer-policy"] == "no-referrer"
                assert answer.headers["cache-control"] == "no-cache"
                assert answer.headers["vary"] == "accept-encoding"


async def test_a_file_that_the_browser_has_isnt_sent_again(client: httpx.AsyncClient) -> None:
    """304 without a body, with the same policy; of another tag it is sent."""
    first = await client.get("/ui")
    tag = first.headers["etag"]
    same = await client.get("/ui", headers={"if-none-match": f'"other", {tag}'})
    assert (same.status_code, same.content) == (304, b"")
    assert (same.headers["etag"], same.headers["content-security-policy"]) == (tag, POLICY)
    other = await client.get("/ui", headers={"if-none-match": 'W/"other"'})
    assert (other.status_code, other.content) == (200, first.content)


@pytest.mark.parametrize("name", ["none.js", "../assets.py", "vendor", "vendor/htm.LICENSE", "index.html/"])
async def test_a_file_that_the_page_hasnt_is_not_found(client: httpx.AsyncClient, name: str) -> None:
    """Whatever the path looks like: only names of the page's files are known."""
    response = await client.get(f"http://cluster/ui/{name.replace('..', '%2e%2e')}")
    assert response.status_code == 404
    assert response.json()["error"]["message"] == "the page has no file of that name"
    assert response.headers["content-type"] == "application/json"


async def test_a_slash_at_the_end_leads_to_the_page(client: httpx.AsyncClient) -> None:
    """Relative to where it was asked for: nothing that a client sends stands in it."""
    for path in ("http://cluster/ui/", "http://cluster/v1/ui/"):
        response = await client.get(path, headers={"host": "evil.example"})
        assert (response.status_code, response.headers["location"]) == (307, "../ui")


async def test_the_page_takes_no_other_method(client: httpx.AsyncClient) -> None:
    """And the root stays what text-embeddings-inference's clients post to."""
    response = await client.post("/ui", json={})
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD")
    response = await client.put("/", json={})
    assert (response.status_code, response.headers["allow"]) == (405, "GET, HEAD, POST")
    assert (await client.post("/", json={"inputs": "x", "model": "a"})).status_code == 200


class Links(HTMLParser):
    """What a page refers to, and what it must not have."""

    NAMES: ClassVar = {"href", "src"}

    def __init__(self, text: str) -> None:
        """Read it."""
        super().__init__()
        self.found: list[str] = []
        self.bare: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keep addresses; keep what is inline."""
        names = dict(attrs)
        self.found += [value or "" for name, value in attrs if name in self.NAMES]
        self.bare += [name for name in names if name.startswith("on") or name == "style"]
        if tag == "style" or (tag == "script" and "src" not in names):
            self.bare.append(tag)


async def test_pages_refer_to_files_beside_them_and_have_nothing_inline(client: httpx.AsyncClient) -> None:
    """Relative addresses alone, all of which are answered: behind a prefix they are the same."""
    for path in ("/ui", "/"):
        links = Links((await client.get(path)).text)
        assert links.bare == []
        for link in links.found:
            assert re.fullmatch(r"[a-z][\w./-]*", link), link
            assert ":" not in link
            assert (await client.get(f"/{link}")).status_code == 200, link


def needed(*names: str) -> set[str]:
    """Return the modules that these import at once, one through the other, with themselves."""
    found: set[str] = set()
    waiting = [FOLDER / name for name in names]
    while waiting:
        file = waiting.pop()
        if (name := file.relative_to(FOLDER).as_posix()) not in found:
            found.add(name)
            imported = re.findall(
                r'^import .*?"(\./[\w./]+)";$|from"(\./\w+\.js)"', file.read_text(), re.MULTILINE
            )
            waiting += [(file.parent / (ours or theirs)).resolve() for ours, theirs in imported]
    return found


def test_what_the_first_view_needs_is_fetched_at_once_and_nothing_else() -> None:
    """Each module that it imports, however deep."""
    preloaded = set(re.findall(r'"ui/([\w./-]+\.js)"', (FOLDER / PAGE).read_text()))
    assert preloaded == needed("main.js", "models.js")
    assert needed(*(file.name for file in OURS)) == {name for name in assets() if name.endswith(".js")}


def test_all_of_it_is_small() -> None:
    """Less than 300 KiB compressed, as it is sent."""
    total = sum(len(asset.compressed) for asset in assets().values())
    assert total < MAX_BYTES, total
    for asset in assets().values():
        assert gzip.decompress(asset.compressed) == asset.content


@pytest.mark.parametrize("file", OURS, ids=lambda file: file.name)
def test_our_scripts_make_no_markup_of_text(file: Path) -> None:
    """Nothing that reads text as markup or as code, no handler by name, no storage, no other host."""
    text = file.read_text()
    for word in (
        "innerHTML",
        "outerHTML",
        "insertAdjacentHTML",
        "dangerouslySetInnerHTML",
        "document.write",
        "DOMParser",
        "eval(",
        "new Function",
        "setAttribute",
        "srcdoc",
        "localStorage",
        "sessionStorage",
        "cookie",
        "http:",
        "https:",
        "//cdn",
    ):
        assert word not in text, word
    assert not re.search(r"\son[a-z]+=", text)  # Preact's are `onClick=`
    assert len(text.splitlines()) <= 320


def test_vendored_files_have_their_licence_and_their_origin() -> None:
    """Beside them, and in the page that says how to renew them."""
    assert VENDORED
    licences = {file.stem for file in (FOLDER / "vendor").glob("*.LICENSE")}
    for file in VENDORED:
        row = re.search(
            rf"^\| `{file.name}` \| `([\w.-]+)@([\d.]+)` \| .* \| ([\w.-]+) \|$", README, re.MULTILINE
        )
        assert row, file.name
        assert row[1] in licences
        assert row[3] in ("MIT", "Apache-2.0")
        version = re.search(r"^v([\d.]+)$", file.read_text()[:200], re.MULTILINE)
        assert version is None or version[1] == row[2]


@pytest.mark.slow
def test_the_wheel_brings_all_of_it(tmp_path: Path) -> None:
    """Built from a copy: what an earlier build left here would be packed again."""
    source = tmp_path / "source"
    shutil.copytree(ROOT / "deployments", source / "deployments")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "uv", "build", "--wheel", "--no-build-isolation"]
    command += ["--python", sys.executable, "--out-dir", str(tmp_path), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {file.relative_to(ROOT).as_posix() for file in FOLDER.rglob("*") if file.is_file()}
    assert len(wanted) > 20
    assert wanted <= packed
