"""Equal initializers become one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from hashlib import blake2b

import numpy as np
import onnx_graphsurgeon as gs

from graphopt.context import Context
from graphopt.edit import peek, replace_uses
from graphopt.model import Model
from graphopt.registry import register

SAMPLE = 256  # elements read first; only tensors that agree on them are read whole


def _sample_key(constant: gs.Constant) -> Hashable:
    values = peek(constant).reshape(-1)
    middle = values.size // 2
    return (values[:SAMPLE].tobytes(), values[middle : middle + SAMPLE].tobytes(), values[-SAMPLE:].tobytes())


def _digest(constant: gs.Constant) -> bytes:
    return blake2b(np.ascontiguousarray(peek(constant)).view(np.uint8).data).digest()


@register("merge-initializers", exact=True, keeps={"shapes"})
def merge_initializers(model: Model, context: Context) -> int:
    """Initializers with the same dtype, shape and bytes become one (0.0 and -0.0 differ). Graph outputs keep theirs.

    One tensor is in memory at a time, and only those with an equal partner in dtype and shape are read at all.
    """
    wiring = model.wiring()
    found = [c for c in model.constants() if id(c) not in wiring.outputs and np.dtype(c.dtype) != object]
    groups: list[list[gs.Constant]] = [found]
    for key in (lambda c: (str(c.dtype), tuple(c.shape)), _sample_key, _digest):
        groups = [group for members in groups for group in _split(members, key)]
    bytes_saved = 0
    for kept, *copies in groups:
        for copy in copies:
            replace_uses(copy, kept)
        bytes_saved += len(copies) * int(np.prod(kept.shape, dtype=np.int64)) * np.dtype(kept.dtype).itemsize
    context.facts["bytes_saved"] = bytes_saved
    return sum(len(copies) for _, *copies in groups)


def _split(members: list[gs.Constant], key: Callable[[gs.Constant], Hashable]) -> list[list[gs.Constant]]:
    """The members by key, those alone left out."""
    found: dict[Hashable, list[gs.Constant]] = defaultdict(list)
    for member in members:
        found[key(member)].append(member)
    return [group for group in found.values() if len(group) > 1]
