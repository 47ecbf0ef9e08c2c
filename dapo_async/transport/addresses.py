"""Which TCP addresses may be listened on."""

import ipaddress
import platform

LOOPBACK = "tcp://127.0.0.1:*"  # a free port that only this machine reaches


def check_address(name: str, address: str, permitted: bool) -> None:
    """Refuse what is not a TCP address, and any address beyond loopback unless it is ``permitted``.

    It is with keys, or in plain text if that was asked for. Raises ``ValueError`` naming the field.
    """
    port = address.rpartition(":")[2]
    known_port = port == "*" or (port.isdecimal() and 0 < int(port) < 65536)
    if not address.startswith("tcp://") or not host_of(address) or not known_port:
        raise ValueError(f'{name} must look like "tcp://127.0.0.1:5555" (port * picks a free one), got "{address}"')
    if not permitted and not is_loopback(address):
        raise ValueError(
            f'{name} "{address}" is reachable from other machines and the wire is not encrypted: make keys with '
            "dapo-async keys and set network.keys; or set network.insecure = true if every machine of that network is "
            "yours"
        )


def host_of(address: str) -> str:
    """The host of ``tcp://host:port``."""
    return address.removeprefix("tcp://").rpartition(":")[0]


def is_loopback(address: str) -> bool:
    """Whether only this machine can reach the address."""
    host = host_of(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False  # another name


def from_outside(address: str) -> str:
    """``address`` as a worker elsewhere may name it: with this machine's name where all its addresses are meant."""
    host = host_of(address)
    return address.replace(host, platform.node() or host, 1) if host in ("*", "0.0.0.0", "[::]") else address
