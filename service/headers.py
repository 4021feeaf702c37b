"""The request's id, and the headers that every answer carries."""

import random
import re
from collections.abc import Iterable
from typing import Final

REQUEST_ID: Final = re.compile(rb"[A-Za-z0-9._:-]{1,64}")
PAGE_POLICY: Final = (
    b"default-src 'self'; img-src 'self' blob: data:; object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
# Swagger UI starts itself by an inline script and sets inline styles.
DOCS_POLICY: Final = PAGE_POLICY + b"; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'"
Headers = list[tuple[bytes, bytes]]


def request_id_of(headers: Iterable[tuple[bytes, bytes]]) -> str:
    """The client's own id where it is a sane one, else a fresh one."""
    for name, value in headers:
        if name == b"x-request-id" and REQUEST_ID.fullmatch(value):
            return value.decode("ascii")
    return f"{random.getrandbits(128):032x}"


def common_headers(request_id: str, path: str) -> Headers:
    """The request's id, and what keeps a browser from doing more than our pages need."""
    return [
        (b"x-request-id", request_id.encode()),
        (b"x-content-type-options", b"nosniff"),
        (b"content-security-policy", DOCS_POLICY if path.startswith("/docs") else PAGE_POLICY),
    ]
