"""What is measured: the same job done by graphopt and by its peers, as functions to call again and again.

Each factory takes a model file (and data) and a folder to write in, and gives one function a tool. The pytest-benchmark suites and
`bench/report.py` time the same functions.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import workloads

from graphopt.data import Dataset, open_dataset
from graphopt.feeds import input_specs
from graphopt.model import Model, from_proto, load

Jobs = dict[str, Callable[[], object]]  # tool -> one run of the job; graphopt comes first
SLOW = 20.0  # seconds: what takes longer is timed once
FOLD = "cleanup, fold-bn, fold-scales"
METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}  # ours -> onnxruntime's calibrators
CLEANUP_MODELS = ("digits", "generated_2500", "ppocr_det", "ppocr_rec", "silero_vad_op15", "rxnmap", "minilm_l3")


def workload(name: str, folder: Path) -> Path:
    """The file of a named model: digits, generated_<nodes> (written to `folder`), or one of tests/zoo.py."""
    if name == "digits":
        return workloads.digits()
    if not name.startswith("generated_"):
        return workloads.real(name)
    path = folder / f"{name}.onnx"
    if not path.exists():
        onnx.save(workloads.generated(int(name.removeprefix("generated_"))), path)
    return path


def digits_data() -> Path:
    """The calibration rows that ship beside the digits model."""
    return workloads.digits().with_name("digits_calib.npz")


def dataset(model: Path, data: Path) -> Dataset:
    """Rows for the model's inputs."""
    return open_dataset(data, input_specs(load(model).interface()))


def load_and_save(path: Path, folder: Path) -> Jobs:
    """Read the file, write it elsewhere. onnx keeps the protobuf; onnx-graphsurgeon builds a graph as graphopt does."""
    from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
    from onnx_graphsurgeon.importers.onnx_importer import OnnxImporter

    from graphopt.emit import save

    def surgeon() -> None:
        proto = onnx.load(path)
        graph = OnnxImporter.import_graph(proto.graph, opset=proto.opset_import[0].version)
        onnx.save(onnx.helper.make_model(OnnxExporter.export_graph(graph), opset_imports=proto.opset_import), folder / "gs.onnx")

    return {
        "graphopt": lambda: save(load(path), folder / "graphopt.onnx", overwrite=True),
        "onnx": lambda: onnx.save(onnx.load(path), folder / "onnx.onnx"),
        "onnx-graphsurgeon": surgeon,
    }


def cleanup(path: Path, folder: Path) -> Jobs:
    """Simplify a model from file to protobuf: `fold` does what the others do by default (they fold BatchNormalization too)."""
    import onnxsim
    import onnxslim

    from graphopt.pipeline import parse, run

    def ours() -> onnx.ModelProto:
        model = load(path)
        run(model, parse("fold"), context(None))
        return model.proto()

    return {
        "graphopt": ours,
        "onnxslim": lambda: onnxslim.slim(str(path)),
        "onnxsim": lambda: onnxsim.simplify(onnx.load(path)),
    }


def context(data: Dataset | None) -> Any:
    """A fresh context with the default target."""
    from graphopt.context import Context
    from graphopt.targets import find_target

    return Context(data, find_target("ort-cpu"))


class Reader:
    """onnxruntime's CalibrationDataReader over our rows, one at a time."""

    def __init__(self, rows: Dataset) -> None:
        self._feeds: Iterator[Any] = iter(rows.batches(1))

    def get_next(self) -> Any:
        return next(self._feeds, None)


