"""Starts HAProxy for Ray Serve's HAProxyManager, so that the front outlives the manager.

Ray ends a dead worker's process group, and HAProxy with it; the next manager starts one that knows no
application yet and answers 404. Here HAProxy gets a session of its own, and the next manager's takes over
its listeners and its configuration until that manager has heard of the applications. A guard beside it puts
another in its place at once when it dies itself, and ends it when the server is gone.

Runs as a program of its own, in the place of HAProxy's: it imports nothing but the standard library.
"""

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import sys
import time
from pathlib import Path

# While this file lies beside the configuration HAProxy isn't started again.
STOPPED = "stopped"
# What a client may take for its headers; the body's time is bounded behind us.
HEADER_SECONDS = 10
# The host that the server listens on, as it was given.
HOST_VARIABLE = "EMBEDDING_CLUSTER_HOST"
WILDCARDS = ("0.0.0.0", "::")  # noqa: S104 - compared with
# What HAProxy itself has to say: code, type, message.
UNAVAILABLE = "model_unavailable", "unavailable_error"
ANSWERS = {
    400: ("invalid_request", "invalid_request_error", "the request's head isn't HTTP"),
    431: ("head_too_large", "invalid_request_error", "the request's head is larger than 17 KiB"),
    404: ("not_found", "invalid_request_error", "no application is served under this path, or none yet"),
    408: ("deadline_exceeded", "timeout_error", "the request's head took too long to arrive"),
    500: ("internal_error", "server_error", "internal error"),
    502: (*UNAVAILABLE, "the process that had this request ended"),
    503: (*UNAVAILABLE, "no process takes requests now"),
    504: (*UNAVAILABLE, "the process that had this request doesn't answer"),
}
# Those that HAProxy makes where it can't do what it was told; the others are asked for by rules.
OWN = (400, 408, 500, 502, 503, 504)
# What it says to heads that are no requests is in HTML, whatever it is told: so these are looked at before.
BAD_HEADS = {400: "Bad Request", 408: "Request Timeout"}
LUA = """core.register_service("head_%(status)d", "tcp", function(applet)
  local body = %(body)s
  applet:send("HTTP/1.1 %(status)d %(reason)s\\r\\n" ..
    "content-type: application/json\\r\\nconnection: close\\r\\ncontent-length: " .. #body ..
    "\\r\\nx-request-id: " .. applet.f:uuid() .. "\\r\\n\\r\\n" .. body)
end)
"""
# 16 KiB of headers pass, as in most servers, and what a front before this one adds.
HEAD_BYTES = 17 * 2**10
# HAProxy takes 101 by default, and what has more for no HTTP.
MOST_FIELDS = 1000
# What Ray Serve reads as UTF-8, and ends a request for that isn't.
OF_SERVE = ("x-request-id", "x-session-id", "x-request-timeout-seconds", "serve_multiplexed_model_id")
# An HAProxy that ends sooner than this hasn't started: the next one comes after a pause, each twice as long.
START_SECONDS = 1.0
FIRST_PAUSE_SECONDS, MAX_PAUSE_SECONDS = 0.05, 5.0


def haproxies(config: str) -> list[int]:
    """Return the HAProxy processes whose configuration's path contains the text."""
    found = []
    for each in Path("/proc").glob("[0-9]*"):
        try:
            arguments = each.joinpath("cmdline").read_text().split("\0")
        except OSError:
            continue
        path = arguments[arguments.index("-f") + 1] if "-f" in arguments[:-1] else ""
        if "haproxy" in arguments[0] and config in path:
            found.append(int(each.name))
    return found


def answers(path: str) -> bool:
    """Return whether an HAProxy listens on that admin socket."""
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        return True


def admin_socket(config: Path) -> str:
    """Return the path of the admin socket that a configuration names."""
    return next(line.split()[2] for line in config.read_text().splitlines() if "stats socket" in line)


def config_of(arguments: list[str]) -> Path:
    """Return the path of HAProxy's configuration."""
    return Path(arguments[arguments.index("-f") + 1])


def command(arguments: list[str]) -> list[str]:
    """Return the arguments for HAProxy; those of a manager's first start take over from a survivor."""
    config = config_of(arguments)
    kept = config.with_suffix(".kept")
    if "-sf" not in arguments and kept.exists() and (survivors := haproxies(str(config))):
        admin = admin_socket(kept)
        if answers(admin):
            shutil.copy(kept, config)
            arguments = [*arguments, "-sf", *map(str, survivors), "-x", admin]
    amend(config)
    shutil.copy(config, kept)
    return arguments


