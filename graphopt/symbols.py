"""Sizes that are not numbers: integer polynomials over symbols, enough to follow shape arithmetic exactly.

Every symbol stands for the size of an axis (or a whole quotient, minimum ... of such), so it is never negative. Equal texts mean
equal sizes. Nothing is ever guessed: what an operation cannot express is None (unknown) or a new symbol that names the operation.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

Monomial = tuple[str, ...]  # symbols in order, repeated for powers; () is the constant term
MAX_TEXT = 300  # nested operations longer than this become unknown, for the same reason as below
MAX_TERMS = 24  # longer polynomials become unknown: no model needs them and products would grow without bound


@dataclass(frozen=True)
class Polynomial:
    """At least one symbol; constants are plain ints. `terms` is sorted and holds no zero coefficient."""

    terms: tuple[tuple[Monomial, int], ...]

    @cached_property
    def text(self) -> str:
        """Canonical, and at the same time the dimension's name in ONNX: '12*batch', 'height + 2*width'."""
        parts = []
        for monomial, factor in self.terms:
            sign = "-" if factor < 0 else "+"
            number = [str(abs(factor))] if abs(factor) != 1 or not monomial else []
            parts.append(f"{sign} {'*'.join([*number, *monomial])}")
        joined = " ".join(parts)
        return joined[2:] if joined.startswith("+ ") else "-" + joined[2:]


Size = int | Polynomial | None
Sizes = tuple[Size, ...]


def symbol(name: str) -> Polynomial:
    """The symbol of that name; a name that could be read as an expression is put in quotes."""
    return Polynomial((((name if re.fullmatch(r"[^\s+\-*/()']+", name) else f"'{name}'",), 1),))


def unknown(name: str) -> Polynomial:
    """A symbol that nothing else has; `name` says what it is the size of."""
    return Polynomial(((("?" + name,), 1),))


def term(text: str) -> Size:
    """A symbol that names an operation on sizes, such as 'floor((h + 1)/2)': the same operation gives the same symbol."""
    return Polynomial((((text,), 1),)) if len(text) <= MAX_TEXT else None


def text(size: Size) -> int | str | None:
    """The size as the public API shows it."""
    return size.text if isinstance(size, Polynomial) else size


def _terms(size: int | Polynomial) -> tuple[tuple[Monomial, int], ...]:
    return size.terms if isinstance(size, Polynomial) else (((), size),) if size else ()


def _build(terms: Iterable[tuple[Monomial, int]]) -> Size:
    total: dict[Monomial, int] = {}
    for monomial, factor in terms:
        total[monomial] = total.get(monomial, 0) + factor
    kept = {m: f for m, f in total.items() if f}
    if not kept or set(kept) == {()}:
        return kept.get((), 0)
    return Polynomial(tuple(sorted(kept.items(), key=lambda t: (-len(t[0]), t[0])))) if len(kept) <= MAX_TERMS else None


def add(a: Size, b: Size) -> Size:
    """a + b"""
    if a is None or b is None:
        return None
    return a + b if isinstance(a, int) and isinstance(b, int) else _build((*_terms(a), *_terms(b)))


def multiply(a: Size, b: Size) -> Size:
    """a * b"""
    if a is None or b is None:
        return None
    if isinstance(a, int) and isinstance(b, int):
        return a * b
    if len(_terms(a)) * len(_terms(b)) > MAX_TERMS * 2:
        return None
    return _build((tuple(sorted((*m, *n))), f * g) for m, f in _terms(a) for n, g in _terms(b))


def subtract(a: Size, b: Size) -> Size:
    """a - b"""
    return add(a, multiply(b, -1))


def product(sizes: Iterable[Size]) -> Size:
    """The product of all; 1 of none."""
    total: Size = 1
    for size in sizes:
        total = multiply(total, size)
    return total


def not_negative(a: Size) -> bool:
    """Proved to be at least 0 (False: not known)."""
    return a is not None and all(f > 0 for _, f in _terms(a))


def positive(a: Size) -> bool:
    """Proved to be at least 1."""
    return not_negative(subtract(a, 1)) if a is not None else False


