"""A linker for what LLVM emits: relocatable objects become one shared library. Linux on x86-64 and AArch64.

Only the relocations of position-independent code without a runtime are known; any other one is an error, never a guess. Symbols
that no object defines must be in an explicit list of imports, which the system's loader resolves.
"""

from __future__ import annotations

import struct
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.kernels.elf import AARCH64, NOBITS, LinkError, Object, Relocation, Section, Symbol
from graphopt.kernels.relocations import CALLS, GOT, RELATIVE, RESOLVED, WORD, apply, call_stub

_HEADERS = 64 + 5 * 56
_STUB = 16


def _up(value: int, align: int) -> int:
    return (value + align - 1) // align * align


@dataclass
class _Image:
    """A library in the making."""

    machine: int
    exports: list[Symbol]
    imports: list[Symbol] = field(default_factory=list)
    got: dict[Symbol, int] = field(default_factory=dict)  # address of a symbol's slot in the table of addresses
    stubs: dict[Symbol, int] = field(default_factory=dict)  # address of an import's call stub
    read: list[Section] = field(default_factory=list)
    code: list[Section] = field(default_factory=list)
    data: list[Section] = field(default_factory=list)


def _resolve(objects: Sequence[Object], allowed: Collection[str]) -> list[Relocation]:
    """All relocations, with every symbol replaced by its definition; an import is one symbol for all objects."""
    defined: dict[str, Symbol] = {}
    for symbol in (s for o in objects for s in o.symbols if s.defined and not s.local):
        if symbol.name in defined:
            raise LinkError(f"symbol {symbol.name} is defined twice")
        defined[symbol.name] = symbol
    relocations = [r for o in objects for r in o.relocations]
    missing = sorted({r.symbol.name for r in relocations if not r.symbol.defined} - set(defined) - set(allowed))
    if missing:
        raise LinkError(f"undefined symbols: {', '.join(missing)}. A library may import only: {', '.join(sorted(allowed))}")
    for relocation in relocations:
        if not relocation.symbol.defined:
            relocation.symbol = defined.setdefault(relocation.symbol.name, relocation.symbol)
        elif relocation.symbol.section is None and relocation.symbol.kind == 3:
            raise LinkError("reference to a section that is not loaded")
    return relocations


def _place(sections: Sequence[Section], offset: int, least: int) -> int:
    for section in sections:
        offset = _up(offset, max(section.align, least))
        section.address = offset
        offset += section.size
    return offset


def _hash_table(count: int) -> bytes:
    """DT_HASH with one bucket that chains all symbols."""
    chain = [0, *[(i + 1) % count for i in range(1, count)]]
    return struct.pack(f"<{3 + count}I", 1, count, 1 if count > 1 else 0, *chain)


def _segment(kind: int, flags: int, start: int, file_end: int, memory_end: int, align: int) -> bytes:
    return struct.pack("<IIQQQQQQ", kind, flags, start, start, start, file_end - start, memory_end - start, align)


def link(
    objects: Sequence[Object],
    exports: Sequence[str],
    allowed: Collection[str],
    soname: str = "graphopt.so",
    providers: Mapping[str, Collection[str]] = {},
) -> tuple[bytes, list[str]]:
    """(the library, the names of its imports). `providers` are libraries to load for some of the imports, by file name.

    Raises LinkError for a symbol that is neither defined nor allowed, an export that is not defined, an unknown relocation.
    """
    machine = objects[0].machine
    relocations = _resolve(objects, allowed)
    names = {s.name: s for o in objects for s in o.symbols if s.defined and not s.local}
    lacking = [e for e in exports if e not in names]
    if lacking:
        raise LinkError(f"exports that are not defined: {', '.join(lacking)}")
    image = _Image(machine, [names[e] for e in exports])
    for relocation in relocations:
        symbol = relocation.symbol
        if not symbol.defined and symbol not in image.imports:
            image.imports.append(symbol)
        if relocation.kind in GOT[machine] or not symbol.defined:
            image.got.setdefault(symbol, 0)
    sections = [s for o in objects for s in o.sections]
    image.code = [s for s in sections if s.executable]
    image.read = [s for s in sections if not s.executable and not s.writable]
    image.data = sorted((s for s in sections if s.writable), key=lambda s: s.kind == NOBITS)
    imports = [s.name for s in image.imports]
    needed = [file for file, names_ in providers.items() if set(names_) & set(imports)]
    return _write(image, relocations, soname, needed), imports


