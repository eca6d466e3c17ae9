"""The report: what each pass did, and what was gained and lost, as JSON with a published schema (docs/report.schema.json)."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

SCHEMA_VERSION = 1


class Row(BaseModel):
    """Part of a report: fixed once made, and without fields that the schema does not name."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RejectionRow(Row):
    """Matches that a pass left alone."""

    reason: str
    op: str
    count: int
    example: str = Field(description="name of one such node")


class PassRow(Row):
    """One run of one pass."""

    name: str
    options: dict[str, Any]
    changes: int = Field(description="0: the model is untouched")
    seconds: float
    nodes: int = Field(description="nodes after the pass, subgraphs included")
    parameters: int
    macs: int | None = Field(description="multiply-accumulates of one row; null where shapes are unknown")
    weight_bytes: int
    rejected: list[RejectionRow]
    facts: dict[str, Any] = Field(description="what the pass tells of itself")


class LatencyRow(Row):
    """Interleaved with the other model in one process."""

    p50_ms: float
    p95_ms: float
    runs: int
    batch: int
    threads: int


class ModelRow(Row):
    """One model, measured."""

    path: str | None
    nodes: int
    parameters: int
    macs: int | None
    weight_bytes: int
    file_bytes: int | None
    quality: float | None = Field(description="mean of the metric over the evaluation rows")
    latency: LatencyRow | None
    peak_memory_bytes: int | None = Field(description="by which loading and running raises a fresh process's peak")


class QualityRow(Row):
    """The two models on the same evaluation rows."""

    metric: str
    rows: int
    original: float
    optimized: float
    lost: int
    won: int
    p_value: float = Field(description="exact two-sided sign test on the rows that differ")


class OutputRow(Row):
    """How far one output moved on the rows that `compared_on` names."""

    name: str
    max_error: float
    mean_error: float
    scale: float
    sqnr_db: float | None = Field(description="null: no error at all")
    cosine: float
    argmax_agreement: float | None


class OperatorsRow(Row):
    """graphopt's operators in the result, and the library written beside it."""

    regions: int = Field(description="nodes that run with graphopt's operators")
    nodes: int = Field(description="INT8 nodes of the original that they replace")
    ran: str = Field(description="how they ran for the figures of this report")
    rung: str = Field(description="the instruction set; empty where onnxruntime ran the functions in the model instead")
    library: str | None = Field(default=None, description="name of the library beside the model")
    library_bytes: int | None = None


class Category(Row):
    """Where the difference to the base comes from."""

    name: str
    base_us: float
    us: float


class LayerRow(Row):
    """One node of the result that takes time, holds weights, or writes a tensor that the original has too."""

    name: str
    op: str
    kernel: str | None = Field(description="of onnxruntime, as profiled; null: none of its own, or not profiled")
    dtype: str = Field(description="what the kernel computes on; empty: not profiled")
    int8: bool = Field(description="whether it ran on 8-bit integers")
    reason: str | None = Field(description="why it did not, though it is quantised")
    us: float | None = Field(description="microseconds of a run; null: not profiled")
    base_us: float | None = Field(description="of the original's node of the same name; null: there is none, or not profiled")
    macs: int | None
    error: float | None = Field(
        description="root mean square of the difference of what it writes, over that of the original's tensor of the same name "
        "(after the exact passes that come first); null: no tensor of the same meaning and shape is there"
    )
    error_from: str | None = Field(
        description="the stage that it was compared with, where the original's tensor has another shape; null: the original"
    )
    weights: int | None = Field(description="elements of its constants; null: it has none to count")
    zeros: float | None = Field(description="share of them that is zero")
    base_zeros: float | None = Field(description="the same in the original's node of the same name")


class RangeRow(Row):
    """A tensor's values on the calibration rows, and the range that it is quantised to."""

    tensor: str
    low: float = Field(description="of the range: what is below is cut off")
    high: float
    seen_low: float
    seen_high: float
    saturated: float = Field(description="share of the values outside the range")
    counts: list[int] = Field(description="the histogram: values in equal steps from `seen_low` to `seen_high`")


class NodeRow(Row):
    """One node of the original, of the result, or of both; in an order that fits both. Runs are indices into `passes`."""

    name: str
    op: str = Field(description="in the result; where it is gone, in the original")
    added: int | None = Field(description="the run that added it; null: the original has it")
    removed: int | None = Field(description="the run that removed it; null: the result has it")
    changed: list[int] = Field(description="the runs that changed its operator, attributes or weights")
    before: str | None = Field(default=None, description="the node as text, where it was changed")
    after: str | None = None


