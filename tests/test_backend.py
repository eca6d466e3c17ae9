"""graphopt.backend under onnx's own backend test runner, and what the runner does not ask for.

The runner covers the interface: prepare, run, comparison. That the passes are exact on every one of these models is checked in
test_robustness, so the default suite runs a part of the node tests here and `-m slow` all of them, with the light models.
"""

from __future__ import annotations

import unittest
from collections.abc import Iterator
from typing import Any, cast

import numpy as np
import onnx
import pytest
from onnx import helper
from onnx.backend.base import Backend, BackendRep
from onnx.backend.test import BackendTest
from onnx.backend.test.runner import BackendIsNotSupposedToImplementIt

import graphopt.backend
from graphopt.errors import DataError, OptionError
from graphopt.runtime import session

# what onnxruntime alone, without graphopt, does otherwise than onnx expects (1.31 against onnx 1.23); a test holds the list to that
RANDOM = "draws its own random numbers"
ATTENTION = "onnxruntime masks and rounds in another order"
DFT = "onnxruntime computes one axis more or less"
EXCLUDED = {
    "attention_4d_causal_fp16": ATTENTION,
    "attention_4d_diff_heads_mask4d_padded_kv": ATTENTION,
    "attention_4d_with_past_and_present_qk_matmul_bias_3d_mask_causal": ATTENTION,
    "attention_4d_with_past_and_present_qk_matmul_bias_4d_mask_causal": ATTENTION,
    "convinteger_with_padding": "onnxruntime wants the zero point of the weights",
    "dft": DFT,
    "dft_axis": DFT,
    "dft_axis_opset19": DFT,
    "dft_inverse": DFT,
    "dft_inverse_opset19": DFT,
    "dft_irfft": DFT,
    "dft_irfft_opset19": DFT,
    "dft_opset19": DFT,
    "dft_rfft": DFT,
    "dft_rfft_opset19": DFT,
    "loop16_seq_none": "the runner cannot compare its sequence",
    "maxunpool_export_with_output_shape": "onnxruntime places the maxima by the smaller shape",
    "reduce_max_empty_set_bool": "onnxruntime has no maximum of no booleans",
    "resize_downsample_scales_cubic_align_corners": "onnx expects the size before rounding down",
    "resize_downsample_scales_linear_align_corners": "onnx expects the size before rounding down",
    "stft": DFT,
    "stft_with_window": DFT,
    "training_dropout": RANDOM,
    "training_dropout_default": RANDOM,
    "training_dropout_default_mask": RANDOM,
    "training_dropout_mask": RANDOM,
}
KINDS = ("Node", "Simple", "PyTorchConverted", "PyTorchOperator", "Real")
PART = {"Node": 4}  # every so many are run by default
AT_LEAST = {
    "Node": 1400,
    "Simple": 15,
    "PyTorchConverted": 50,
    "PyTorchOperator": 20,
    "Real": 5,
}  # pass


class Counted(unittest.TestResult):
    """Names of what passed, beside failures, errors and skips."""

    def __init__(self) -> None:
        super().__init__()
        self.passed: list[str] = []

    def addSuccess(self, test: unittest.TestCase) -> None:
        self.passed.append(test.id())

    @property
    def wrong(self) -> list[str]:
        found = [*self.failures, *self.errors]
        return [f"{test.id().rsplit('.', 1)[-1]}: {text.strip().splitlines()[-1]}" for test, text in found]


def name(test: unittest.TestCase) -> str:
    return test.id().rsplit(".", 1)[-1].removeprefix("test_").removesuffix("_cpu")


def cases(backend: Any, kind: str) -> list[unittest.TestCase]:
    """The runner's test cases of one kind, on CPU, in order of name."""

    def flat(suite: Any) -> Iterator[unittest.TestCase]:
        for test in suite:
            if isinstance(test, unittest.TestCase):
                yield test
            else:
                yield from flat(test)

    found = [t for t in flat(BackendTest(cast(Any, backend), __name__).test_suite) if f".OnnxBackend{kind}ModelTest." in t.id()]
    return sorted((t for t in found if t.id().endswith("_cpu")), key=name)


def execute(chosen: list[unittest.TestCase]) -> Counted:
    result = Counted()
    unittest.TestSuite(chosen).run(result)
    return result


def judge(kind: str, every: int) -> None:
    chosen = [t for t in cases(graphopt.backend, kind) if name(t) not in EXCLUDED][::every]
    result = execute(chosen)
    assert not result.wrong
    assert len(result.passed) + len(result.skipped) == len(chosen)
    assert len(result.passed) >= AT_LEAST[kind] // every


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_the_runner_of_onnx(kind: str) -> None:
    judge(kind, PART.get(kind, 1))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", ["Node", "Real"])
def test_the_whole_runner_of_onnx(kind: str) -> None:
    judge(kind, 1)


class _PlainRep(BackendRep):
    def __init__(self, model: onnx.ModelProto) -> None:
        self.session = session(model)

    def run(self, inputs: Any, **options: Any) -> tuple[Any, ...]:
        names = [i.name for i in self.session.get_inputs()]
        feed = {n: np.asarray(v) if isinstance(v, np.generic) else v for n, v in zip(names, inputs, strict=True)}
        return tuple(self.session.run(None, feed))