def amend(config: Path) -> None:
    """Put into a configuration what Ray Serve has no switch for."""
    text = config.read_text()
    for change in (bound_headers, listen_where_told, answer_in_json):
        text = change(text)
    config.write_text(answer_bad_heads(text, config.with_suffix(".lua")))


def bound_headers(text: str) -> str:
    """Let HAProxy give up on a request whose headers don't come.

    The time between two requests of a connection would be bounded by it too, where nothing else is said.
    """
    place = re.search(r"^( *)timeout client (.*)\n", text, re.M)
    if "timeout http-request" in text or not place:
        return text
    indent, idle = place.groups()
    lines = f"{indent}timeout http-request {HEADER_SECONDS}s\n"
    if "timeout http-keep-alive" not in text:
        lines += f"{indent}timeout http-keep-alive {idle}\n"
    return text[: place.end()] + lines + text[place.end() :]


def answer_in_json(text: str) -> str:
    """Let HAProxy's own answers be JSON as all others are, each with an id.

    It takes larger heads than pass, and refuses them by a rule. A 502 or 504 becomes a 503, which passes.
    """
    if "http-error" in text or not (place := re.search(r"^( *)mode http\n", text, re.M)):
        return text
    text = re.sub(r"^ *errorfile .*\n", "", text, flags=re.M)
    plain = r"return status 404 content-type text/plain lf-string .*"
    text = re.sub(plain, f"return status 404 {answer_of(404)}", text)
    indent = place[1]
    lines = "".join(f"{indent}http-error status {status} {answer_of(status)}\n" for status in OWN)
    text = text[: place.end()] + lines + text[place.end() :]
    text = re.sub(r"^global\n", f"global\n    tune.http.maxhdr {MOST_FIELDS}\n", text, count=1, flags=re.M)
    rules = (
        "http-after-response set-status 503 if { status 502 504 }",
        f"acl large_head req.hdrs,length gt {HEAD_BYTES}",
        f"acl large_head url,length gt {HEAD_BYTES}",
        f"http-request return status 431 {answer_of(431)} if large_head",
        "acl odd_head req.hdrs -m reg '[\\x01-\\x08\\x0b\\x0c\\x0e-\\x1f\\x7f]'",
        f"http-request return status 400 {answer_of(400)} if odd_head",
        # Whoever offers another protocol speaks this one too; uvicorn would lose the body.
        "http-request del-header upgrade",
        *(
            f"http-request del-header {each} if {{ req.hdr({each}) -m reg '[^\\x20-\\x7e]' }}"
            for each in OF_SERVE
        ),
    )
    lines = "".join(f"{indent}{rule}\n" for rule in rules)
    return re.sub(r"^frontend http_frontend\n.*\n", lambda top: top[0] + lines, text, flags=re.M)


def answer_bad_heads(text: str, program: Path) -> str:
    """Let what begins a connection, and isn't HTTP, be told so in JSON, before its parser would in HTML."""
    if "switch-mode" in text or "log-format" in text:  # Ray's metrics name what only `mode http` knows
        return text
    own = {status: json.dumps(body_of(status)) for status in BAD_HEADS}  # JSON quotes as Lua does
    services = (LUA % {"status": each, "reason": BAD_HEADS[each], "body": own[each]} for each in BAD_HEADS)
    program.write_text("".join(services))
    text = re.sub(r"^global\n", f"global\n    lua-load {program}\n", text, count=1, flags=re.M)
    rules = (
        "mode tcp",
        "option tcplog",
        f"tcp-request inspect-delay {HEADER_SECONDS}s",
        "tcp-request connection set-var(sess.begun) date(0,ms)",
        "tcp-request content switch-mode http if HTTP",
    )
    lines = "".join(f"    {rule}\n" for rule in rules)
    text = re.sub(
        r"^(frontend http_frontend\n *bind .*\n)((?: .*\n)*?) *default_backend (\S+)\n",
        rf"\1{lines}\2    use_backend \3 if HTTP\n    default_backend bad_head\n",
        text,
        flags=re.M,
    )
    late = f"{{ date(0,ms),sub(sess.begun) ge {1000 * (HEADER_SECONDS - 1)} }}"
    return (
        f"{text.rstrip()}\nbackend bad_head\n    mode tcp\n"
        "    no option abortonclose\n    no option http-no-delay\n"
        "    tcp-request content reject if { req.len 0 }\n"
        f"    tcp-request content use-service lua.head_408 if {late}\n"
        "    tcp-request content use-service lua.head_400\n"
    )


