"""What the relocations of x86-64 and AArch64 do, as far as position-independent code needs them."""

from __future__ import annotations

import struct

from graphopt.kernels.elf import AARCH64, X86_64, LinkError

CALLS = {X86_64: {4}, AARCH64: {282, 283}}  # may go through a stub
GOT = {X86_64: {9, 41, 42}, AARCH64: {311, 312}}  # read the address from the table of addresses
WORD = {X86_64: 1, AARCH64: 257}  # a 64-bit address in data
RELATIVE = {X86_64: 8, AARCH64: 1027}  # for the loader: base of the library plus addend
RESOLVED = {X86_64: 6, AARCH64: 1025}  # for the loader: address of an import

_PAGE_OFFSETS = {278: 0, 284: 1, 285: 2, 286: 3, 299: 4, 312: 3}  # AArch64 loads and stores: log2 of the size


def _store32(out: bytearray, place: int, value: int, name: str) -> None:
    if not -(2**31) <= value < 2**31:
        raise LinkError(f"{name} is out of reach")
    struct.pack_into("<i", out, place, value)


def apply(out: bytearray, machine: int, kind: int, place: int, target: int, name: str) -> None:
    """Set the place in the file for a target address, addend included; file offsets are addresses."""
    if machine == AARCH64:
        _apply_aarch64(out, kind, place, target, name)
    elif kind in (2, 4) or kind in GOT[X86_64]:  # relative to the instruction
        _store32(out, place, target - place, name)
    elif kind == 24:
        struct.pack_into("<q", out, place, target - place)
    else:
        raise LinkError(f"x86-64 relocation {kind} of {name} is not supported")


def _page(instruction: int, pages: int) -> int:
    """ADRP with this distance in pages of 4 KB."""
    return instruction & 0x9F00001F | (pages & 3) << 29 | (pages >> 2 & 0x7FFFF) << 5


def _apply_aarch64(out: bytearray, kind: int, place: int, target: int, name: str) -> None:
    (instruction,) = struct.unpack_from("<I", out, place)
    distance = target - place
    if kind == 261:
        _store32(out, place, distance, name)
        return
    if kind == 260:
        struct.pack_into("<q", out, place, distance)
        return
    if kind in CALLS[AARCH64]:
        if not -(2**27) <= distance < 2**27:
            raise LinkError(f"{name} is out of reach of a call")
        instruction = instruction & 0xFC000000 | distance >> 2 & 0x3FFFFFF
    elif kind in (275, 276, 311):
        instruction = _page(instruction, (target >> 12) - (place >> 12))
    elif kind == 277:
        instruction = instruction & ~(0xFFF << 10) | (target & 0xFFF) << 10
    elif kind in _PAGE_OFFSETS:
        shift = _PAGE_OFFSETS[kind]
        if target & ((1 << shift) - 1):
            raise LinkError(f"{name} is not aligned for the instruction that reads it")
        instruction = instruction & ~(0xFFF << 10) | (target & 0xFFF) >> shift << 10
    else:
        raise LinkError(f"AArch64 relocation {kind} of {name} is not supported")
    struct.pack_into("<I", out, place, instruction)


def call_stub(machine: int, here: int, slot: int) -> bytes:
    """16 bytes of code that jump to the address in a slot."""
    if machine == X86_64:  # endbr64; jmp [rip + slot]
        return b"\xf3\x0f\x1e\xfa\xff\x25" + struct.pack("<i", slot - (here + 10)) + b"\xcc" * 6
    adrp = _page(0x90000010, (slot >> 12) - (here >> 12))  # adrp x16; ldr x17, [x16, slot]; br x17; nop
    return struct.pack("<4I", adrp, 0xF9400211 | ((slot & 0xFFF) >> 3) << 10, 0xD61F0220, 0xD503201F)
