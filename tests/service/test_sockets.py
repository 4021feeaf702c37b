"""A port belongs to one service, whose sockets share it, and closing one of them loses nobody."""

import errno
import select
import socket
import time

import pytest

from service import sockets
from service.sockets import admit, let_connections_in, open_sockets, refuse_connections


@pytest.fixture
def opened():
    """Open sockets, which are closed in the end."""
    groups = []

    def open_some(*arguments):
        groups.extend(found := open_sockets(*arguments))
        return found

    yield open_some
    for group in groups:
        for one in group:
            one.close()


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request):
    """This machine, by either protocol."""
    try:
        socket.create_server(
            (request.param, 0), family=socket.AF_INET6 if ":" in request.param else socket.AF_INET
        ).close()
    except OSError:
        pytest.skip(f"no {request.param} here")
    return request.param


def connect(port):
    """A connection."""
    return socket.create_connection(("127.0.0.1", port), timeout=10)


def accept_all(listening):
    """Accept what is in a socket's queue; how many there were."""
    count = 0
    while True:
        try:
            listening.accept()[0].close()
        except BlockingIOError:
            return count
        count += 1


def test_an_address_that_is_found_twice_is_taken_once(opened, monkeypatch):
    """As that of localhost is, where /etc/hosts has it in two lines."""
    found = socket.getaddrinfo("127.0.0.1", 0, type=socket.SOCK_STREAM)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found * 2)
    assert [len(group) for group in opened("localhost", 0, 2)] == [1, 1]


def test_copies_share_the_port_and_the_connections(opened):
    """Port 0 is one free port for all of them; those that listen divide what comes."""
    groups = opened("127.0.0.1", 0, 3)
    ports = {listening.getsockname()[1] for group in groups for listening in group}
    assert len(ports) == 1
    (port,) = ports
    for _ in range(20):
        connect(port).close()
    assert [accept_all(group[0]) for group in groups[:1]] == [20]  # nobody else listens yet
    for group in groups[1:]:
        group[0].listen()
    for _ in range(200):
        connect(port).close()
    assert min(accepted := [accept_all(group[0]) for group in groups]) > 10
    assert sum(accepted) == 200


@pytest.mark.parametrize(("first", "second"), [(1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_second_service_on_the_port_is_refused(opened, first, second):
    """However many workers either has: no traffic is ever shared with a stranger."""
    port = opened("127.0.0.1", 0, first)[0][0].getsockname()[1]

    with pytest.raises(
        OSError, match=rf"cannot listen on \('127\.0\.0\.1', {port}\): Address already in use; is anoth"
    ):
        opened("127.0.0.1", port, second)


def test_a_port_that_is_bound_but_not_yet_listening_is_refused_to_the_slower(opened):
    """Two services that start in the same moment can both bind; only one can listen."""
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        opened("127.0.0.1", other.getsockname()[1], 2)
        with pytest.raises(OSError, match="Address already in use"):
            other.listen()


def test_a_port_that_is_taken_on_one_of_several_addresses_is_refused(opened, monkeypatch):
    """Else some clients would find this service there, and others another one."""
    port = opened("127.0.0.1", 0)[0][0].getsockname()[1]
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    with pytest.raises(OSError, match="Address already in use"):
        opened("both", port)


def test_an_address_of_another_machine_is_refused_by_its_name():
    """192.0.2.1 is nobody's."""
    with pytest.raises(OSError, match=r"cannot listen on \('192\.0\.2\.1', 8000\): Cannot assign requested address$"):
        open_sockets("192.0.2.1", 8000)


def test_a_name_may_stand_for_several_addresses(opened, monkeypatch):
    """All of them get the same port."""
    found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in ("127.0.0.1", "127.0.0.2")]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    groups = opened("both", 0, 2)

    assert [[one.getsockname()[0] for one in group] for group in groups] == [["127.0.0.1", "127.0.0.2"]] * 2
    assert len({one.getsockname()[1] for group in groups for one in group}) == 1


@pytest.mark.parametrize("absent", [(socket.AF_INET6, "2001:db8::1", 0, 0), (socket.AF_DECnet, "x")])
def test_an_address_that_the_machine_lacks_is_passed_over_beside_one_that_it_has(opened, monkeypatch, absent):
    """ "localhost" is ::1, too, in containers without IPv6; and some systems tell an address twice."""
    family, *address = absent
    found = [(family, socket.SOCK_STREAM, 6, "", tuple(address))]
    found += [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))] * 2
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)

    groups = opened("localhost", 0, 2)

    assert [[one.getsockname()[0] for one in group] for group in groups] == [["127.0.0.1"]] * 2


@pytest.mark.parametrize("allowed", [True, False])
def test_a_queue_can_be_emptied_and_closed_without_a_loss(opened, monkeypatch, host, allowed):
    """
    Who is in the queue stays there and can be answered; nobody else gets in, and after the close they know.

    Filters may not be allowed, as in a container without capabilities.
    """
    if not allowed:
        monkeypatch.setattr(sockets, "SO_ATTACH_FILTER", 9999)
    listening = opened(host, 0)[0][0]
    port = listening.getsockname()[1]
    with socket.create_connection((host, port), timeout=10) as waiting:
        refuse_connections(listening)
        late = socket.socket(listening.family)
        late.setblocking(False)
        assert late.connect_ex((host, port)) == errno.EINPROGRESS
        time.sleep(0.1)
        accepted, _ = listening.accept()
        with pytest.raises(BlockingIOError):
            listening.accept()
        listening.close()
        with accepted:
            waiting.sendall(b"question")
            assert accepted.recv(100) == b"question"
            accepted.sendall(b"answer")
            assert waiting.recv(100) == b"answer"
    with late:
        assert select.select([], [late], [], 10)[1]
        assert late.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == errno.ECONNREFUSED


@pytest.mark.parametrize("allowed", [True, False])
def test_a_socket_that_refused_connections_can_let_them_in_again(opened, monkeypatch, host, allowed):
    """Those that came meanwhile, too, when they try again; a socket that never refused any is as before."""
    if not allowed:
        monkeypatch.setattr(sockets, "SO_ATTACH_FILTER", 9999)
    listening = opened(host, 0)[0][0]
    refuse_connections(listening)
    with socket.socket(listening.family) as early:
        early.setblocking(False)
        assert early.connect_ex(listening.getsockname()[:2]) == errno.EINPROGRESS
        for _ in range(2):
            let_connections_in(listening)
        assert select.select([], [early], [], 10)[1]
        assert early.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0


def test_a_connection_that_was_half_made_when_others_were_refused_is_heard(opened, monkeypatch, host):
    """It inherits the limit on hops that stands in for the filter; what was dropped comes again."""
    monkeypatch.setattr(sockets, "SO_ATTACH_FILTER", 9999)
    listening = opened(host, 0)[0][0]
    with socket.create_connection(listening.getsockname()[:2], timeout=10) as client:
        accepted, _ = listening.accept()
        with accepted:
            accepted.settimeout(0.2)
            refuse_connections(accepted)  # what it would have inherited
            client.sendall(b"question")
            with pytest.raises(TimeoutError):
                accepted.recv(100)
            admit(accepted)
            accepted.settimeout(10)
            assert accepted.recv(100) == b"question"
