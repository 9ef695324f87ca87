"""Where a server listens, in IPv4 or IPv6: `127.0.0.1`, `::1`, `::` for both, or a name."""

import socket


def family_of(host: str) -> socket.AddressFamily:
    """Return the kind of a host's address. Raises OSError for a name that has none."""
    return socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]


def bracketed(host: str) -> str:
    """Return a host as it stands in a URL and before a port."""
    return f"[{host}]" if ":" in host else host


def try_to_listen(host: str, port: int) -> None:
    """Raise OSError where nobody can listen there now."""
    with socket.socket(family_of(host)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((host, port))
