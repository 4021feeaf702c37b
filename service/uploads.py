"""From a request's body to the image files in it, never holding more than the limits allow."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from types import TracebackType
from typing import Final

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.types import Receive

from service.errors import ClientGoneError, ServiceError

MAX_FILENAME: Final = 255  # characters of a client's file name that we repeat
MAX_PART_HEADERS: Final = 16
MAX_PART_HEADER_BYTES: Final = 4096
MAX_EMPTY_PARTS: Final = 16  # besides the images: those of file inputs that were left empty


@dataclass(frozen=True, slots=True)
class Upload:
    """One image file as it came; a raw body has no name."""

    filename: str | None
    data: bytes


class UploadMemory:
    """Counts the bytes of all bodies that are held at once, and refuses what would exceed the limit."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0

    def lease(self) -> "MemoryLease":
        """A share that grows with a body and is given back as a whole."""
        return MemoryLease(self)


class MemoryLease:
    """What one request holds of the `UploadMemory`; leave its `with` block to give it back."""

    def __init__(self, memory: UploadMemory) -> None:
        self._memory = memory
        self._held = 0

    def __enter__(self) -> "MemoryLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Give all of it back."""
        self._memory.held -= self._held
        self._held = 0

    def grow(self, n_bytes: int) -> None:
        """Take `n_bytes` more, or raise ServiceError overloaded."""
        memory = self._memory
        if memory.held + n_bytes > memory.limit:
            raise ServiceError(
                "overloaded",
                f"uploads of {memory.held:,} bytes are held, the limit is {memory.limit:,} "
                "(RIDE_MAX_INFLIGHT_BYTES); retry in 1 s",
                retry_after=1,
            )
        memory.held += n_bytes
        self._held += n_bytes


