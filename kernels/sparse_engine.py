"""The engine behind `graphopt.SparseLayer<n>`: sparse float32 weights in products and convolutions, compiled for one rung.

It lives behind the same interface as the region engine (`engine`), from which it has the life of its instances.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from graphopt.kernels import engine as regions
from graphopt.kernels import engine_state, sparse_bind, sparse_bitmap, sparse_create, sparse_run
from graphopt.kernels.exports import Export
from graphopt.kernels.externs import link
from graphopt.kernels.isa import RUNGS
from graphopt.kernels.micro_bitmap import SIZES, bitmap, wide
from graphopt.kernels.micro_sparse import dot, plane, spmm, transpose
from graphopt.kernels.region import Engine
from graphopt.kernels.sparse_state import I_SIZE

create_for: Any = None  # given by `_rung`
LANES = 4
SUFFIX = "_sparse"
NAMES = {1: "one", 4: "four"}  # of the kernels, by rows of a block
BODIES = ("copy_body", "tile_body", "rows_body", "single_body", "bitmap_body")


def create(plan: int, plan_len: int, scales: int, n_scales: int, consts: int, n_consts: int, error: int) -> int:
    """A handle for a plan and its weights; 0 and a message in `error` (256 bytes) where they are not right.

    plan: int64 [plan_len]; scales: float32 [n_scales]; consts: tensor records, whose data is copied.
    """
    return create_for(plan, plan_len, scales, n_scales, consts, n_consts, error, LANES)


SHARED: tuple[Any, ...] = (
    regions.destroy_instance, regions.destroy, regions.same_shapes, regions.take_idle, regions.acquire, regions.release,
    regions.output_shape, regions.output_type,
)  # fmt: skip


@cache
def common() -> tuple[list[Export], dict[str, Any]]:
    """What is the same for every rung."""
    templates = [*engine_state.TEMPLATES, *sparse_bitmap.TEMPLATES, *sparse_create.TEMPLATES, *sparse_bind.TEMPLATES, *SHARED]
    return link(templates, SUFFIX, {"INSTANCE": I_SIZE})


@cache
def _rung(name: str) -> tuple[list[Export], dict[str, Any]]:
    isa = RUNGS[name]
    scope: dict[str, Any] = {**common()[1], "LANES": isa.lanes, "square": transpose(isa), "ABREAST": 4 if wide(isa) else 1}
    scope |= {f"bitmap_{kind}": bitmap(isa, kind) for kind in SIZES}
    scope |= {f"plane{step}": plane(isa, step) for step in (1, 2)}
    for rows, label in NAMES.items():
        scope |= {f"spmm_{label}": spmm(isa, rows), f"dot_{label}": dot(isa, rows)}
    scope |= {body.upper(): f"gk_{body}{SUFFIX}__{name}" for body in BODIES}
    parts, inner = link(sparse_run.PARTS, f"{SUFFIX}__{name}", scope)
    exports, externs = link([*sparse_run.TEMPLATES, create], f"{SUFFIX}__{name}", {**scope, **inner})
    return [*parts, *exports], {**common()[1], **externs}


def engine(isa: str) -> Engine:
    """The engine for one rung: its functions may be called from compiled code once `exports(isa)` are bound."""
    found = _rung(isa)[1]
    return Engine(**{name: found[name] for name in Engine._fields if name != "bodies"}, bodies={})


def exports(isa: str) -> list[Export]:
    """The C functions of the engine for one rung."""
    return [*common()[0], *_rung(isa)[0]]
