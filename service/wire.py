"""What the processes of one service say to each other: JSON with its length before it, dataclasses field by field."""

import asyncio
import struct
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import fields
from operator import attrgetter
from typing import Any, Final, Generic, TypeVar, cast

import orjson

Data = TypeVar("Data")

LENGTH: Final = struct.Struct("<I")


def pack(message: Any) -> bytes:
    """A message, ready to be sent."""
    body = orjson.dumps(message)
    return LENGTH.pack(len(body)) + body


class Packer(Generic[Data]):
    """Turns a dataclass of finite numbers, words and lists of them into a list and back."""

    def __init__(self, kind: type[Data], *, without: Sequence[str] = ()) -> None:
        """
        Args:
            without: fields that travel in another way, or not at all.
        """
        self._kind = kind
        self._names = [field.name for field in fields(kind) if field.name not in without]  # type: ignore[arg-type]
        self._values: Callable[[Data], tuple[Any, ...]] = attrgetter(*self._names)

    def values(self, data: Data) -> tuple[Any, ...]:
        """What travels."""
        return self._values(data)

    def data(self, values: Sequence[Any], **others: Any) -> Data:
        """What arrived, with the fields that did not travel."""
        return self._kind(**dict(zip(self._names, values, strict=True)), **others)


class Connection(asyncio.Protocol, ABC):
    """One end of a connection: cuts what arrives into messages, and puts what is sent in one go into one."""

    def __init__(self) -> None:
        self._pieces = bytearray()
        self._outgoing: list[Any] = []
        self.transport: asyncio.Transport

    @abstractmethod
    def received(self, message: list[Any]) -> None:
        """What the other side sent since the last time."""

    def send(self, item: Any) -> None:
        """Send an item soon, in one list with whatever else is sent until the event loop turns."""
        if not self._outgoing:
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append(item)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Part of asyncio.Protocol."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is one in all but name

    def data_received(self, data: bytes) -> None:
        """Part of asyncio.Protocol."""
        self._pieces += data
        start = 0
        while len(self._pieces) - start >= LENGTH.size:
            begin = start + LENGTH.size
            end = begin + LENGTH.unpack_from(self._pieces, start)[0]
            if end > len(self._pieces):
                break
            self.received(orjson.loads(bytes(self._pieces[begin:end])))
            start = end
        del self._pieces[:start]

    def _flush(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(pack(self._outgoing))
        self._outgoing = []
