"""What `graphopt audit` says, as data with a published schema."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graphopt.report import Category, Environment, Row, Versioned

Kind = Literal["fallback", "slow", "conversion", "weight", "sparse", "operators"]


class NodeAudit(Row):
    """One node of the model's main graph; QuantizeLinear, DequantizeLinear and Constant nodes are not listed."""

    name: str
    op: str
    kernel: str | None = Field(description="the kernel it ended in; null where none runs for it, `how` says why")
    how: Literal["own", "part", "merged", "constant", "gone"] = Field(
        description="own: the kernel computes this node; part: together with others; merged: into a neighbour when layouts were "
        "chosen; constant: computed when the model was loaded; gone: onnxruntime took it away"
    )
    dtype: str = Field(description="of the kernel's first input, from the profile")
    shape: list[int] = Field(description="of the kernel's first output")
    us: float = Field(description="microseconds of a run; a kernel's time counts at one of its nodes")
    base_us: float | None = Field(description="of the node of the same name in the base; null: there is none")
    macs: int | None
    quantized: bool = Field(description="whether QuantizeLinear and DequantizeLinear around it, or its op, ask for INT8")
    int8: bool = Field(description="whether it ran on 8-bit integers")
    reason: str | None = Field(description="why it did not, though it was asked for")
    fix: str | None


class OpTime(Row):
    """Kernels of one op on one type."""

    op: str
    dtype: str
    count: int
    us: float
    share: float


class Finding(Row):
    """One thing that is not as it should be."""

    kind: Kind
    nodes: list[str]
    op: str
    why: str
    detail: str = Field(description="the figures of this one")
    fix: str
    us: float = Field(description="microseconds of a run that it costs, as far as they were measured")


class AuditReport(Versioned):
    """What `graphopt audit` found."""

    environment: Environment
    model: str
    operators: str = Field(description="how graphopt's regions ran")
    batch: int
    threads: int
    runs: int
    us: float = Field(description="microseconds of a run: the sum of its kernels, as profiled")
    base: str | None = Field(description="what it is compared with; null: nothing")
    base_us: float | None
    speedup: float | None = Field(description="the base's latency over this one's, interleaved and without the profiler")
    quantized: int = Field(description="nodes that are asked to run in INT8")
    int8: int = Field(description="those of them that did")
    int8_macs: float | None = Field(description="share of all multiply-accumulates done on integers; null: they cannot be counted")
    fallbacks: int
    nodes: list[NodeAudit]
    by_op: list[OpTime]
    base_by_op: list[OpTime]
    categories: list[Category]
    findings: list[Finding]
    explanation: list[str]
    warnings: list[str]
