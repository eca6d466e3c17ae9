"""Building messages in compiled code: NUL-terminated text in buffers of `SIZE` bytes."""

from __future__ import annotations

from graphopt.kernels.memory import ldu8, stu8
from graphopt.kernels.specialise import compiled

SIZE = 256  # bytes of a message buffer, the final NUL included; longer text is cut


@compiled
def put_text(buffer: int, position: int, text: int) -> int:
    """Append a C string at a position of a message; the new position."""
    i = 0
    while position < SIZE - 1 and ldu8(text + i) != 0:
        stu8(buffer + position, ldu8(text + i))
        position += 1
        i += 1
    stu8(buffer + position, 0)
    return position


@compiled
def put_number(buffer: int, position: int, value: int) -> int:
    """Append a decimal number (above -2**63) at a position of a message; the new position."""
    if value < 0:
        if position < SIZE - 1:
            stu8(buffer + position, 45)
            position += 1
        value = -value
    power = 1
    while value // power >= 10:
        power *= 10
    while power > 0 and position < SIZE - 1:
        stu8(buffer + position, 48 + (value // power) % 10)
        position += 1
        power //= 10
    stu8(buffer + position, 0)
    return position


@compiled
def same_text(a: int, b: int) -> bool:
    """Whether two C strings are equal."""
    i = 0
    while ldu8(a + i) == ldu8(b + i):
        if ldu8(a + i) == 0:
            return True
        i += 1
    return False