def _write(image: _Image, relocations: Sequence[Relocation], soname: str, needed: Sequence[str]) -> bytes:
    """Lay the image out, apply the relocations, and write the file."""
    page = 0x10000 if image.machine == AARCH64 else 0x1000  # AArch64 kernels may use pages of 64 KB
    dynamic_symbols = [*image.imports, *image.exports]
    strings = b"\0" + b"".join(s.name.encode() + b"\0" for s in dynamic_symbols)
    strings += b"".join(name.encode() + b"\0" for name in (soname, *needed))
    hashes = _hash_table(len(dynamic_symbols) + 1)
    words = sum(r.kind == WORD[image.machine] for r in relocations) + len(image.got)

    hash_at = _up(_HEADERS, 8)
    symbols_at = _up(hash_at + len(hashes), 8)
    strings_at = symbols_at + 24 * (len(dynamic_symbols) + 1)
    rela_at = _up(strings_at + len(strings), 8)
    read_end = _place(image.read, rela_at + 24 * words, 1)
    code_at = _up(read_end, page)
    stubs_at = _up(_place(image.code, code_at, 16), 16)
    image.stubs = {symbol: stubs_at + _STUB * i for i, symbol in enumerate(image.imports)}
    code_end = stubs_at + _STUB * len(image.imports)
    dynamic_at = _up(code_end, page)
    tags = [(1, strings.index(b"\0" + name.encode() + b"\0") + 1) for name in needed]
    tags += [(14, strings.index(b"\0" + soname.encode() + b"\0") + 1), (4, hash_at), (6, symbols_at), (5, strings_at)]
    tags += [(10, len(strings)), (11, 24), (7, rela_at), (8, 24 * words), (9, 24), (30, 8), (0x6FFFFFFB, 1), (0, 0)]
    got_at = dynamic_at + 16 * len(tags)
    image.got = {symbol: got_at + 8 * i for i, symbol in enumerate(image.got)}
    data_at = got_at + 8 * len(image.got)
    data_end = _place([s for s in image.data if s.kind != NOBITS], data_at, 1)
    memory_end = _place([s for s in image.data if s.kind == NOBITS], data_end, 1)

    out = bytearray(data_end)
    for section in [*image.read, *image.code, *image.data]:
        if section.kind != NOBITS:
            out[section.address : section.address + section.size] = section.content
    rela = _relocate(out, image, relocations, {s: i + 1 for i, s in enumerate(dynamic_symbols)})
    assert len(rela) == words
    rela.sort(key=lambda entry: entry[1] & 0xFFFFFFFF != RELATIVE[image.machine])
    table = b"".join(struct.pack("<QQq", *entry) for entry in rela)
    header = struct.pack("<HHIQQQIHHHHHH", 3, image.machine, 1, 0, 64, 0, 0, 64, 56, 5, 0, 0, 0)
    segments = (
        _segment(1, 4, 0, read_end, read_end, page)
        + _segment(1, 5, code_at, code_end, code_end, page)
        + _segment(1, 6, dynamic_at, data_end, memory_end, page)
        + _segment(2, 6, dynamic_at, got_at, got_at, 8)
        + struct.pack("<IIQQQQQQ", 0x6474E551, 6, 0, 0, 0, 0, 0, 16)  # GNU_STACK: not executable
    )
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)
    parts = ((0, b"\x7fELF\x02\x01\x01" + bytes(9) + header + segments), (hash_at, hashes), (symbols_at, _symbols(dynamic_symbols)))
    for offset, part in (*parts, (strings_at, strings), (rela_at, table), (dynamic_at, dynamic)):
        out[offset : offset + len(part)] = part
    return bytes(out)


def _symbols(symbols: Sequence[Symbol]) -> bytes:
    """The dynamic symbol table."""
    entries, name = [bytes(24)], 1
    for symbol in symbols:
        kind, section = (symbol.kind, 1) if symbol.defined else (0, 0)
        address, size = (symbol.address, symbol.size) if symbol.defined else (0, 0)
        entries.append(struct.pack("<IBBHQQ", name, 0x10 | kind, 0, section, address, size))
        name += len(symbol.name.encode()) + 1
    return b"".join(entries)


def _relocate(
    out: bytearray, image: _Image, relocations: Sequence[Relocation], index: dict[Symbol, int]
) -> list[tuple[int, int, int]]:
    """Set every place in the file; what only the loader can know comes back as (place, information, addend)."""
    machine, rela = image.machine, []
    for symbol, slot in image.got.items():
        if symbol.defined:
            rela.append((slot, RELATIVE[machine], symbol.address))
        else:
            rela.append((slot, index[symbol] << 32 | RESOLVED[machine], 0))
    for relocation in relocations:
        symbol, place = relocation.symbol, relocation.section.address + relocation.offset
        if relocation.kind == WORD[machine]:
            if symbol.defined:
                rela.append((place, RELATIVE[machine], symbol.address + relocation.addend))
            else:
                rela.append((place, index[symbol] << 32 | WORD[machine], relocation.addend))
            continue
        if relocation.kind in GOT[machine]:
            target = image.got[symbol]
        elif symbol.defined:
            target = symbol.address
        elif relocation.kind in CALLS[machine]:
            target = image.stubs[symbol]
        else:
            raise LinkError(f"the address of the import {symbol.name} is used in a way that is not supported")
        apply(out, machine, relocation.kind, place, target + relocation.addend, symbol.name)
    for symbol, stub in image.stubs.items():
        out[stub : stub + _STUB] = call_stub(machine, stub, image.got[symbol])
    return rela
