"""`embedding-cluster keys create|list|revoke|rotate`."""

import argparse
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pydantic import ValidationError

from deployments.command.summary import columns
from deployments.errors import ConfigError
from deployments.keys.file import Key, create_key, read_keys, revoke_key, rotate_key

DEFAULT_FILE = "keys.json"
DEFAULT_GRACE_SECONDS = 3600.0


def add_keys_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add `keys` and what it can do to the command line."""
    keys = commands.add_parser("keys", help="make, list, revoke and rotate client keys")
    actions = keys.add_subparsers(required=True, metavar="ACTION")
    create = actions.add_parser("create", help="make a key; its plaintext is shown once")
    create.add_argument(
        "--models", nargs="+", default=["*"], metavar="GLOB", help="models it may use (default: all)"
    )
    create.add_argument("--requests-per-minute", type=int, metavar="N", help="default: no limit")
    create.add_argument("--tokens-per-minute", type=int, metavar="N", help="default: no limit")
    create.add_argument("--days", type=float, help="how long it is valid (default: without end)")
    create.add_argument("--operator", action="store_true", help="may read the metrics of all clients")
    create.set_defaults(command=_create)
    show = actions.add_parser("list", help="show what the keys may do")
    show.set_defaults(command=_list)
    revoke = actions.add_parser("revoke", help="end a key, within two seconds")
    revoke.set_defaults(command=_revoke)
    rotate = actions.add_parser(
        "rotate", help="give a key a new plaintext, shown once; the old one ends later"
    )
    rotate.add_argument(
        "--grace",
        type=float,
        default=DEFAULT_GRACE_SECONDS,
        metavar="SECONDS",
        help="how long the old one is accepted (default: %(default)s)",
    )
    rotate.set_defaults(command=_rotate)
    for action in (create, show, revoke, rotate):
        action.add_argument(
            "--keys", type=Path, default=Path(DEFAULT_FILE), help="key file (default: %(default)s)"
        )
        if action is not show:
            action.add_argument("name", help="the key's name, its label in usage and metrics")


def _create(parsed: argparse.Namespace) -> int:
    now = datetime.now(UTC)

    def key(sha256: str) -> Key:
        try:
            return Key(
                name=parsed.name,
                sha256=sha256,
                models=tuple(parsed.models),
                requests_per_minute=parsed.requests_per_minute,
                tokens_per_minute=parsed.tokens_per_minute,
                operator=parsed.operator,
                created=now,
                expires=now + timedelta(days=parsed.days) if parsed.days is not None else None,
            )
        except ValidationError as error:
            (first, *_) = error.errors()
            raise ConfigError(f"{first['loc'][0]}: {first['msg']}") from None

    print(create_key(parsed.keys, key))
    return 0


def _list(parsed: argparse.Namespace) -> int:
    rows = [("NAME", "MODELS", "REQUESTS/MIN", "TOKENS/MIN", "OPERATOR", "CREATED", "EXPIRES")]
    for key in read_keys(parsed.keys).keys:
        rows.append(
            (
                key.name,
                " ".join(key.models),
                str(key.requests_per_minute or "-"),
                str(key.tokens_per_minute or "-"),
                "yes" if key.operator else "-",
                f"{key.created:%Y-%m-%d %H:%M}",
                f"{key.expires:%Y-%m-%d %H:%M}" if key.expires else "-",
            )
        )
    print("\n".join(columns(rows)))
    return 0


def _revoke(parsed: argparse.Namespace) -> int:
    revoke_key(parsed.keys, parsed.name)
    print(f"`{parsed.name}` is revoked")
    return 0


def _rotate(parsed: argparse.Namespace) -> int:
    print(rotate_key(parsed.keys, parsed.name, timedelta(seconds=parsed.grace)))
    return 0
