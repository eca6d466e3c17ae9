"""Calibration gives the statistics of what the model computes, whatever the batches and threads, in bounded memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt.calibrate import calibrate
from graphopt.data import Dataset, input_specs, open_dataset
from graphopt.errors import DataError, ModelError
from graphopt.observers import Statistics, observe

ROWS = np.random.default_rng(0).standard_normal((23, 2, 5)).astype(np.float32)


def model(batch: object = "N") -> onnx.ModelProto:
    """Elementwise, so that values do not depend on the batch: double = 2x, positive = relu(double), swapped has rows on axis 1."""
    return onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[{batch},2,5] x) => (float[{batch},2,5] y)
        {{
            two = Constant<value = float {{2}}>()
            double = Mul(x, two)
            positive = Relu(double)
            swapped = Transpose<perm = [1, 0, 2]>(positive)
            order = Constant<value = int64[3] {{-1, 2, 5}}>()
            shape = Shape(positive)
            root = Sqrt(double)
            y = Add(positive, x)
        }}""")


def dataset(source: Any = None, *, batch: object = "N") -> Dataset:
    return open_dataset({"x": ROWS} if source is None else source, input_specs(model(batch)))


def fields(statistics: Statistics) -> dict[str, object]:
    return {**statistics.__dict__, "counts": None if statistics.counts is None else statistics.counts.tolist()}


def expected(*, histogram: bool) -> dict[str, Statistics]:
    double = ROWS * 2
    values = {"positive": np.maximum(double, 0), "x": ROWS, "y": np.maximum(double, 0) + ROWS, "double": double}
    return {name: observe(value, rows=len(ROWS), histogram=histogram) for name, value in values.items()}


@pytest.mark.parametrize("method", ["minmax", "moving-average", "entropy"])
def test_statistics_are_those_of_the_activations(method: str) -> None:
    wanted = expected(histogram=method == "entropy")
    choices: list[dict[str, Any]] = [{}, {"batch": 1, "threads": 1}, {"batch": 4, "threads": 3}, {"batch": 100}]
    for options in choices:
        found = calibrate(model(), dataset(), [*wanted], method=method, **options)
        assert list(found) == [*wanted]
        for name, statistics in wanted.items():
            assert fields(found[name]) == fields(statistics), (name, options)


@pytest.mark.parametrize("batch", [1, 4, 30])
def test_a_fixed_batch_is_filled_up_without_counting_twice(batch: int) -> None:
    found = calibrate(model(batch), dataset(batch=batch), ["positive", "x"], method="percentile")
    for name, statistics in expected(histogram=True).items():
        if name in found:
            assert fields(found[name]) == fields(statistics)


def test_rows_elsewhere_than_on_the_first_axis_run_one_by_one() -> None:
    """Each row's extremes count; with a batch the Transpose would mix rows."""
    found = calibrate(model(), dataset(), ["swapped"], method="moving-average")["swapped"]
    assert fields(found) == fields(expected(histogram=False)["positive"])
    together = calibrate(model(), dataset(), ["swapped"], method="minmax", batch=7)["swapped"]
    assert (together.low, together.high) == (found.low, found.high)


def test_feeds_are_run_as_they_come() -> None:
    feeds = [{"x": ROWS[:20]}, {"x": ROWS[20:]}]
    seen = []
    found = calibrate(model(), dataset(feeds), ["y"], progress=lambda what, done, total: seen.append((what, done, total)))
    assert fields(found["y"]) == fields(expected(histogram=False)["y"])
    assert seen == [("calibrate", 20, 0), ("calibrate", 23, 0)]


