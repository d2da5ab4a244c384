"""Where process 0 listens: at the coordinator's address, and nowhere else."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket

from fax.sharding._connection import Connection

_WHERE = "fax.sharding.initialize"
BIND = "JAX_COORDINATOR_BIND_ADDRESS"  # which JAX knows, too


def listen(address: str) -> list[socket.socket]:
    """Sockets that listen at all addresses of the coordinator's name.

    A machine's own name may mean a loopback address on the machine itself, where no other one gets
    to. Only then, or if ``JAX_COORDINATOR_BIND_ADDRESS`` says so, this listens everywhere.

    Raises:
      RuntimeError: if the port is taken, or this machine has no such address.
    """
    host, _, port = (os.environ.get(BIND) or address).rpartition(":")
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RuntimeError(
            f"{_WHERE}: process 0 cannot find the address of {host!r}: {error}. Pass a "
            "coordinator_address that all processes can find."
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
                continue  # a name may have addresses of both kinds where the machine has one
            for listener in listeners:
                listener.close()
            raise RuntimeError(
                f"{_WHERE}: process 0 cannot listen at port {port} of {address}: "
                f"{error.strerror}. Choose a free port."
            ) from error
    if not listeners:
        raise RuntimeError(
            f"{_WHERE}: process 0 cannot listen at {address}, because {host} is no address of its "
            "machine. Pass its own address as coordinator_address. If the others reach it by "
            f"another one, as behind a service of Kubernetes, set {BIND} to the host and port "
            "where it should listen."
        )
    return listeners


def bind_address(listeners: list[socket.socket], peers: list[Connection]) -> str | None:
    """Where JAX should listen at process 0: where the others have come to. None: everywhere."""
    ends = [peer.socket for peer in peers] or listeners[:1]
    host_and_port = {end.getsockname()[:2] for end in ends}
    hosts = sorted({host.removeprefix("::ffff:") for host, _ in host_and_port})
    if os.environ.get(BIND) or (len(hosts) > 1 and not all(map(is_loopback, hosts))):
        return None
    host, port = hosts[0], ends[0].getsockname()[1]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine gets to an address."""
    return ipaddress.ip_address(host.partition("%")[0] or "0.0.0.0").is_loopback


def _is_own_name(host: str) -> bool:
    own = socket.gethostname().partition(".")[0].lower()
    return host.partition(".")[0].lower() == own and own != "localhost"
