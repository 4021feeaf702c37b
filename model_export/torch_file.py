"""
What torch.save wrote, read as data: nothing that the file names is imported, called or built.

A pickle is a program, and a file may hold any. The interpreter here knows lists, dictionaries, numbers, text and
tensors; every class, function, call and object state becomes an inert stand-in. Both of torch's formats are read: the
zip archive and the stream of pickles that came before torch 1.6.
"""

from __future__ import annotations

import io
import pickletools
import struct
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from training.checkpoint import CheckpointError

MOST_PICKLE_BYTES = 2**21  # 2 MiB, at worst 150 MB in memory; 1,200 tensors and their optimiser take 0.3 MiB
LARGEST_KEY = 2**63  # of the whole numbers that a dictionary may have as keys
MOST_AXES = 8
ZIP_MAGIC = b"PK\x03\x04"
TAR_MAGIC, TAR_MAGIC_AT = b"ustar", 257
STREAM_MAGIC, STREAM_VERSION = 0x1950A86A20F9469CFC6C, 1001
OTHER_BYTE_ORDER = "was written on a big-endian machine; load and save it once on another"

_DTYPES = {
    "FloatStorage": torch.float32, "DoubleStorage": torch.float64, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8, "BoolStorage": torch.bool,
}  # fmt: skip
_PUSHED = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE", "SHORT_BINUNICODE",
    "BINUNICODE", "BINUNICODE8", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8",
    "BYTEARRAY8",
}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}


class TorchFileError(CheckpointError):
    """A file that torch.save has not written, or one that is damaged, or that holds what is not read here."""


@dataclass(frozen=True)
class Global:
    """The name of a class or function that the file refers to."""

    module: str
    name: str


@dataclass(frozen=True)
class Inert:
    """In place of an object that the file wants made by calling a class or function; it has nothing of the object."""


@dataclass(frozen=True)
class Storage:
    """`numel` numbers that lie in the file under `key`."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def n_bytes(self) -> int:
        """Of all numbers."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Stored:
    """A tensor that still lies in the file; offset and strides count numbers of the storage and lie inside it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class TorchFile:
    """
    An open file.

    Attributes:
        content: lists, tuples, dictionaries, text, numbers, None, and `Stored`, `Storage`, `Global` and `Inert`.
    """

    path: Path
    content: Any
    _bytes_of: Callable[[Storage], bytes]

    def tensor(self, stored: Stored) -> Tensor:
        """
        The numbers of a tensor.

        Raises:
            TorchFileError: where they are missing, damaged, or more or fewer than the file says.
        """
        with _naming(self.path):
            content = self._bytes_of(stored.storage)
            if len(content) != stored.storage.n_bytes:
                raise TorchFileError(f"storage {stored.storage.key[:50]!r} is cut short")
        if 0 in stored.shape:
            return torch.empty(stored.shape, dtype=stored.storage.dtype)
        flat = torch.frombuffer(bytearray(content), dtype=stored.storage.dtype)
        return flat.as_strided(stored.shape, stored.strides, stored.offset).clone()


@contextmanager
def open_torch_file(path: Path) -> Iterator[TorchFile]:
    """
    Read the structure of a file; tensors are read when they are asked for.

    Raises:
        TorchFileError: naming the file and what is wrong with it.
    """
    with _naming(path):
        file = path.open("rb")
    with file:
        with _naming(path):
            content, bytes_of = _open(file)
        yield TorchFile(path, content, bytes_of)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Errors of what is done inside become TorchFileErrors that begin with the file's name."""
    try:
        yield
    except TorchFileError as error:
        raise TorchFileError(f"{path}: {error}") from None
    except (zipfile.BadZipFile, NotImplementedError, EOFError, OSError, ValueError, struct.error) as error:
        raise TorchFileError(f"{path}: cannot be read ({str(error)[:200]})") from None