class _Plain(Backend):
    """onnxruntime alone."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **options: Any) -> _PlainRep:
        return _PlainRep(model)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        return device == "CPU"


@pytest.mark.skipif(not onnx.__version__.startswith("1.23"), reason="the list is of onnx 1.23's expectations")
def test_excluded_is_only_what_onnxruntime_alone_gets_wrong_too() -> None:
    chosen = [t for t in cases(_Plain, "Node") if name(t) in EXCLUDED]
    assert {name(t) for t in chosen} == set(EXCLUDED)
    result = execute(chosen)
    right = {test.rsplit(".", 1)[-1].removeprefix("test_").removesuffix("_cpu") for test in result.passed}
    assert not {n for n in right if EXCLUDED[n] != RANDOM}


# ---- the interface itself

ADD = '<ir_version: 8, opset_import: ["" : 17]> m (float[2] a, float[2] b) => (float[2] y) { u = Identity(a)  y = Add(u, b) }'
A, B = np.array([1, 2], np.float32), np.array([3, 5], np.float32)


@pytest.mark.parametrize("inputs", [[A, B], (A, B), {"a": A, "b": B}, {"b": B, "a": A}])
def test_run_takes_sequences_and_dicts(inputs: Any) -> None:
    prepared = graphopt.backend.prepare(onnx.parser.parse_model(ADD))
    assert [n.op_type for n in prepared.model.graph.node] == ["Add"]
    for outputs in (prepared.run(inputs), graphopt.backend.run_model(onnx.parser.parse_model(ADD), inputs)):
        np.testing.assert_array_equal(cast(Any, outputs).y, [4, 7])
        np.testing.assert_array_equal(outputs[0], [4, 7])


def test_one_array_and_scalars() -> None:
    model = onnx.parser.parse_model('<ir_version: 8, opset_import: ["" : 17]> m (float x) => (float y) { y = Neg(x) }')
    for given in (np.float32(2), np.array(2, np.float32), [np.float32(2)], {"x": np.float32(2)}):
        assert graphopt.backend.run_model(model, given)[0] == -2


def test_the_wrong_number_of_inputs() -> None:
    prepared = graphopt.backend.prepare(onnx.parser.parse_model(ADD))
    with pytest.raises(DataError, match="takes 2 inputs .*, found 1"):
        prepared.run([A])


def test_options_are_refused() -> None:
    model = onnx.parser.parse_model(ADD)
    with pytest.raises(OptionError, match="prepare takes no options, found speed"):
        graphopt.backend.prepare(model, speed="high")
    with pytest.raises(OptionError, match="run takes no options, found speed"):
        graphopt.backend.prepare(model).run([A, B], speed="high")
    with pytest.raises(OptionError, match="CPU only, not 'CUDA'"):
        graphopt.backend.prepare(model, device="CUDA")


def test_devices() -> None:
    answers = {d: graphopt.backend.supports_device(d) for d in ("CPU", "cpu", "CPU:0", "CUDA", "CUDA:1", "")}
    assert answers == {"CPU": True, "cpu": True, "CPU:0": True, "CUDA": False, "CUDA:1": False, "": False}


def test_what_onnxruntime_does_not_load_is_not_ours_to_run() -> None:
    model = onnx.parser.parse_model(ADD)
    assert graphopt.backend.is_compatible(model)
    assert not graphopt.backend.is_compatible(model, device="CUDA")
    model.graph.node[0].domain = "nobody"
    assert not graphopt.backend.is_compatible(model)
    with pytest.raises(BackendIsNotSupposedToImplementIt):
        graphopt.backend.prepare(model)


def test_run_node() -> None:
    node = helper.make_node("Add", ["a", "b"], ["y"])
    for inputs in ([A, B], {"b": B, "a": A}):
        np.testing.assert_array_equal(graphopt.backend.run_node(node, inputs)[0], [4, 7])
    typed = graphopt.backend.run_node(node, [A, B], outputs_info=[(np.float32, (2,))])
    np.testing.assert_array_equal(typed[0], [4, 7])
    top = graphopt.backend.run_node(helper.make_node("TopK", ["x", "k"], ["", "i"]), [A, np.array([1])])
    assert [t.tolist() for t in top] == [[1]]
    reshaped = graphopt.backend.run_node(helper.make_node("Reshape", ["x", "s"], ["y"]), [A, np.array([2, 1])])
    assert reshaped[0].shape == (2, 1)


def test_run_node_that_does_not_exist() -> None:
    with pytest.raises(OptionError, match="no operator 'Nonsense' in ONNX domain ''"):
        graphopt.backend.run_node(helper.make_node("Nonsense", ["x"], ["y"]), [A])


def test_the_counter_counts() -> None:
    """A runner that silently skipped everything would pass `not result.wrong`."""

    def fail() -> None:
        raise AssertionError("no")

    def skip() -> None:
        raise unittest.SkipTest("no")

    result = execute([unittest.FunctionTestCase(f) for f in (lambda: None, fail, skip)])
    assert (len(result.passed), len(result.wrong), len(result.skipped)) == (1, 1, 1)
