"""The model card and the changelog of a release, as Markdown."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphopt.release_files import Release


def changes(previous: Release | None, release: Release) -> list[str]:
    """What differs from the previous version, one line each; only what is known of both."""
    if previous is None:
        return ["first version"]
    said = [
        _moved("file size", previous.facts.file_bytes, release.facts.file_bytes, _bytes),
        _moved("parameters", previous.facts.parameters, release.facts.parameters, "{:,}".format),
        _moved("MACs", previous.facts.macs, release.facts.macs, "{:,}".format),
        _moved("nodes", previous.facts.nodes, release.facts.nodes, str),
        _moved("quality", _value(previous), _value(release), "{:.4f}".format),
        _moved("latency p50", _p50(previous), _p50(release), "{:.3f} ms".format),
    ]
    ops = {
        op: release.facts.ops.get(op, 0) - previous.facts.ops.get(op, 0) for op in sorted({*previous.facts.ops, *release.facts.ops})
    }
    moved = ", ".join(f"{change:+d} {op}" for op, change in ops.items() if change)
    said.append(f"operators: {moved}" if moved else "")
    for label, before, after in (
        ("quantised", previous.facts.quantized, release.facts.quantized),
        ("passes", previous.lineage.pipeline, release.lineage.pipeline),
        ("target", previous.lineage.target, release.lineage.target),
        ("made from", previous.lineage.source_sha256, release.lineage.source_sha256),
        ("calibration", previous.lineage.calibration, release.lineage.calibration),
        ("preprocessing", previous.lineage.preprocessing, release.lineage.preprocessing),
        ("onnxruntime", previous.released_with.onnxruntime, release.released_with.onnxruntime),
        ("graphopt", previous.released_with.graphopt, release.released_with.graphopt),
    ):
        if before != after:
            said.append(f"{label}: {before or 'not given'} -> {after or 'not given'}")
    return [line for line in said if line] or ["nothing that is recorded changed"]


def _moved(label: str, before: Any, after: Any, show: Callable[[Any], str]) -> str:
    if before is None or after is None or before == after:
        return ""
    share = f" ({100 * (after / before - 1):+.1f} %)" if before and label != "quality" else ""
    return f"{label}: {show(before)} -> {show(after)}{share}"


def _bytes(value: int) -> str:
    return f"{value / 1e6:.2f} MB" if value >= 100_000 else f"{value / 1e3:.1f} kB"


def _value(release: Release) -> float | None:
    found = release.figures.get("evaluation") or {}
    value = found.get("value", (release.figures.get("after") or {}).get("quality"))
    return None if value is None else float(value)


def _p50(release: Release) -> float | None:
    found = (release.figures.get("after") or {}).get("latency") or {}
    return found.get("p50_ms")


def card(release: Release) -> str:
    """What a user of the model must know: figures, how it was made, what it costs, how to check it."""
    facts, lineage = release.facts, release.lineage
    lines = [
        f"# {release.name}",
        "",
        release.notes or "",
        f"Released {release.created} as `{release.model}`.",
        "",
        "## Measured",
        "",
    ]
    lines += [*_table(release), "", "## How it was made", ""]
    lines += [
        f"- passes: `{lineage.pipeline}`" if lineage.pipeline else "- passes: not recorded (no report was given)",
        *(f"  - `{p['name']}` {' '.join(f'{k}={v}' for k, v in p['options'].items())}".rstrip() for p in lineage.passes),
        *_given("made from a model with SHA-256", lineage.source_sha256),
        *_given("target", lineage.target),
        *_given("calibration", lineage.calibration),
        *_given("preprocessing SHA-256", lineage.preprocessing),
    ]
    if lineage.made_with is not None:
        e = lineage.made_with
        lines.append(
            f"- with graphopt {e.graphopt}, onnx {e.onnx}, onnxruntime {e.onnxruntime}, on {e.cpu} ({', '.join(e.cpu_features)})"
        )
    lines += ["", "## What it is", "", f"- {facts.nodes} nodes, {facts.parameters:,} parameters, {_bytes(facts.file_bytes)}"]
    lines += [f"- {facts.quantized}", "- " + ", ".join(f"{count} {op}" for op, count in facts.ops.items())]
    warnings = release.figures.get("warnings") or []
    if warnings:
        lines += ["", "## Known losses", "", *(f"- {w}" for w in warnings)]
    lines += ["", "## Changes", "", *(f"- {line}" for line in release.changes)]
    lines += [
        "",
        "## Check it",
        "",
        "`graphopt verify REGISTRY NAME`: files against their hashes, outputs against the gold set within",
    ]
    lines += [f"{release.gold_tolerance:g} of their scale. Sign `SHA256SUMS` with the tool of your choice to sign the release.", ""]
    return "\n".join(lines)


def _given(label: str, value: str | None) -> list[str]:
    return [f"- {label}: {value}"] if value else []


def _table(release: Release) -> list[str]:
    before, after = (release.figures.get(k) or {} for k in ("before", "after"))
    rows: list[tuple[str, Any, Any]] = []
    found = release.figures.get("evaluation")
    if found:
        base = found.get("base")
        rows.append((f"{found['metric']}, {found['rows']} rows", None if base is None else f"{base:.4f}", f"{found['value']:.4f}"))
        if found.get("lost") is not None:
            rows.append(("rows lost, won, p", None, f"{found['lost']}, {found['won']}, {found['p_value']:.2g}"))
    elif after.get("quality") is not None:
        rows.append(("quality", f"{before['quality']:.4f}", f"{after['quality']:.4f}"))
    for key in ("p50_ms", "p95_ms"):
        values = [(side.get("latency") or {}).get(key) for side in (before, after)]
        if all(v is not None for v in values):
            rows.append((f"latency {key[:3]}", *(f"{v:.3f} ms" for v in values)))  # type: ignore[arg-type]
    if release.figures.get("speedup"):
        rows.append(("speed", None, f"{release.figures['speedup']:.2f}x"))
    rows.append(("file size", _bytes(before["file_bytes"]) if before.get("file_bytes") else None, _bytes(release.facts.file_bytes)))
    return ["| | original | released |", "|---|---|---|", *(f"| {n} | {b or ''} | {a or ''} |" for n, b, a in rows)]