def prepared(path: Path, folder: Path) -> Path:
    """The model as onnxruntime wants it before quantisation (its own optimisations applied, shapes inferred)."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    result = folder / f"{path.stem}_prepared.onnx"
    quant_pre_process(str(path), str(result), skip_symbolic_shape=True)
    return result


def calibration(path: Path, data: Path, folder: Path, method: str) -> Jobs:
    """Ranges of every float tensor that onnxruntime's calibrator chooses, of the same prepared model and rows."""
    from onnxruntime.quantization.calibrate import CalibrationMethod, create_calibrator

    from graphopt.calibrate import calibrate

    model, rows = prepared(path, folder), dataset(path, data)

    def theirs() -> object:
        kind = CalibrationMethod[METHODS[method]]
        calibrator = create_calibrator(str(model), augmented_model_path=str(folder / "augmented.onnx"), calibrate_method=kind)
        calibrator.collect_data(Reader(rows))
        return calibrator.compute_data()

    chooser = create_calibrator(str(model), augmented_model_path=str(folder / "augmented.onnx"))
    proto = onnx.load(model)
    weights = {i.name for i in proto.graph.initializer}
    names = sorted(name for name in chooser.select_tensors_to_calibrate(proto)[0] if name not in weights)

    def ours() -> object:
        statistics = calibrate(model, rows, names, method=method)
        return {name: found.range(method) for name, found in statistics.items()}

    return {"graphopt": ours, "onnxruntime.quantization": theirs}


def quantize(path: Path, data: Path, folder: Path, method: str) -> Jobs:
    """Calibrate, quantise per channel, write; each tool from the file its own preparation made (not timed)."""
    from graphopt.emit import save
    from graphopt.pipeline import parse, run

    ready, rows = prepared(path, folder), dataset(path, data)
    folded = load(path)
    run(folded, parse(FOLD), context(None))
    own = folder / f"{path.stem}_folded.onnx"
    save(folded, own, overwrite=True)

    def ours() -> object:
        model = load(own)
        run(model, parse(f"quantize method={method}"), context(rows))
        return save(model, folder / "graphopt.int8.onnx", overwrite=True)

    return {"graphopt": ours, "onnxruntime.quantization": lambda: _quantize_static(ready, rows, folder, method)}


def _quantize_static(model: Path, rows: Dataset, folder: Path, method: str) -> object:
    from onnxruntime.quantization import CalibrationMethod, QuantFormat, QuantType, quantize_static

    return quantize_static(
        str(model),
        str(folder / "peer.int8.onnx"),
        Reader(rows),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        calibrate_method=CalibrationMethod[METHODS[method]],
    )


def end_to_end(path: Path, data: Path, folder: Path, method: str) -> Jobs:
    """From file to INT8 file. graphopt also checks that the result loads and compares its outputs with the original's."""
    import graphopt

    rows = dataset(path, data)

    def ours() -> object:
        result = graphopt.optimize(path, f"{FOLD}, quantize method={method}", calibration=data)
        return result.save(folder / "graphopt.int8.onnx", overwrite=True)

    return {"graphopt": ours, "onnxruntime.quantization": lambda: _quantize_static(prepared(path, folder), rows, folder, method)}


def timed(benchmark: Any, tools: Jobs, tool: str, rounds: int) -> None:
    """Warm up, then time with pytest-benchmark; a peer that cannot do the job is skipped with its message."""
    import pytest

    began = time.perf_counter()
    try:
        tools[tool]()
    except Exception as error:  # the peers raise whatever they like
        if tool == "graphopt":
            raise
        pytest.skip(f"{tool}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    benchmark.pedantic(tools[tool], rounds=rounds if time.perf_counter() - began < SLOW else 1)


def fresh(proto: onnx.ModelProto, before: str) -> Model:
    """A model of its own, with the passes `before` run on it."""
    from graphopt.pipeline import parse, run

    model = from_proto(proto)
    if before:
        run(model, parse(before), context(None))
    return model


def rows_like(model: Model, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Normal random rows for a model with float inputs, dynamic axes after the first taken as 1."""
    random = np.random.default_rng(seed)
    sizes = {t.name: [d if isinstance(d, int) and d > 0 else 1 for d in (t.shape or ())[1:]] for t in model.graph.inputs}
    return {name: random.standard_normal((rows, *rest)).astype(np.float32) for name, rest in sizes.items()}
