"""sparsify: what becomes zero, in which layers, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.api import optimize
from graphopt.errors import OptionError, PassError
from graphopt.sparsity import CRITERIA, Pattern, Task, choose, criterion, global_ratios, parse_pattern

Array = np.ndarray
RNG = np.random.default_rng(0)


def network(**weights: Array) -> onnx.ModelProto:
    """A stem, a depthwise and two other convolutions, then a MatMul and a Gemm."""
    made = {
        "stem": RNG.normal(size=(8, 3, 3, 3)), "dw": RNG.normal(size=(8, 1, 3, 3)), "one": RNG.normal(size=(16, 8, 1, 1)),
        "three": RNG.normal(size=(8, 16, 3, 3)), "mm": RNG.normal(size=(8, 12)), "fc": RNG.normal(size=(6, 12)),
    }  # fmt: skip
    made = {k: np.asarray(v, np.float32) for k, v in {**made, **weights}.items()}
    nodes = [
        helper.make_node("Conv", ["x", "stem"], ["a"], "c_stem", pads=[1] * 4),
        helper.make_node("Conv", ["a", "dw"], ["b"], "c_dw", pads=[1] * 4, group=8),
        helper.make_node("Conv", ["b", "one"], ["c"], "c_one"),
        helper.make_node("Conv", ["c", "three"], ["d"], "c_three", pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["d"], ["e"]),
        helper.make_node("Flatten", ["e"], ["f"]),
        helper.make_node("MatMul", ["f", "mm"], ["g"], "c_mm"),
        helper.make_node("Gemm", ["g", "fc"], ["y"], "c_fc", transB=1),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 6])],
        [numpy_helper.from_array(v, k) for k, v in made.items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def densities(model: onnx.ModelProto) -> dict[str, float]:
    return {t.name: float((numpy_helper.to_array(t) != 0).mean()) for t in model.graph.initializer}


def weight(model: onnx.ModelProto, name: str) -> Array:
    return next(numpy_helper.to_array(t) for t in model.graph.initializer if t.name == name)


def test_uniform_magnitude_leaves_stems_and_depthwise_alone() -> None:
    before = network()
    after = optimize(before, "sparsify ratio=0.75").proto()
    found = densities(after)
    assert (found["stem"], found["dw"]) == (1, 1)
    assert {found[name] for name in ("one", "three", "mm", "fc")} == {0.25}
    old, new = weight(before, "three"), weight(after, "three")
    np.testing.assert_array_equal(new[new != 0], old[new != 0])
    assert np.abs(old[new == 0]).max() <= np.abs(new[new != 0]).min()


def test_thin_layers_where_asked_for() -> None:
    assert densities(optimize(network(), "sparsify ratio=0.5 thin=true").proto())["stem"] == 0.5


def test_two_of_four() -> None:
    after = optimize(network(), "sparsify pattern=2:4").proto()
    flat = weight(after, "three").reshape(-1, 4)
    assert ((flat != 0).sum(1) == 2).all()
    assert ((weight(after, "mm").T.reshape(-1, 4) != 0).sum(1) == 2).all()  # stored [inputs, outputs]


@pytest.mark.parametrize(("pattern", "rows", "columns"), [("4x1", 4, 1), ("1x4", 1, 4), ("4x4", 4, 4)])
def test_blocks(pattern: str, rows: int, columns: int) -> None:
    result = optimize(network(), f"sparsify pattern={pattern} ratio=0.5 exclude=fc")
    matrix = weight(result.proto(), "three").reshape(8, -1)
    blocks = (matrix != 0).reshape(8 // rows, rows, -1, columns).any((1, 3))
    assert blocks.mean() == 0.5
    assert (matrix != 0).mean() == 0.5


def test_blocks_that_do_not_fit_say_so() -> None:
    result = optimize(network(), "sparsify pattern=4x1 ratio=0.5")
    (row,) = [r for r in result.report.passes[0].rejected if r.op == "Gemm"]
    assert row.reason == "blocks of 4 x 1 do not cover its weights exactly"


def test_global_ranks_layers_together() -> None:
    model = network(one=np.full((16, 8, 1, 1), 1.0), three=RNG.normal(size=(8, 16, 3, 3)) ** 5)
    after = densities(optimize(model, "sparsify ratio=0.6 scope=global").proto())
    assert after["three"] < after["one"]  # few of its weights matter
    sizes = {"one": 128, "three": 1152, "mm": 96, "fc": 72}
    assert sum(after[k] * n for k, n in sizes.items()) == pytest.approx(0.4 * sum(sizes.values()), abs=2)


def test_include_and_exclude() -> None:
    found = densities(optimize(network(), "sparsify ratio=0.5 include=c_* exclude='three,fc'").proto())
    assert {k: found[k] for k in ("one", "three", "mm", "fc")} == {"one": 0.5, "three": 1, "mm": 0.5, "fc": 1}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("", "pattern=unstructured needs ratio="),
        ("pattern=2:4 ratio=0.5", "pattern=2:4 has its own ratio"),
        ("ratio=1", "ratio=1 is the share of weights to remove"),
        ("ratio=0.5 pattern=4:2", "of m weights fewer than m stay"),
        ("ratio=0.5 pattern=0x4", "at least one row"),
        ("ratio=0.5 pattern=diagonal", "expected unstructured, blocks as 4x1, or n:m as 2:4"),
        ("ratio=0.5 criterion=luck", "unknown criterion 'luck'"),
    ],
)
def test_bad_options(options: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        optimize(network(), f"sparsify {options}")


def test_weights_that_are_not_finite() -> None:
    with pytest.raises(PassError, match="'c_mm': its weight 'mm' has NaN"):
        optimize(network(mm=np.full((8, 12), np.nan)), "sparsify ratio=0.5")


def test_a_criterion_may_update_what_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.sparsity.CRITERIA", dict(CRITERIA))

    @criterion("doubled")
    def doubled(weight: Array, task: Task) -> tuple[Array, Array]:
        return choose(np.abs(weight), task), weight * 2

    @criterion("wrong")
    def wrong(weight: Array, task: Task) -> tuple[Array, Array]:
        return np.ones(3, bool), weight

    before = network()
    after = weight(optimize(before, "sparsify ratio=0.5 criterion=doubled").proto(), "fc")
    np.testing.assert_array_equal(after[after != 0], 2 * weight(before, "fc")[after != 0])
    with pytest.raises(PassError, match="the criterion did not give a mask"):
        optimize(before, "sparsify ratio=0.5 criterion=wrong")


def test_nothing_to_do_changes_nothing(tmp_path: Path) -> None:
    result = optimize(network(), "sparsify ratio=0")
    assert result.report.passes[0].changes == 0


def test_patterns_and_ratios() -> None:
    assert parse_pattern("unstructured") == Pattern()
    assert str(parse_pattern("16x1")) == "16x1"
    ratios = global_ratios([np.ones((4, 4)), np.eye(4)], Pattern(), 0.5)
    assert ratios[1] > ratios[0]
    assert sum(ratios) == 1
