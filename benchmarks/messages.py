"""HTTP requests as bytes, made once and sent many times; and one answer read at leisure."""

import http.client
import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

BOUNDARY: Final = "ride-benchmark-boundary"


@dataclass(frozen=True)
class Target:
    """Where requests go: http://host:port/path?query."""

    host: str
    port: int
    path: str

    @classmethod
    def parse(cls, url: str) -> "Target":
        """From a URL."""
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise ValueError(f"{url!r} is no URL that this load generator can ask; expected http://host:port/path")
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return cls(parts.hostname, parts.port or 80, path)


def post(target: Target, body: bytes, headers: Mapping[str, str]) -> bytes:
    """A POST request over a connection that is kept."""
    lines = [f"POST {target.path} HTTP/1.1", f"Host: {target.host}:{target.port}", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def raw_requests(target: Target, images: Sequence[bytes]) -> list[bytes]:
    """One request per JPEG, which is its body."""
    return [post(target, image, {"Content-Type": "image/jpeg"}) for image in images]


def multipart_requests(target: Target, images: Sequence[bytes], field: str = "file") -> list[bytes]:
    """One request per JPEG, as a browser or `curl -F` would send it."""
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{field}"; filename="image.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    ).encode()
    tail = f"\r\n--{BOUNDARY}--\r\n".encode()
    headers = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
    return [post(target, head + image + tail, headers) for image in images]


def ask(target: Target, request: bytes, timeout_s: float = 60.0) -> tuple[int, bytes]:
    """Send one request on a connection of its own; status and body of its answer."""
    with socket.create_connection((target.host, target.port), timeout=timeout_s) as connection:
        connection.sendall(request)
        answer = http.client.HTTPResponse(connection)
        answer.begin()
        return answer.status, answer.read()
