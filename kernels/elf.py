"""Relocatable ELF objects, as LLVM emits them, read into sections, symbols and relocations."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

X86_64, AARCH64 = 62, 183
NOBITS = 8
_ALLOC, _WRITE, _EXECUTE = 2, 1, 4


class LinkError(Exception):
    """An object that cannot be made into a library; says which symbol or relocation is to blame."""


@dataclass(eq=False)
class Section:
    """A part of an object that is loaded; `address` is set by the layout."""

    name: str
    kind: int
    writable: bool
    executable: bool
    align: int
    size: int
    content: bytes
    address: int = 0


@dataclass(eq=False)
class Symbol:
    """A name: defined in a section, absolute (`section` None, `defined` True), or undefined."""

    name: str
    local: bool
    kind: int
    defined: bool
    section: Section | None
    value: int
    size: int

    @property
    def address(self) -> int:
        """Where it is, once its section has its address."""
        return self.value + (self.section.address if self.section else 0)


@dataclass(eq=False)
class Relocation:
    """A place in a section that must be set once addresses are known."""

    section: Section
    offset: int
    kind: int
    symbol: Symbol
    addend: int


@dataclass
class Object:
    """What is loaded of an object file."""

    machine: int
    sections: list[Section] = field(default_factory=list)
    symbols: list[Symbol] = field(default_factory=list)
    relocations: list[Relocation] = field(default_factory=list)


def _text(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()


def _symbol(data: bytes, offset: int, names: int, sections: list[Section | None]) -> Symbol:
    name, info, _, index, value, size = struct.unpack_from("<IBBHQQ", data, offset)
    kind, label = info & 15, _text(data, names + name)
    if index == 0xFFF2 or kind == 6:
        raise LinkError(f"symbol {label}: common and thread-local symbols are not supported")
    section = sections[index] if 0 < index < 0xFF00 else None
    if 0 < index < 0xFF00 and kind == 3 and section is not None:
        label = section.name
    return Symbol(label, info >> 4 == 0, kind, index != 0, section, value, size)


def _section(data: bytes, header: tuple[int, ...], names: int) -> Section | None:
    """A section; None for one that is not loaded."""
    name, kind, flags, _, offset, size, _, _, align, _ = header
    label = _text(data, names + name)
    if not flags & _ALLOC or not size or label == ".eh_frame":  # nothing here unwinds
        return None
    if kind in (14, 15, 16):
        raise LinkError(f"section {label}: code that runs on loading is not supported")
    content = b"" if kind == NOBITS else data[offset : offset + size]
    return Section(label, kind, bool(flags & _WRITE), bool(flags & _EXECUTE), max(align, 1), size, content)


def read_object(data: bytes) -> Object:
    """The sections that are loaded, all symbols, and the relocations of those sections."""
    if data[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", data, 16)[0] != 1:
        raise LinkError("not a 64-bit little-endian relocatable ELF object")
    found = Object(struct.unpack_from("<H", data, 18)[0])
    if found.machine not in (X86_64, AARCH64):
        raise LinkError(f"ELF machine {found.machine} is not supported")
    (table,) = struct.unpack_from("<Q", data, 40)
    count, names_index = struct.unpack_from("<HH", data, 60)
    headers = [struct.unpack_from("<IIQQQQIIQQ", data, table + 64 * i) for i in range(count)]
    names = headers[names_index][4]
    sections = [_section(data, header, names) for header in headers]
    found.sections = [s for s in sections if s is not None]
    for _, kind, _, _, offset, size, link, _, _, _ in headers:
        if kind == 2:
            found.symbols = [_symbol(data, o, headers[link][4], sections) for o in range(offset, offset + size, 24)]
    for _, kind, _, _, offset, size, _, target, _, _ in headers:
        section = sections[target] if kind in (4, 9) else None
        if section is None:
            continue
        if kind == 9:
            raise LinkError(f"section {section.name}: relocations without addends are not supported")
        for o in range(offset, offset + size, 24):
            place, info, addend = struct.unpack_from("<QQq", data, o)
            found.relocations.append(Relocation(section, place, info & 0xFFFFFFFF, found.symbols[info >> 32], addend))
    return found