def test_the_model_is_left_alone_and_may_be_a_path_with_external_weights(tmp_path: Path) -> None:
    proto = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[N,2,5] x) => (float[N,2,5] y) { h = Mul(x, w) y = Relu(h) }""")
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.arange(1, 6, dtype=np.float32), "w"))
    before = proto.SerializeToString()
    wanted = fields(calibrate(proto, dataset(), ["h"])["h"])
    assert proto.SerializeToString() == before
    assert wanted["high"] == (ROWS * np.arange(1, 6, dtype=np.float32)).max()
    assert fields(calibrate(before, dataset(), ["h"])["h"]) == wanted
    path = tmp_path / "model.onnx"
    onnx.save(proto, path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    assert (tmp_path / "weights.bin").stat().st_size >= 20
    assert fields(calibrate(path, dataset(), ["h"])["h"]) == wanted
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "weights.bin"]


@pytest.mark.parametrize("method", ["minmax", "mse"])
def test_nan_names_tensor_and_row(method: str) -> None:
    positive = np.abs(ROWS)
    positive[17, 1, 1] = -1  # its square root is NaN
    for batch in (1, 6, 23):
        with pytest.raises(DataError, match=r"^calibrate: tensor 'root': row 17 makes NaN or Inf"):
            calibrate(model(), dataset({"x": positive}), ["y", "root"], method=method, batch=batch)


def test_tensors_that_are_not_finite_may_be_left_out() -> None:
    positive = np.abs(ROWS)
    positive[17, 1, 1] = -1
    found = calibrate(model(), dataset({"x": positive}), ["root", "y"], batch=2, drop_nonfinite=True)
    assert list(found) == ["y"]
    assert found["y"].rows == len(ROWS)
    assert calibrate(model(), dataset({"x": positive}), ["root"], drop_nonfinite=True) == {}


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        ("shape", "tensor 'shape' is int64; only floats have a range"),
        ("nowhere", "tensor 'nowhere' is not computed by the model's main graph"),
    ],
)
def test_tensors_without_a_range(tensor: str, message: str) -> None:
    with pytest.raises(ModelError, match=f"^calibrate: {message}"):
        calibrate(model(), dataset(), ["y", tensor])


def test_unreadable_models_and_nothing_to_observe(tmp_path: Path) -> None:
    assert calibrate(model(), dataset(), []) == {}
    with pytest.raises(ModelError, match="cannot read the model"):
        calibrate(tmp_path / "missing.onnx", dataset(), ["y"])
    with pytest.raises(ModelError, match="cannot read the model"):
        calibrate(b"\xff\xff", dataset(), ["y"])


# getrusage would not do: a child's maximum starts with that of the process it was forked from
PEAK = """
import sys
from pathlib import Path
import numpy as np, onnx
from graphopt.calibrate import calibrate
from graphopt.data import input_specs, open_dataset

model = onnx.load(sys.argv[1])
tensors = [output for node in model.graph.node for output in node.output]
calibrate(model, open_dataset(sys.argv[2], input_specs(model)), tensors, method=sys.argv[3])
print(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


def convolutions(path: Path) -> None:
    """Four 3x3 convolutions of 16 channels with ReLU on 224x224 images: 26 MB of activations a row."""
    random, lines, weights = np.random.default_rng(0), [], []
    for layer in range(4):
        shape = (16, 16 if layer else 3, 3, 3)
        weights.append(onnx.numpy_helper.from_array((random.standard_normal(shape) / 12).astype(np.float32), f"w{layer}"))
        source = f"r{layer - 1}" if layer else "x"
        lines.append(f"c{layer} = Conv<pads = [1, 1, 1, 1]>({source}, w{layer}) r{layer} = Relu(c{layer})")
    text = f'<ir_version: 8, opset_import: ["" : 17]> g (float[N,3,224,224] x) => (float[N,16,224,224] r3) {{ {" ".join(lines)} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(weights)
    onnx.save(proto, path)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("method", ["minmax", "entropy"])
def test_memory_does_not_grow_with_the_rows(method: str, tmp_path: Path) -> None:
    """Peak resident memory with 1000 rows of 3x224x224 within 10 % of 100 rows; the whole data would take 602 MB."""
    convolutions(tmp_path / "model.onnx")
    peaks = {}
    for rows, runs in ((100, 3), (1000, 1)):  # few rows do not always meet the worst moment, when all workers are at their peak
        path = tmp_path / f"{rows}.npy"
        data = np.lib.format.open_memmap(path, "w+", np.float32, (rows, 3, 224, 224))
        for row in range(rows):
            data[row] = np.random.default_rng(row).standard_normal((3, 224, 224))
        data.flush()
        del data
        command = [sys.executable, "-c", PEAK, str(tmp_path / "model.onnx"), str(path), method]
        results = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(runs)]
        assert not any(result.returncode for result in results), results
        peaks[rows] = sorted(int(result.stdout) for result in results)[runs // 2]
        path.unlink()
    assert peaks[1000] < 1.1 * peaks[100], peaks