def answer_of(status: int) -> str:
    """Return HAProxy's arguments for the answer that stands for a status."""
    body = body_of(status).replace("'", r"'\''")
    again = " hdr retry-after 1" if ANSWERS[status][0] == UNAVAILABLE[0] else ""
    return f"content-type application/json lf-string '{body}' hdr x-request-id %[uuid]{again}"


def body_of(status: int) -> str:
    """Return the JSON that stands for a status."""
    code, kind, message = ANSWERS[status]
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error, "code": code}, separators=(",", ":"))


def listen_where_told(text: str) -> str:
    """Let HAProxy listen on the server's address too; Ray Serve itself is told `inner_host` of it.

    `::` is every address of both kinds; Ray Serve writes it as `*`, which are those of IPv4.
    """
    host = os.environ.get(HOST_VARIABLE, "")
    address = f"[{host}]" if ":" in host else host
    if host in ("", inner_host(""), WILDCARDS[0]) or f"bind {address}:" in text:
        return text

    def listen(line: re.Match[str]) -> str:
        told, port = line.groups()
        if host in WILDCARDS:
            return f"{told}{address}:{port} v4v6\n"
        return f"{line[0]}{told.splitlines()[1]}{address}:{port}\n"

    return re.sub(r"^(frontend http_frontend\n *bind )\S+:(\d+).*\n", listen, text, flags=re.M)


def inner_host(host: str) -> str:
    """Return where Ray Serve listens: its HAProxy asks the replicas of its node on 127.0.0.1 alone."""
    return host if host in WILDCARDS else "127.0.0.1"


def guard(haproxy: int, server: int, arguments: list[str]) -> None:
    """Wait for the end of either process. Return where HAProxy has to be started again, else end."""
    config = config_of(arguments)
    poll = select.poll()
    watched = {}
    for process in (haproxy, server):
        with contextlib.suppress(ProcessLookupError):
            watched[process] = os.pidfd_open(process)
            poll.register(watched[process], select.POLLIN)
    if server in watched and haproxy in watched:
        poll.poll()
    if not _is_alive(server):
        with contextlib.suppress(ProcessLookupError):
            os.kill(haproxy, signal.SIGKILL)
        sys.exit()
    kept = config.with_suffix(".kept")
    if (config.parent / STOPPED).exists() or not kept.exists() or answers(admin_socket(kept)):
        sys.exit()  # the server ends, or a successor has taken over
    shutil.copy(kept, config)


def _is_alive(process: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{process}/status").read_text()
    except OSError:
        return False


def await_end(process: int, seconds: float) -> None:
    """Wait for the end of a process, for so many seconds at most."""
    with contextlib.suppress(ProcessLookupError):
        poll = select.poll()
        poll.register(os.pidfd_open(process), select.POLLIN)
        poll.poll(seconds * 1000)


def main(server: int, binary: str, arguments: list[str], failures: int = 0) -> None:
    """Become HAProxy, with a guard beside it; it has ended at its start `failures` times in a row."""
    arguments = command(arguments)
    os.setsid()
    haproxy = os.getpid()
    if not os.fork():
        os.setsid()  # so that nothing that ends HAProxy's group ends its guard
        begun = time.monotonic()
        guard(haproxy, server, arguments)
        failures = failures + 1 if time.monotonic() < begun + START_SECONDS else 0
        if failures:  # it can't start, as while its port is taken
            await_end(server, min(FIRST_PAUSE_SECONDS * 2**failures, MAX_PAUSE_SECONDS))
        # The first process of a session can't begin another one.
        if os.fork():
            os._exit(0)
        main(server, binary, without_takeover(arguments), failures)
    os.execv(binary, [binary, *arguments])  # noqa: S606 - what Ray Serve itself would start


def without_takeover(arguments: list[str]) -> list[str]:
    """Return the arguments of a start that has nobody to take over from."""
    end = min((arguments.index(option) for option in ("-sf", "-x") if option in arguments), default=None)
    return arguments[:end]


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
