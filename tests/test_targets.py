"""The target tables: complete, found by name, and true in the installed onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from quant_cases import build, fused, run_quantize

from graphopt import targets
from graphopt.errors import OptionError
from graphopt.quant import QOPS
from graphopt.targets import BUILTIN, ORT_CPU, Target, find_target

QDQ = {"QuantizeLinear", "DequantizeLinear"}
_POINTS = np.random.default_rng(0).integers(-100, 100, (16, 16, 3, 3)).astype(np.int8)


@dataclass(frozen=True)
class Case:
    """`call`: the op on a (and b), both float [1,16,8,8]; `kernel`: what onnxruntime runs for it between INT8 tensors."""

    call: str
    kernel: str
    arrays: Mapping[str, Any] | None = None


_AXES, _HALF = np.array([2, 3]), np.array([8, 8])
INT8 = {
    "Add": Case("Add(a, b)", "QLinearAdd"),
    "Mul": Case("Mul(a, b)", "QLinearMul"),
    "Sigmoid": Case("Sigmoid(a)", "QLinearSigmoid"),
    "LeakyRelu": Case("LeakyRelu<alpha=0.1>(a)", "QLinearLeakyRelu"),
    "AveragePool": Case("AveragePool<kernel_shape=[2,2]>(a)", "QLinearAveragePool"),
    "GlobalAveragePool": Case("GlobalAveragePool(a)", "QLinearGlobalAveragePool"),
    "Concat": Case("Concat<axis=1>(a, b)", "QLinearConcat"),
    "MaxPool": Case("MaxPool<kernel_shape=[2,2]>(a)", "MaxPool"),
    "Reshape": Case("Reshape(a, s)", "Reshape", {"s": np.array([16, -1])}),
    "Transpose": Case("Transpose<perm=[0,2,3,1]>(a)", "Transpose"),
    "Flatten": Case("Flatten(a)", "Flatten"),
    "Squeeze": Case("Squeeze(a, s)", "Squeeze", {"s": np.array([0])}),
    "Unsqueeze": Case("Unsqueeze(a, s)", "Unsqueeze", {"s": np.array([0])}),
    "Slice": Case("Slice(a, s, e)", "Slice", {"s": np.array([0, 1]), "e": np.array([1, 5])}),
    "Gather": Case("Gather<axis=1>(a, s)", "Gather", {"s": np.array([1, 3])}),
    "Expand": Case("Expand(a, s)", "Expand", {"s": np.array([2, 16, 8, 8])}),
    "Tile": Case("Tile(a, s)", "Tile", {"s": np.array([2, 1, 1, 1])}),
    "Split": Case("Split<axis=1>(a, s)", "Split", {"s": _HALF}),
    "DepthToSpace": Case("DepthToSpace<blocksize=2>(a)", "DepthToSpace"),
    "ReduceMax": Case("ReduceMax<axes=[2,3]>(a)", "ReduceMax"),
    "ReduceMin": Case("ReduceMin<axes=[2,3]>(a)", "ReduceMin"),
    "Resize": Case('Resize<mode="nearest">(a, , s)', "Resize", {"s": np.array([1, 1, 2, 2], np.float32)}),
}
ELSEWHERE = {"Conv", "Gemm", "MatMul", "Pad", "Relu", "Clip"}  # tests/test_quantize.py runs these through onnxruntime
FLOAT = {
    "ConvTranspose": "ConvTranspose(a, w)",
    "Sub": "Sub(a, b)",
    "Div": "Div(a, b)",
    "Max": "Max(a, b)",
    "Sum": "Sum(a, b)",
    "PRelu": "PRelu(a, b)",
    "HardSigmoid": "HardSigmoid(a)",
    "Tanh": "Tanh(a)",
    "Erf": "Erf(a)",
    "SpaceToDepth": "SpaceToDepth<blocksize=2>(a)",
    "GlobalMaxPool": "GlobalMaxPool(a)",
    "ReduceMean": "ReduceMean<axes=[2,3]>(a)",
}


def between_int8(call: str, arrays: Mapping[str, Any]) -> onnx.ModelProto:
    """The op between a DequantizeLinear for each input and a QuantizeLinear."""
    extra = "".join(f", {_TYPES[v.dtype.char]}[{','.join(map(str, v.shape))}] {k}" for k, v in arrays.items())
    second = "b = DequantizeLinear(r, scale, zero)" if "(a, b" in call else ""
    split = call.startswith("Split")
    results, also = ("y, z", "other = QuantizeLinear(z, scale, zero)") if split else ("y", "")
    body = f"""g (uint8[1,16,8,8] p, uint8[1,16,8,8] r, float scale, uint8 zero{extra}) => (uint8 out{", uint8 other" * split}) {{
        a = DequantizeLinear(p, scale, zero) {second} {results} = {call} out = QuantizeLinear(y, scale, zero) {also} }}"""
    model = build(body, scale=np.array(0.02, np.float32), zero=np.array(128, np.uint8), **dict(arrays))
    for output in model.graph.output:
        output.type.tensor_type.ClearField("shape")
    return model


_TYPES = {"l": "int64", "q": "int64", "f": "float"}


@pytest.mark.parametrize("op", INT8)
def test_int8_rows_run_on_integers_in_onnxruntime(op: str, tmp_path: Path) -> None:
    case = INT8[op]
    assert ORT_CPU.support(op).int8
    ops = fused(between_int8(case.call, case.arrays or {}), tmp_path)
    assert case.kernel in ops
    assert not QDQ & set(ops)


@pytest.mark.parametrize("op", FLOAT)
def test_float_rows_have_no_int8_kernel_in_onnxruntime(op: str, tmp_path: Path) -> None:
    # When onnxruntime learns one, this fails, and the row should be measured again.
    assert not ORT_CPU.support(op).int8
    arrays = {"w": np.ones((16, 4, 2, 2), np.float32)} if "w" in FLOAT[op] else {}
    assert set(fused(between_int8(FLOAT[op], arrays), tmp_path)) >= QDQ


def test_all_int8_rows_are_checked_and_have_a_quantisation_rule() -> None:
    rows = {op for op, support in ORT_CPU.ops.items() if support.int8}
    assert rows == {*INT8, *ELSEWHERE}
    assert rows <= set(QOPS)


@pytest.mark.parametrize("target", BUILTIN.values(), ids=lambda t: t.name)
def test_every_row_and_setting_has_its_reason(target: Target) -> None:
    settings = {f.name for f in fields(Target)} - {"name", "summary", "ops", "unlisted", "why", "onnxruntime", "dot_products"}
    assert set(target.why) == settings
    assert all(target.why.values())
    assert all(support.reason for support in target.ops.values())
    assert target.support("NoSuchOp").reason == target.unlisted


@pytest.mark.parametrize("target", BUILTIN.values(), ids=lambda t: t.name)
def test_every_target_makes_models_that_onnxruntime_runs(target: Target, tmp_path: Path) -> None:
    body = """g (float[N,16,8,8] x, float[16,16,3,3] w) => (float[N,16,1,1] y) {
        c = Conv<pads=[1,1,1,1]>(x, w) r = Relu(c) d = Conv<pads=[1,1,1,1]>(r, w) s = Add(d, r) y = GlobalAveragePool(s) }"""
    model, context = run_quantize(build(body, w=_POINTS.astype(np.float32)), target=target)
    assert context.facts["target"] == target.name
    assert fused(model, tmp_path)


def test_unknown_target_lists_the_valid_ones() -> None:
    with pytest.raises(OptionError, match="did you mean 'openvino'.*ort-cpu-no-vnni"):
        find_target("openvin")


@dataclass(frozen=True)
class Point:
    name: str
    value: str
    loaded: object

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.mark.parametrize(
    ("loaded", "message"),
    [
        (replace(ORT_CPU, name="tensorrt"), "two targets are named 'tensorrt': one in graphopt, one in other:T"),
        ("a string", "is a str, not a Target"),
        (ImportError("no such module"), "cannot be loaded: no such module"),
    ],
)
def test_bad_packaged_targets_name_their_owner(loaded: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point("t", "other:T", loaded)])
    with pytest.raises(OptionError, match=message):
        find_target("mine")


def test_packaged_targets_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    mine = replace(ORT_CPU, name="mine")
    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Point("mine", "other:T", mine)])
    assert find_target("mine") is mine
    assert list(targets.targets()) == [*BUILTIN, "mine"]


def test_targets_that_run_elsewhere_or_need_other_cpus_are_told_apart() -> None:
    assert {name for name, t in BUILTIN.items() if t.onnxruntime} == {"ort-cpu", "ort-cpu-no-vnni", "ort-cpu+graphopt"}
    assert [name for name, t in BUILTIN.items() if t.dot_products] == ["ort-cpu"]
