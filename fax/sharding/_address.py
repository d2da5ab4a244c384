"""Where process 0 listens: only at the coordinator's address."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from fax.sharding._connection import Connection

_WHERE = "fax.sharding.initialize"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # JAX uses this variable, too


def listen(address: str) -> list[socket.socket]:
    """Returns sockets that listen on all addresses of the coordinator's name.

    On a machine itself, its own name may resolve to a loopback address, which no other machine can
    reach. Only then, or if ``JAX_COORDINATOR_BIND_ADDRESS`` says so, this listens on all addresses
    of the machine.

    Raises:
      RuntimeError: if the port is in use, or this machine does not have the address.
    """
    host, _, port = (os.environ.get(BIND) or address).rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RuntimeError(
            f"{_WHERE}: process 0 cannot find the address of {host!r}: {error}. Pass a "
            "coordinator_address that all processes can resolve."
        ) from error
    places = list(dict.fromkeys((family, place) for family, *_, place in found))
    if all(is_loopback(str(place[0])) for _, place in places) and _is_own_name(host):
        both = socket.has_dualstack_ipv6()
        places = [
            (socket.AF_INET6, ("::", int(port))) if both else (socket.AF_INET, ("", int(port)))
        ]
    listeners: list[socket.socket] = []
    for family, place in places:
        both = place[0] == "::" and socket.has_dualstack_ipv6()
        try:
            listeners.append(socket.create_server(place, family=family, dualstack_ipv6=both))
        except OSError as error:
            if error.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                continue  # a name may have IPv4 and IPv6 addresses, and the machine only one
            for listener in listeners:
                listener.close()
            raise RuntimeError(
                f"{_WHERE}: process 0 cannot listen on port {port} of {address}: "
                f"{error.strerror}. Choose a free port."
            ) from error
    if not listeners:
        raise RuntimeError(
            f"{_WHERE}: process 0 cannot listen on {address}, because {host} is not an address of "
            "its machine. Pass its own address as coordinator_address. If the others reach it "
            f"through another one, as behind a Kubernetes service, set {BIND} to the host and port "
            "where it should listen."
        )
    return listeners


def bind_address(listeners: list[socket.socket], peers: list[Connection]) -> str | None:
    """The address to which the others connected, where JAX should listen, or None for all."""
    ends = [peer.socket for peer in peers] or listeners[:1]
    host_and_port = {end.getsockname()[:2] for end in ends}
    hosts = sorted({host.removeprefix("::ffff:") for host, _ in host_and_port})
    if os.environ.get(BIND) or (len(hosts) > 1 and not all(map(is_loopback, hosts))):
        return None
    host, port = hosts[0], ends[0].getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    return ipaddress.ip_address(host.partition("%")[0] or "0.0.0.0").is_loopback


def _is_own_name(host: str) -> bool:
    own = socket.gethostname().partition(".")[0].lower()
    return host.partition(".")[0].lower() == own and own != "localhost"
