"""The sockets that a service listens on: the port is its alone, and closing one resets nobody."""

import ctypes
import errno
import socket
import struct
from contextlib import suppress
from typing import Final

BACKLOG: Final = 2048
ABSENT: Final = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # an address that is not this machine's, or no IPv6 at all

# Options that drop segments with fewer hops left than so, for IPv4 and IPv6. With the most that there can be, 255, only
# those of a neighbour that begins with 255 pass; Linux, Windows and macOS begin with 64 or 128.
HOPS_LEFT: Final = {socket.AF_INET: (socket.IPPROTO_IP, 21), socket.AF_INET6: (socket.IPPROTO_IPV6, 73)}
ALL_HOPS: Final = 255

# Classic BPF over a segment that begins with its TCP header: drop it if it is a SYN, let all else through.
SO_ATTACH_FILTER, SO_DETACH_FILTER = 26, 27
NO_SYN: Final = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte of flags
        (0x45, 0, 1, 0x02),  # is SYN among them?
        (0x06, 0, 0, 0),  # then take nothing of it
        (0x06, 0, 0, 0xFFFF_FFFF),  # else all
    )
)


def open_sockets(host: str, port: int, copies: int = 1) -> list[list[socket.socket]]:
    """
    Take a port, on every address that `host` stands for; of several, those that this machine has.

    Port 0 takes a free one. Between the copies of a socket the kernel divides the connections, but only between those
    that listen: the first ones do so at once, the others when their owner calls listen().

    Returns:
        One list for each copy, with a socket for each address.

    Raises:
        OSError: where the host has no address, none is this machine's or another service has the port; the message
            names it.
    """
    groups: list[list[socket.socket]] = [[] for _ in range(copies)]
    absent = None
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise OSError(getattr(error, "errno", None), f"{host!r} has no address: {error}; see RIDE_HOST") from None
    for family, _, _, _, found in dict.fromkeys(addresses):  # one that /etc/hosts has twice may come twice
        port = port or (groups[0][0].getsockname()[1] if groups[0] else 0)
        address = (found[0], port, *found[2:])
        try:
            first = _bound(family, address)
        except OSError as error:
            if error.errno not in ABSENT:
                raise
            absent = error  # as ::1 of "localhost" is in containers without IPv6
            continue
        try:
            first.listen(BACKLOG)  # without SO_REUSEPORT until here, which another service might set as well
        except OSError as error:
            first.close()
            raise _explained(error, address) from None
        groups[0].append(first)
        if copies > 1:
            first.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            for group in groups[1:]:
                group.append(_bound(family, first.getsockname(), reuse_port=True))
    if absent is not None and not groups[0]:
        raise absent
    return groups


def refuse_connections(listening: socket.socket) -> None:
    """
    Let no new connection into a listening socket's queue, so that it can be emptied and closed without a loss.

    Closing it resets the connections that are still in its queue, and under load there is always one. Whoever tries
    meanwhile tries again a second later, and finds the socket closed, or another one.

    Where the system allows no filter, as some do without CAP_NET_ADMIN, a limit on hops stands in for it. Connections
    that were half made inherit it: `admit` them.
    """
    program = ctypes.create_string_buffer(NO_SYN, len(NO_SYN))
    count = len(NO_SYN) // struct.calcsize("HBBI")
    try:
        listening.setsockopt(socket.SOL_SOCKET, SO_ATTACH_FILTER, struct.pack("HP", count, ctypes.addressof(program)))
    except OSError:
        _limit_hops(listening, ALL_HOPS)


def let_connections_in(listening: socket.socket) -> None:
    """Undo `refuse_connections`, which outlives the process that called it where another one holds the socket too."""
    with suppress(OSError):  # there was no filter
        listening.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
    _limit_hops(listening, 0)


def admit(connection: socket.socket) -> None:
    """Receive what a connection's client sends, should it have been half made when `refuse_connections` came."""
    _limit_hops(connection, 0)


def _limit_hops(limited: socket.socket, least: int) -> None:
    if limited.family in HOPS_LEFT:
        with suppress(OSError):  # a sandbox may have neither; then a connection may be reset
            limited.setsockopt(*HOPS_LEFT[limited.family], least)


def _bound(family: int, address: tuple[object, ...], *, reuse_port: bool = False) -> socket.socket:
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if reuse_port:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        bound.setblocking(False)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise _explained(error, address) from None
    return bound


def _explained(error: OSError, address: tuple[object, ...]) -> OSError:
    advice = "; is another service there? RIDE_PORT chooses another port" if error.errno == errno.EADDRINUSE else ""
    return OSError(error.errno, f"cannot listen on {address[:2]}: {error.strerror}{advice}")