class EditRow(Row):
    """What one run of a pass did to the graph, nodes by operator."""

    run: int = Field(description="index into `passes`")
    added: dict[str, int]
    removed: dict[str, int]
    changed: dict[str, int]


class StageRow(Row):
    """The model after some of the passes, measured beside the original and the result."""

    name: str
    runs: int = Field(description="how many of `passes` had run")
    nodes: int
    parameters: int
    macs: int | None
    file_bytes: int
    latency: LatencyRow | None
    speedup: float | None = Field(description="median of paired latency ratios to the original")
    quality: QualityRow | None
    error: float | None = Field(description="root mean square of the difference at the outputs, over that of the original's")


class Detail(Row):
    """Layer by layer, pass by pass: measured where a report is asked for."""

    layers: list[LayerRow]
    us: float | None = Field(description="microseconds of a run of the result, the sum of its kernels; null: not profiled")
    base_us: float | None
    categories: list[Category] = Field(description="the same by kind of node")
    explanation: list[str] = Field(description="where the difference comes from")
    ranges: list[RangeRow]
    nodes: list[NodeRow]
    edits: list[EditRow]
    stages: list[StageRow] = Field(description="the last one is the result")
    notes: list[str] = Field(description="what could not be measured, and why")


class Environment(Row):
    """What the figures were measured with."""

    graphopt: str
    onnx: str
    onnxruntime: str
    python: str
    cpu: str
    cpu_features: list[str]


class Versioned(BaseModel):
    """A whole document with a published schema."""

    model_config = ConfigDict(extra="forbid")

    schema_version: int = SCHEMA_VERSION


class Report(Versioned):
    """What `graphopt optimize` did to one model."""

    environment: Environment
    source: str | None
    source_sha256: str | None
    target: str
    pipeline: str = Field(description="the passes as --passes reads them")
    calibration: str | None = Field(default=None, description="where the rows came from, and their SHA-256")
    seconds: float
    passes: list[PassRow]
    before: ModelRow
    after: ModelRow
    speedup: float | None = Field(default=None, description="median of paired latency ratios; below 1 the result is slower")
    quality: QualityRow | None = None
    outputs: list[OutputRow] = Field(default_factory=list)
    operators: OperatorsRow | None = Field(default=None, description="null: the result has no regions")
    compared_on: str | None = Field(default=None, description="the rows on which `outputs` were compared")
    checked_passes: int = Field(default=0, description="exact passes whose outputs were compared before and after (--check)")
    detail: Detail | None = Field(default=None, description="null: no report was asked for")
    warnings: list[str] = Field(default_factory=list)


class PointRow(Row):
    """One target of a sweep: the model that its recipe makes, or why there is none."""

    keep: float = Field(description="the number that was put into the pipeline")
    recipe: str = Field(description="for `graphopt optimize --passes`, which makes the same file from the same rows")
    failed: str | None = Field(default=None, description="why there is no model: the target is out of reach")
    path: str | None = None
    sha256: str | None = Field(default=None, description="of the model's file")
    nodes: int | None = None
    parameters: int | None = None
    macs: int | None = None
    file_bytes: int | None = None
    macs_ratio: float | None = Field(default=None, description="of the original's")
    quality: QualityRow | None = Field(default=None, description="null without evaluation rows")
    held_out_error: float | None = Field(
        default=None, description="at the outputs, on calibration rows that no fit had seen, as the last pass that repairs says"
    )
    error: float | None = Field(
        default=None,
        description="of the finished model at the outputs, on the same rows, against the original; repair has used them by then",
    )
    latency: LatencyRow | None = None
    latency_ratio: float | None = Field(default=None, description="of the original's, the median of paired runs")
    seconds: float = 0.0
    passes: list[PassRow] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


class KneeRow(Row):
    """A point that a user may want, and by what rule."""

    rule: str
    keep: float | None = Field(description="null: the rule names no point")
    why: str


class SweepReport(Versioned):
    """What `graphopt sweep` found: one pipeline with several targets."""

    environment: Environment
    source: str | None
    source_sha256: str | None
    target: str
    template: str = Field(description="the pipeline with a place for the target")
    shared: str = Field(description="the passes that ran once, for all points")
    calibration: str | None
    metric: str | None
    seconds: float
    original: ModelRow
    points: list[PointRow]
    knees: list[KneeRow] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)


def schema() -> dict[str, Any]:
    """The JSON schema of the report."""
    return Report.model_json_schema()