def interpret(stream: BinaryIO, storages: dict[str, Storage] | None = None) -> Any:
    """
    The value that a pickle describes, as the content of a `TorchFile`; the stream is left behind its last byte.

    Args:
        storages: receives every storage that is referred to, by its key.

    Raises:
        TorchFileError: for what torch.save does not write.
    """
    stack: list[Any] = []
    marked: list[list[Any]] = []  # the stacks below each mark
    memo: dict[int, Any] = {}
    found = {} if storages is None else storages

    def above_mark() -> list[Any]:
        """What lies above the last mark. To be called in a statement of its own: it replaces `stack`."""
        nonlocal stack
        above, stack = stack, marked.pop()
        return above

    try:
        opcodes: Iterable[tuple[pickletools.OpcodeInfo, Any, int | None]] = pickletools.genops(stream)
        for opcode, argument, _ in opcodes:
            match opcode.name:
                case "PROTO" | "FRAME":
                    pass
                case "STOP":
                    return stack.pop()
                case name if name in _PUSHED:
                    stack.append(argument)
                case name if name in _CONSTANTS:
                    stack.append(_CONSTANTS[name])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_LIST" | "EMPTY_SET":
                    stack.append([])
                case "MARK":
                    marked.append(stack)
                    stack = []
                case "POP_MARK":
                    above_mark()
                case "POP":
                    stack.pop()
                case "LIST" | "FROZENSET":
                    items = above_mark()
                    stack.append(items)
                case "TUPLE":
                    items = above_mark()
                    stack.append(tuple(items))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    length = int(opcode.name[-1])
                    if len(stack) < length:
                        raise IndexError("a tuple of more than there is")
                    stack[-length:] = [tuple(stack[-length:])]
                case "DICT":
                    filled: dict[Any, Any] = {}
                    items = above_mark()
                    _set_items(filled, items)
                    stack.append(filled)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                case "SETITEMS":
                    items = above_mark()
                    _set_items(stack[-1], items)
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "APPENDS" | "ADDITEMS":
                    items = above_mark()
                    _extend(stack[-1], items)
                case "PUT" | "BINPUT" | "LONG_BINPUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "GET" | "BINGET" | "LONG_BINGET":
                    stack.append(memo[argument])
                case "GLOBAL":
                    module, _, attribute = argument.partition(" ")
                    stack.append(Global(module, attribute))
                case "STACK_GLOBAL":
                    attribute, module = stack.pop(), stack.pop()
                    stack.append(Global(_as(str, module), _as(str, attribute)))
                case "REDUCE" | "NEWOBJ":
                    arguments, function = stack.pop(), stack.pop()
                    stack.append(_called(function, arguments))
                case "NEWOBJ_EX":
                    del stack[-3:]
                    stack.append(Inert())
                case "INST" | "OBJ":
                    above_mark()
                    stack.append(Inert())
                case "BUILD":  # the state of an object, of which nothing is kept
                    stack.pop()
                case "BINPERSID":
                    named = stack.pop()
                    if isinstance(named, tuple) and named[:1] == ("module",):  # a class with its source code beside it
                        stack.append(Inert())
                        continue
                    storage = _storage(named)
                    if found.setdefault(storage.key, storage) != storage:
                        raise TorchFileError(f"storage {storage.key[:50]!r} has two sizes or types")
                    stack.append(storage)
                case unknown:
                    raise TorchFileError(f"opcode {unknown} is none that torch.save writes")
    except TorchFileError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, struct.error) as error:
        raise TorchFileError(f"is no pickle, or a damaged one ({type(error).__name__}: {str(error)[:200]})") from None
    raise TorchFileError("is a pickle without an end")


def _set_items(target: Any, flat: list[Any]) -> None:
    """`flat` is key, value, key, value. Only keys that cannot be made to collide are taken."""
    if isinstance(target, Inert):
        return
    content = _as(dict, target)
    for key, value in zip(flat[::2], flat[1::2], strict=True):
        if not (key is None or type(key) in (str, bool) or (type(key) is int and abs(key) < LARGEST_KEY)):
            raise TorchFileError(f"a dictionary has a key that is {_kind(key)}; text and whole numbers are read")
        content[key] = value


def _extend(target: Any, items: list[Any]) -> None:
    if not isinstance(target, Inert):
        _as(list, target).extend(items)


def _called(function: Any, arguments: Any) -> Any:
    """What stands for function(*arguments)."""
    match function:
        case Global("collections", "OrderedDict") if arguments == ():
            return {}
        case Global("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2"):
            return _tensor(arguments)
        case Global("torch._utils", "_rebuild_parameter") if isinstance(arguments, tuple) and arguments:
            return arguments[0]
        case _:
            return Inert()


def _storage(persistent_id: Any) -> Storage:
    """("storage", type, key, device, numel), and in the stream None, or where it is a part of another storage."""
    match persistent_id:
        case ("storage", Global("torch", kind), str(key), str(), int(numel)) if type(numel) is int:
            pass
        case ("storage", Global("torch", kind), str(key), str(), int(numel), None) if type(numel) is int:
            pass
        case ("storage", Global("torch", str()), str(), str(), int(), tuple()):
            raise TorchFileError("holds storages that are parts of others; load and save it once with a later torch")
        case _:
            raise TorchFileError("has a persistent id that names no storage")
    if kind not in _DTYPES:
        raise TorchFileError(f"storage {key[:50]!r} is a torch.{kind[:50]}; read are {', '.join(sorted(_DTYPES))}")
    if not 0 <= numel < LARGEST_KEY:
        raise TorchFileError(f"storage {key[:50]!r} is said to hold {numel} numbers")
    return Storage(key, _DTYPES[kind], numel)


