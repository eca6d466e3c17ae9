"""A shared library without code of its own: its one function jumps to an address that is written into it after loading.

onnxruntime takes custom operators from a library file, and the compiled functions are already in memory. The file is written here,
byte by byte: no compiler, assembler or linker is needed. Linux on x86-64 and AArch64; elsewhere see `graphopt.kernels.shim`.
"""

from __future__ import annotations

import ctypes
import os
import struct
import tempfile
from pathlib import Path

from graphopt.kernels.abi import machine

FUNCTION = "RegisterCustomOps"
SLOT = f"{FUNCTION}__slot"

_DYNAMIC_SIZE = 0x100
_ELF_MACHINE = {"x86_64": 62, "aarch64": 183}
_PAGE = {"x86_64": 0x1000, "aarch64": 0x10000}  # AArch64 kernels may use pages of 64 KB


def _stub(arch: str, here: int, slot: int) -> bytes:
    """Code at address `here`: jump to where `slot` points, or return 0 while that is null."""
    if arch == "x86_64":  # endbr64; mov rax, [rip + slot]; test rax, rax; je +2; jmp rax; xor eax, eax; ret
        return b"\xf3\x0f\x1e\xfa\x48\x8b\x05" + struct.pack("<i", slot - (here + 11)) + b"\x48\x85\xc0\x74\x02\xff\xe0\x31\xc0\xc3"
    page = (slot >> 12) - ((here + 4) >> 12)
    adrp = 0x90000010 | ((page & 3) << 29) | (((page >> 2) & 0x7FFFF) << 5)
    load = 0xF9400210 | (((slot & 0xFFF) >> 3) << 10)
    # bti c; adrp x16, slot; ldr x16, [x16]; cbz x16, +8; br x16; mov x0, 0; ret
    return struct.pack("<7I", 0xD503245F, adrp, load, 0xB4000050, 0xD61F0200, 0xD2800000, 0xD65F03C0)


def image(arch: str, soname: str = "graphopt_jit.so") -> bytes:
    """The library as bytes: exports `RegisterCustomOps` and the 8 bytes `RegisterCustomOps__slot`."""
    if arch not in _ELF_MACHINE:
        raise NotImplementedError(f"graphopt: no in-process custom operators on {arch}: only on {' and '.join(_ELF_MACHINE)}")
    page = _PAGE[arch]
    text, data = page, 2 * page
    slot = data + _DYNAMIC_SIZE
    names = [FUNCTION.encode(), SLOT.encode(), soname.encode()]
    strings = b"\0" + b"\0".join(names) + b"\0"
    at = [strings.index(b"\0" + n + b"\0") + 1 for n in names]
    code = _stub(arch, text, slot)
    symbols = (
        bytes(24) + struct.pack("<IBBHQQ", at[0], 0x12, 0, 2, text, len(code)) + struct.pack("<IBBHQQ", at[1], 0x11, 0, 3, slot, 8)
    )
    table = struct.pack("<6I", 1, 3, 1, 0, 2, 0)  # DT_HASH: one bucket that chains both symbols

    headers = 64 + 5 * 56
    hash_at = headers
    symbols_at = (hash_at + len(table) + 7) & ~7
    strings_at = symbols_at + len(symbols)
    size = strings_at + len(strings)
    tags = [(14, at[2]), (4, hash_at), (6, symbols_at), (5, strings_at), (10, len(strings)), (11, 24), (0, 0)]
    dynamic = b"".join(struct.pack("<QQ", *tag) for tag in tags)

    def segment(kind: int, flags: int, address: int, length: int, align: int) -> bytes:
        return struct.pack("<IIQQQQQQ", kind, flags, address, address, address, length, length, align)

    out = bytearray(slot + 8)
    header = struct.pack("<HHIQQQIHHHHHH", 3, _ELF_MACHINE[arch], 1, 0, 64, 0, 0, 64, 56, 5, 0, 0, 0)
    out[:64] = b"\x7fELF\x02\x01\x01" + bytes(9) + header
    out[64:headers] = (
        segment(1, 4, 0, size, page)
        + segment(1, 5, text, len(code), page)
        + segment(1, 6, data, _DYNAMIC_SIZE + 8, page)
        + segment(2, 6, data, len(dynamic), 8)
        + segment(0x6474E551, 6, 0, 0, 16)  # GNU_STACK: not executable
    )
    parts = ((hash_at, table), (symbols_at, symbols), (strings_at, strings), (text, code), (data, dynamic))
    for offset, part in parts:
        out[offset : offset + len(part)] = part
    return bytes(out)


def _in_memory(content: bytes) -> str | None:
    """Path of an anonymous file in memory; None where the system has none."""
    if not hasattr(os, "memfd_create"):
        return None
    try:
        handle = os.memfd_create("graphopt_jit")
        os.write(handle, content)
    except OSError:
        return None
    return f"/proc/self/fd/{handle}"  # stays open: onnxruntime opens the path again for every session


def _on_disk(content: bytes) -> str:
    handle, path = tempfile.mkstemp(prefix="graphopt_jit", suffix=".so")
    with os.fdopen(handle, "wb") as file:
        file.write(content)
    return path


def load(target: int) -> str:
    """Path of a loaded library whose `RegisterCustomOps` is the code at this address; for as long as this process lives."""
    content = image(machine())
    reasons = []
    for place in (_in_memory, _on_disk):
        path = place(content)
        if path is None:
            continue
        try:
            library = ctypes.CDLL(path)
        except OSError as error:
            reasons.append(str(error))
            if place is _on_disk:
                Path(path).unlink()
            continue
        ctypes.c_void_p.in_dll(library, SLOT).value = target
        return path
    raise RuntimeError(
        "graphopt: no place to load code from: neither memory files nor the temporary folder allow execution "
        f"({'; '.join(reasons)}). Set TMPDIR to a folder of a file system mounted without 'noexec', "
        "or register a library made by graphopt.kernels.aot.build_library."
    )