def floor_divide(a: Size, by: int) -> Size:
    """floor(a / by) for by > 0, in one canonical form: whole multiples come out, the rest has factors 0 <= f < by."""
    if a is None or by <= 0:
        return None
    if isinstance(a, int):
        return a // by
    whole = _build((m, f // by) for m, f in a.terms)
    rest = _build((m, f % by) for m, f in a.terms)
    if isinstance(rest, Polynomial):
        rest = term(f"floor(({rest.text})/{by})")
    elif rest is not None:
        rest //= by
    return add(whole, rest)


def ceil_divide(a: Size, by: int) -> Size:
    """ceil(a / by) for by > 0."""
    return floor_divide(add(a, by - 1), by)


def divide_exactly(a: Size, b: Size) -> Size:
    """a / b where it comes out even for every value of the symbols (b not 0), else None."""
    if a is None or b is None or b == 0:
        return None
    if a == b:
        return 1
    if len(_terms(b)) != 1:
        return None
    ((divisor, by),) = _terms(b)
    result = []
    for monomial, factor in _terms(a):
        left = list(monomial)
        for name in divisor:
            if name not in left:
                return None
            left.remove(name)
        if factor % by:
            return None
        result.append((tuple(left), factor // by))
    return _build(result)


def quotient(numerator: Iterable[Size], denominator: Iterable[Size]) -> Size:
    """The product of one list over the product of another, equal factors cancelled first; None where it does not come out."""
    above, below = list(numerator), []
    for size in denominator:
        if size is not None and size != 0 and size in above:
            above.remove(size)
        else:
            below.append(size)
    return divide_exactly(product(above), product(below))


def broadcast(a: Size, b: Size) -> Size:
    """The size of an axis after broadcasting (ONNX, 'Broadcasting in ONNX'), given that the sizes fit."""
    if a == b or b == 1 or _is_minimum(b, a):
        return a
    if a == 1 or _is_minimum(a, b):
        return b
    number = next((s for s in (a, b) if isinstance(s, int)), None)
    if number is not None or a is None or b is None:
        return number
    return term(f"broadcast({', '.join(sorted((str(text(a)), str(text(b)))))})")


def _is_minimum(a: Size, b: Size) -> bool:
    """a = min(number, b): if the two broadcast at all, the result is b, for a = 1 means b = 1 or number = 1."""
    if not isinstance(a, Polynomial) or not isinstance(b, Polynomial) or not a.text.startswith("min("):
        return False
    number = a.text[4:].partition(", ")[0]
    return number.isdigit() and number != "0" and a.text == f"min({number}, {b.text})"


def broadcast_all(shapes: Iterable[Sizes | None]) -> Sizes | None:
    """Multidirectional broadcasting of whole shapes; None where a rank is unknown."""
    result: Sizes = ()
    for shape in shapes:
        if shape is None:
            return None
        rank = max(len(result), len(shape))
        left, right = (1,) * (rank - len(result)) + result, (1,) * (rank - len(shape)) + shape
        result = tuple(broadcast(a, b) for a, b in zip(left, right, strict=True))
    return result


def slice_length(size: Size, start: Size, end: Size, step: Size) -> Size:
    """Number of elements Slice picks from an axis (ONNX operator Slice: negative positions count from the end, all clamped)."""
    if size is None or start is None or end is None or not isinstance(step, int) or step == 0:
        return None
    if isinstance(size, int) and isinstance(start, int) and isinstance(end, int):
        stop = None if step < 0 and end < -size else end
        return len(range(*slice(start, stop, step).indices(size)))
    first, last = _position(size, start), _position(size, end)
    length = subtract(last, first)
    if step > 0 and (not_negative(length) or length == size):
        return ceil_divide(length, step)
    if step == -1 and start == -1 and isinstance(end, int) and end < -(2**30):
        return size
    if (start, step) == (0, 1) and not_negative(end) and isinstance(size, int) != isinstance(end, int):
        number, other = sorted((size, end), key=lambda s: isinstance(s, Polynomial))
        return term(f"min({number}, {text(other)})")
    return term(f"len({text(size)}[{text(start)}:{text(end)}:{step}])")


def _position(size: Size, index: Size) -> Size:
    """The clamped position, where it can be told."""
    if isinstance(index, int) and index >= 2**30:
        return size
    absolute = add(size, index) if isinstance(index, int) and index < 0 else index
    if not not_negative(absolute):
        return None
    if not_negative(subtract(size, absolute)):
        return absolute
    return size if not_negative(subtract(absolute, size)) else None


def monomial(size: int | str | None) -> tuple[int, tuple[str, ...]]:
    """A size, as the public API shows it, as a number times symbols: '12*batch' is (12, ('batch',)); a sum is one symbol."""
    if isinstance(size, int):
        return size, ()
    parts = re.fullmatch(r"(?:(\d+)\*)?([^\s+\-*/()']+(?:\*[^\s+\-*/()']+)*)", size or "?")
    return (int(parts[1] or 1), tuple(sorted(parts[2].split("*")))) if parts else (1, (size or "?",))