def _tensor(arguments: Any) -> Stored:
    """(storage, offset, shape, strides, ...), all inside the storage."""
    match arguments:
        case (Storage() as storage, int(offset), tuple(shape), tuple(strides), *_):
            pass
        case _:
            raise TorchFileError("has a tensor without storage, offset, shape and strides")
    if (
        len(shape) > MOST_AXES
        or len(shape) != len(strides)
        or any(type(value) is not int or not 0 <= value < LARGEST_KEY for value in (offset, *shape, *strides))
    ):
        raise TorchFileError(f"has a tensor in storage {storage.key[:50]!r} whose offset, shape or strides cannot be")
    if 0 not in shape:
        last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        if last >= storage.numel:
            raise TorchFileError(
                f"has a tensor of shape {shape[:8]} that reaches number {last} of storage {storage.key[:50]!r}, "
                f"which holds {storage.numel}"
            )
    return Stored(storage, offset, shape, strides)


def _as(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"{_kind(value)} where {kind.__name__} is expected")
    return value


def _kind(value: Any) -> str:
    return "a " + type(value).__name__


def _open(file: BinaryIO) -> tuple[Any, Callable[[Storage], bytes]]:
    """The content, and what reads a storage."""
    start = file.read(len(ZIP_MAGIC))
    file.seek(0)
    if start == ZIP_MAGIC:
        return _open_archive(file)
    if start.startswith(b"\x80"):
        return _open_stream(file)
    if file.read(TAR_MAGIC_AT + len(TAR_MAGIC))[TAR_MAGIC_AT:] == TAR_MAGIC:
        raise TorchFileError("is a tar archive, torch's first format; load and save it once with a later torch")
    raise TorchFileError(f"is no file of torch.save; it begins with the bytes {start!r}")


def _open_archive(file: BinaryIO) -> tuple[Any, Callable[[Storage], bytes]]:
    """The zip format: NAME/data.pkl, and NAME/data/KEY for each storage; nothing is compressed."""
    size = file.seek(0, io.SEEK_END)
    archive = zipfile.ZipFile(file)
    entries = {entry.filename: entry for entry in archive.infolist()}
    names = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(names) != 1 or len(entries) != len(archive.infolist()):
        raise TorchFileError("is a zip archive, but not torch's, which has one NAME/data.pkl and no name twice")
    root = names[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise TorchFileError("is a TorchScript program; a checkpoint is a dictionary with a state_dict")

    def read(name: str, n_bytes: int | None) -> bytes:
        entry = entries.get(root + name)
        if entry is None:
            raise TorchFileError(f"{name[:60]} is missing in the archive")
        if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
            raise TorchFileError(f"{name[:60]} is compressed or encrypted, which torch.save never does")
        if entry.file_size > (size if n_bytes is not None else min(size, MOST_PICKLE_BYTES)):
            raise TorchFileError(f"{name[:60]} is said to have {entry.file_size} bytes, too many for what it is")
        if n_bytes is not None and entry.file_size != n_bytes:
            raise TorchFileError(f"{name[:60]} has {entry.file_size} bytes, its tensors say {n_bytes}")
        return archive.read(entry)

    if f"{root}byteorder" in entries and read("byteorder", None) != b"little":
        raise TorchFileError(OTHER_BYTE_ORDER)
    content = interpret(io.BytesIO(read("data.pkl", None)))
    return content, lambda storage: read(f"data/{storage.key}", storage.n_bytes)


def _open_stream(file: BinaryIO) -> tuple[Any, Callable[[Storage], bytes]]:
    """The format before torch 1.6: magic number, version, system, content and storage keys as pickles; then numbers."""
    head = io.BytesIO(file.read(MOST_PICKLE_BYTES))
    size = file.seek(0, io.SEEK_END)
    if interpret(head) != STREAM_MAGIC or interpret(head) != STREAM_VERSION:
        raise TorchFileError("is a pickle, but none of torch.save")
    system = interpret(head)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise TorchFileError(OTHER_BYTE_ORDER)
    declared: dict[str, Storage] = {}
    content = interpret(head, declared)
    keys = interpret(head)
    if not isinstance(keys, list) or any(type(key) is not str for key in keys) or sorted(keys) != sorted(declared):
        raise TorchFileError("lists other storages than its tensors are in")
    places: dict[str, int] = {}
    position = head.tell()
    for key in keys:
        storage = declared[key]
        file.seek(position)
        numel = int.from_bytes(file.read(8), "little", signed=True)
        if numel != storage.numel:
            raise TorchFileError(f"storage {key[:50]!r} has {numel} numbers, its tensors say {storage.numel}")
        places[key] = position + 8
        position += 8 + storage.n_bytes
        if position > size:
            raise TorchFileError(f"storage {key[:50]!r} is cut short: {position - size} bytes are missing")

    def bytes_of(storage: Storage) -> bytes:
        file.seek(places[storage.key])
        return file.read(storage.n_bytes)

    return content, bytes_of
