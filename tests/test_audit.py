"""`graphopt audit` against the kernels that onnxruntime's own profile names, on models broken in one way each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from audit_cases import FALL_BACK, RUN_IN_INT8, Case

import graphopt
from graphopt.audit_report import AuditReport, NodeAudit
from graphopt.auditing import TWIN, audit, require
from graphopt.compare import compare
from graphopt.errors import CheckError, ModelError, OptionError
from graphopt.float_twin import float_twin
from graphopt.model import load

Run = Callable[..., "tuple[int, str, str]"]
COMPUTE = {"Conv", "FusedConv", "QLinearConv", "Gemm", "FusedGemm", "QGemm", "MatMul", "FusedMatMul", "QLinearMatMul"} | {
    "MatMulIntegerToFloat",
    "MatMulNBits",
}


def profiled(path: Path) -> Counter[tuple[str, str]]:
    """(op, type of the first input) of every kernel of one run, read from the profile without graphopt."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix, options.log_severity_level = True, str(path.with_suffix("")), 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = session.get_inputs()[0]
    session.run(None, {feed.name: np.zeros([d if isinstance(d, int) else 1 for d in feed.shape], np.float32)})
    events = json.loads(Path(session.end_profiling()).read_text())
    kernels = [e["args"] for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    return Counter((k["op_name"], next(iter(k["input_type_shape"][0]))) for k in kernels)


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(proto, path)
    return path


def the_node(report: AuditReport, name: str = "op") -> NodeAudit:
    return next(n for n in report.nodes if n.name == name)


@pytest.mark.parametrize(("op", "changes"), RUN_IN_INT8)
def test_what_runs_in_int8(tmp_path: Path, op: str, changes: dict[str, Any]) -> None:
    path = saved(Case(op, **changes).build(), tmp_path)
    report = audit(path, runs=4)
    node = the_node(report)
    assert (node.quantized, node.int8, node.reason) == (True, True, None)
    assert (node.kernel, node.dtype) in profiled(path)
    assert (report.quantized, report.int8, report.fallbacks, report.int8_macs) == (1, 1, 0, 1.0)


@pytest.mark.parametrize(("op", "changes", "why"), FALL_BACK)
def test_what_falls_back_and_why(tmp_path: Path, op: str, changes: dict[str, Any], why: str) -> None:
    path = saved(Case(op, **changes).build(), tmp_path)
    report = audit(path, runs=4)
    node = the_node(report)
    assert [(o, t) for o, t in profiled(path) if o in COMPUTE] == [(node.kernel, "float")]
    assert (node.quantized, node.int8) == (True, False)
    assert node.reason is not None
    assert why in node.reason
    assert node.fix
    assert report.int8_macs == 0.0
    assert [f.nodes for f in report.findings if f.kind == "fallback"] == [["op"]]
    with pytest.raises(CheckError, match="int8 is 0, required at least 0.9; fallbacks is 1, required at most 0"):
        require(report, ["int8=0.9", "fallbacks=0"])


def test_a_wrong_axis_that_onnxruntime_cannot_run_is_explained(tmp_path: Path) -> None:
    path = saved(Case("Conv", axis=1).build(), tmp_path)
    with pytest.raises(ModelError, match=r"node 'op' \(Conv\): its weight has scales along axis 1.*axis=0"):
        audit(path, runs=4)


QDQ = """<ir_version: 8, opset_import: ["" : 17]> m (float[1,8,8,8] x) => (float[1,8,8,8] out)
<float s = {0.1}, uint8 z = {0}> {
  xq = QuantizeLinear(x, s, z)  xd = DequantizeLinear(xq, s, z)  %s
  yq = QuantizeLinear(y, s, z)  out = DequantizeLinear(yq, s, z) }"""


@pytest.mark.parametrize(("node", "why"), [("y = Tanh(xd)", "no INT8 kernel"), ("y = Relu(xd)", ""), ("y = Sigmoid(xd)", "")])
def test_conversions_around_ops_without_a_kernel(tmp_path: Path, node: str, why: str) -> None:
    path = saved(onnx.parser.parse_model(QDQ % node), tmp_path)
    report = audit(path, runs=4)
    (row,) = report.nodes
    in_float = any(t == "float" and o not in ("QuantizeLinear", "DequantizeLinear") for o, t in profiled(path))
    assert (row.reason is not None) == in_float
    assert why in (row.reason or "")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits model, pruned of nothing, in INT8."""
    assets = Path(graphopt.__file__).parent / "assets"
    result = graphopt.optimize(str(assets / "digits.onnx"), "fold, quantize", calibration=str(assets / "digits_calib.npz"))
    path = tmp_path_factory.mktemp("audit") / "int8.onnx"
    result.save(path)
    return path


def test_every_kernel_is_counted_once(quantized: Path) -> None:
    report = audit(quantized, runs=6)
    kernels = profiled(quantized)
    counted = Counter({(o.op, "float" if o.op == "QLinearConcat" else o.dtype): o.count for o in report.by_op})
    assert counted == kernels  # the first input of QLinearConcat is a scale
    assert sum(o.us for o in report.by_op) == pytest.approx(report.us)
    assert sum(c.us for c in report.categories) == pytest.approx(report.us)
    assert report.base_us is not None
    assert sum(c.base_us for c in report.categories) == pytest.approx(report.base_us)
    assert report.base == TWIN
    rows = Counter((n.kernel, n.dtype) for n in report.nodes if n.how == "own" and n.kernel in COMPUTE)
    assert rows == {k: v for k, v in kernels.items() if k[0] in COMPUTE}
    assert report.fallbacks == 0
    assert report.quantized == report.int8 > 5


def test_the_float_twin_computes_the_same_but_for_rounding(quantized: Path, digits: Path) -> None:
    twin = load(quantized)
    assert float_twin(twin) > 10
    assert not [n for n in twin.nodes() if n.op in ("QuantizeLinear", "DequantizeLinear")]
    with np.load(digits / "digits_eval.npz") as data:
        feed = {k: v[:64].astype(np.float32) for k, v in data.items() if k != "labels"}
    (row,) = compare(str(quantized), twin.proto(), [feed])
    assert row.sqnr_db > 20
    assert row.argmax_agreement is not None
    assert row.argmax_agreement > 0.95


def test_a_base_of_ones_own(quantized: Path, digits: Path) -> None:
    report = audit(quantized, base=digits / "digits.onnx", runs=4)
    assert report.base == str(digits / "digits.onnx")
    matched = [n for n in report.nodes if n.base_us is not None]
    assert len(matched) > 5
    assert report.speedup is not None
    assert f"{report.speedup:.2f}x" in report.explanation[0]
    assert "the base:" in report.explanation[0]
    alone = audit(quantized, base=False, runs=4)
    assert (alone.base, alone.explanation, alone.speedup) == (None, [], None)
    with pytest.raises(OptionError, match="nothing to compare with"):
        require(alone, ["speed=1"])


def test_sparse_weights_are_found(tmp_path: Path) -> None:
    proto = Case().build()
    weight = next(t for t in proto.graph.initializer if t.name == "w")
    values = onnx.numpy_helper.to_array(weight).copy()
    values[:16] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(values, "w"))
    (found,) = [f for f in audit(saved(proto, tmp_path), runs=4).findings if f.kind == "sparse"]
    assert found.nodes == ["op"]
    assert found.detail.startswith("5")  # half, and what was zero before


def test_weights_dequantised_at_every_run(tmp_path: Path) -> None:
    proto = Case().build()
    for node in proto.graph.node:
        node.input[:] = ["x" if i == "xd" else i for i in node.input]
    kept = [n for n in proto.graph.node if n.name not in ("qx", "dx", "qy", "dy")]
    kept[-1].output[:] = ["out"]
    del proto.graph.node[:]
    proto.graph.node.extend(kept)
    path = saved(proto, tmp_path)
    report = audit(path, runs=4)
    ran = ("DequantizeLinear", "int8") in profiled(path)
    assert ran == any(f.kind == "weight" and f.nodes == ["op"] for f in report.findings)
    assert (report.quantized, report.fallbacks) == (0, 0)


def test_the_command_line(cli: Run, quantized: Path) -> None:
    code, out, err = cli("audit", quantized, "--json", "--runs", 4)
    assert (code, err) == (0, "")
    assert AuditReport.model_validate_json(out).fallbacks == 0
    code, out, err = cli("audit", quantized, "--nodes", "--runs", 4, "--require", "int8=0.5")
    assert (code, err) == (0, "")
    assert "QLinearConv" in out
    code, out, err = cli("audit", quantized, "--runs", 4, "--require", "int8=1.1")
    assert code == 2
    assert "required at least 1.1" in err
    assert cli("audit", quantized, "--runs", 4, "--require", "int9=1")[2].startswith(
        "error: --require int9=1: expected one of int8="
    )


def test_the_schema_is_published() -> None:
    published = Path(__file__).parent.parent / "docs" / "audit.schema.json"
    assert json.loads(published.read_text()) == AuditReport.model_json_schema()