class Body:
    """
    A request's body as it arrives.

    Attributes:
        complete: whether all of it has been received.
    """

    def __init__(self, headers: Iterable[tuple[bytes, bytes]], receive: Receive) -> None:
        named = dict(headers)
        self.content_type = named.get(b"content-type", b"").decode("latin-1")
        self.declared = int(length) if (length := named.get(b"content-length", b"")).isdigit() else 0
        self.complete = False
        self._waits_for_continue = named.get(b"expect", b"").lower() == b"100-continue"
        self._receive = receive

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body piece by piece; raises ClientGoneError if the client hangs up before its end."""
        while not self.complete:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            self._waits_for_continue = False
            self.complete = not message.get("more_body", False)
            yield message.get("body", b"")

    async def discard(self, limit: int, seconds: float) -> None:
        """
        Read on for a while, at most `limit` bytes and a piece, without keeping anything.

        A client that waits for "100 Continue" is better off without: it will not send at all.
        """
        if self._waits_for_continue:
            return
        try:
            async with asyncio.timeout(seconds):
                async for chunk in self.chunks():
                    limit -= len(chunk)
                    if limit < 0:
                        return
        except (TimeoutError, ClientGoneError):
            return

    async def client_gone(self) -> None:
        """Return when the client hangs up. Only once the body is complete."""
        while (await self._receive())["type"] != "http.disconnect":
            pass


async def read_uploads(body: Body, lease: MemoryLease, *, max_bytes: int, max_images: int) -> list[Upload]:
    """
    Receive a body, multipart or raw, and return the files in it, at least one.

    Raises:
        ServiceError: request_too_large, too_many_images, no_image, image_unreadable, parameter_invalid, overloaded.
        ClientGoneError: when the client hangs up first.
    """
    if body.declared > max_bytes:
        raise _too_large(body.declared, max_bytes)
    reader = _reader_of(body.content_type, max_images)
    received = 0
    try:
        async for chunk in body.chunks():
            received += len(chunk)
            if received > max_bytes:
                raise _too_large(received, max_bytes)
            lease.grow(len(chunk))
            reader.write(chunk)
        uploads = reader.finish()
    finally:
        reader.close()
    if not uploads:
        raise ServiceError(
            "no_image",
            f"body of {received:,} bytes holds no file; send an image as the body, or as multipart/form-data",
        )
    return uploads


def uploads_in(content_type: str, data: bytes, *, max_images: int) -> list[Upload]:
    """The files in a body that is here as a whole; what `read_uploads` raises but for sizes and hang-ups."""
    reader = _reader_of(content_type, max_images)
    try:
        reader.write(data)
        return reader.finish()
    finally:
        reader.close()


def _reader_of(content_type: str, max_images: int) -> "_Raw | _Multipart":
    kind, options = parse_options_header(content_type)
    return _Multipart(options.get(b"boundary", b""), max_images) if kind == b"multipart/form-data" else _Raw()


def _too_large(size: int, limit: int) -> ServiceError:
    return ServiceError(
        "request_too_large",
        f"body of {size:,} bytes or more, the limit is {limit:,} (RIDE_MAX_BYTES); send fewer or smaller images",
    )


class _Raw:
    """A body that is one image file. It grows in one place: the pieces of many at once would leave holes in memory."""

    def __init__(self) -> None:
        self._data = bytearray()

    def write(self, chunk: bytes) -> None:
        self._data += chunk

    def finish(self) -> list[Upload]:
        return [Upload(None, bytes(self._data))] if self._data else []

    def close(self) -> None:
        self._data = bytearray()


class _Multipart:
    """A multipart/form-data body: each part that is a file becomes an upload, whatever its field is called."""

    def __init__(self, boundary: bytes, max_images: int) -> None:
        if not boundary:
            raise ServiceError(
                "no_image", "multipart/form-data without a boundary; let your HTTP client set Content-Type"
            )
        self._max_images = max_images
        self._uploads: list[Upload] = []
        self._parts = 0
        self._ended = False
        self._header_name = bytearray()
        self._header_value = bytearray()
        try:
            self._parser = MultipartParser(
                boundary,
                {
                    "on_part_begin": self._on_part_begin,
                    "on_header_field": self._on_header_field,
                    "on_header_value": self._on_header_value,
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers_finished,
                    "on_part_data": self._on_part_data,
                    "on_part_end": self._on_part_end,
                    "on_end": self._on_end,
                },
                max_header_count=MAX_PART_HEADERS,
                max_header_size=MAX_PART_HEADER_BYTES,
            )
        except FormParserError as error:
            raise ServiceError("no_image", f"multipart/form-data: {error}") from error

    def write(self, chunk: bytes) -> None:
        if not chunk:
            return
        try:
            self._parser.write(chunk)
        except FormParserError as error:
            raise ServiceError(
                "image_unreadable",
                f"multipart body breaks the rules in file {len(self._uploads) + 1} ({error}); is its boundary right?",
            ) from error

    def finish(self) -> list[Upload]:
        if not self._ended:
            raise ServiceError(
                "image_unreadable",
                f"multipart body ends before its closing boundary, after {len(self._uploads)} complete files; "
                "was the upload cut short?",
            )
        return self._uploads

    def close(self) -> None:
        """Let go of the parser, which holds on to this object: together they would stay until the next collection."""
        del self._parser

    def _on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._max_images + MAX_EMPTY_PARTS:
            raise ServiceError(
                "too_many_images",
                f"more than {self._max_images + MAX_EMPTY_PARTS} files in one request, empty ones included; the limit "
                f"is {self._max_images} images (RIDE_MAX_IMAGES); send several requests",
            )
        self._headers: dict[bytes, bytes] = {}
        self._data = bytearray()

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._headers.get(b"content-disposition", b""))
        if b"filename" in options:
            self._filename = options[b"filename"].decode("utf-8", "replace")[:MAX_FILENAME]
        elif self._headers.get(b"content-type", b"").startswith((b"image/", b"application/octet-stream")):
            self._filename = ""
        else:
            field = options.get(b"name", b"").decode("utf-8", "replace")[:MAX_FILENAME]
            raise ServiceError(
                "parameter_invalid",
                f"form field {field!r} is no file; parameters belong in the query, such as ?top_k=3",
            )
        if len(self._uploads) == self._max_images:
            raise ServiceError(
                "too_many_images",
                f"more than {self._max_images} images in one request, the limit (RIDE_MAX_IMAGES); send several "
                "requests",
            )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        self._data += memoryview(data)[start:end]

    def _on_part_end(self) -> None:
        data = bytes(self._data)
        self._data = bytearray()
        if data or self._filename:  # a browser sends an empty, nameless file for an empty file input
            self._uploads.append(Upload(self._filename or None, data))

    def _on_end(self) -> None:
        self._ended = True
