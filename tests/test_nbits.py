"""Products with 4-bit weights in blocks, against numpy and onnxruntime's MatMulNBits."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from graphopt import kernels
from graphopt.kernels import isa, nbits, reference

RUNGS = [name for name in isa.RUNGS if isa.available(name) and name not in ("amx", "amx_soft")]  # AMX has no code of its own here


def drawn(seed: int, m: int, k: int, n: int, block: int, zeros: bool) -> dict[str, Any]:
    """Rows, and weights whose padding of the last block is not zero."""
    random = np.random.default_rng(seed)
    blocks = -(-k // block)
    return {
        "x": random.standard_normal((m, k)).astype(np.float32),
        "weight": random.integers(0, 256, (n, blocks, block // 2), dtype=np.uint8),
        "scale": random.uniform(-0.05, 0.1, (n, blocks)).astype(np.float32),
        "zero": random.integers(0, 256, (n, (blocks + 1) // 2), dtype=np.uint8) if zeros else None,
    }


def judge(got: np.ndarray, x: np.ndarray, weight: np.ndarray, scale: np.ndarray, zero: np.ndarray | None) -> None:
    """Within the rounding of float32 sums in any order: a share of the sum of all magnitudes."""
    wanted = reference.nbits(x, weight, scale, zero)
    most = np.repeat(np.abs(scale), 2 * weight.shape[2], 1)[:, : x.shape[1]] * 15
    assert got.dtype == np.float32
    assert (np.abs(got - wanted) <= 2e-6 * (np.abs(x) @ most.T) + 1e-30).all()


@pytest.mark.parametrize("rung", RUNGS)
@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 9),
    k=st.integers(1, 300),
    n=st.integers(1, 70),
    block=st.sampled_from(nbits.BLOCKS),
    zeros=st.booleans(),
    seed=st.integers(0, 99),
)
def test_against_numpy(rung: str, m: int, k: int, n: int, block: int, zeros: bool, seed: int) -> None:
    case = drawn(seed, m, k, n, block, zeros)
    judge(nbits.NBitsGemm(case["weight"], case["scale"], k=k, zero=case["zero"], isa=rung)(case["x"]), **case)


@pytest.mark.parametrize("m", [63, 64, 65, 130])
def test_more_rows_than_are_done_at_once(m: int) -> None:
    case = drawn(m, m, 40, 37, 32, True)
    judge(nbits.NBitsGemm(case["weight"], case["scale"], k=40, zero=case["zero"])(case["x"]), **case)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(("m", "k", "block"), [(1, 96, 32), (3, 100, 16), (5, 256, 128)])
def test_against_onnxruntime(m: int, k: int, block: int, zeros: bool) -> None:
    import onnxruntime as ort

    case = drawn(1, m, k, 24, block, zeros)
    flat = {"b": case["weight"], "s": case["scale"].ravel()} | ({"z": case["zero"].ravel()} if zeros else {})
    node = helper.make_node(
        "MatMulNBits", ["x", *flat], ["y"], domain="com.microsoft", K=k, N=24, bits=4, block_size=block, accuracy_level=1
    )
    infos = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [m, size]) for name, size in (("x", k), ("y", 24))]
    graph = helper.make_graph([node], "g", infos[:1], infos[1:], [numpy_helper.from_array(v, name) for name, v in flat.items()])
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    wanted = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": case["x"]})[0]
    got = nbits.NBitsGemm(case["weight"], flat["s"], k=k, zero=flat.get("z"))(case["x"])
    np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


def test_leading_axes_are_kept() -> None:
    case = drawn(2, 6, 32, 20, 32, False)
    layer = kernels.NBitsGemm(case["weight"], case["scale"], k=32)
    rows = case["x"].reshape(2, 3, 32)
    np.testing.assert_array_equal(layer(rows), layer(case["x"]).reshape(2, 3, 20))
    assert layer(case["x"][0]).shape == (20,)
    assert layer(case["x"][:0]).shape == (0, 20)


def test_what_does_not_fit_is_said() -> None:
    case = drawn(3, 2, 32, 20, 32, True)
    weight, scale, zero = case["weight"], case["scale"], case["zero"]
    with pytest.raises(ValueError, match=r"weight int8\[20, 1, 16\]: expected uint8 .*block one of"):
        nbits.NBitsGemm(weight.view(np.int8), scale, k=32)
    with pytest.raises(ValueError, match="1 blocks of 32 do not make up K = 33"):
        nbits.NBitsGemm(weight, scale, k=33)
    with pytest.raises(ValueError, match=r"scale float64\[20, 1\]: expected float32"):
        nbits.NBitsGemm(weight, scale.astype(np.float64), k=32)
    with pytest.raises(ValueError, match=r"zero uint8\[19, 1\]: expected uint8 \[20, 1\]"):
        nbits.NBitsGemm(weight, scale, k=32, zero=zero[:19])
    with pytest.raises(ValueError, match=r"x float32\[2, 31\]: expected float32 \[..., 32\]"):
        nbits.NBitsGemm(weight, scale, k=32)(case["x"][:, :31])
