"""Time grows with the nodes, memory with the weights: generated graphs of thousands of nodes, and gigabytes."""

from __future__ import annotations

import gc
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
import workloads

from graphopt import emit
from graphopt.context import Context
from graphopt.data import open_dataset
from graphopt.feeds import input_specs
from graphopt.model import Model, load
from graphopt.pipeline import StepResult, parse, run
from graphopt.runtime import session
from graphopt.targets import find_target

ROWS = np.random.default_rng(0).standard_normal((2, workloads.CHANNELS, workloads.SIDE, workloads.SIDE)).astype(np.float32)
GROWTH = 2.5  # when nodes double
COLLECTOR = "garbage collection"
NOISE = 0.1  # CPU seconds by which the time of a pass may vary
Run = Callable[..., "tuple[int, str, str]"]


def timed(model: Model, passes: str) -> dict[str, float]:
    """CPU seconds by pass, over all its runs, verification included; other processes do not count.

    Python's garbage collector has an entry of its own: a full collection takes as long as there are objects in the process, and
    falls on whatever pass happens to make the last straw.
    """
    dataset = open_dataset({"x": ROWS}, input_specs(model.interface()))
    taken: dict[str, float] = defaultdict(float)
    last = time.process_time()
    began = 0.0

    def collect(phase: str, _info: dict[str, int]) -> None:
        nonlocal last, began
        now = time.process_time()
        if phase == "start":
            began = now
        else:
            taken[COLLECTOR] += now - began
            last += now - began

    def note(_model: Model, _step: object, result: StepResult) -> None:
        nonlocal last
        now = time.process_time()
        taken[result.name] += now - last
        last = now

    gc.callbacks.append(collect)
    try:
        run(model, parse(passes), Context(dataset, find_target("ort-cpu")), [note])
    finally:
        gc.callbacks.remove(collect)
    return taken


def test_cleanup_of_thousands_of_nodes() -> None:
    """A small graph of the kind below: nothing of what it computes is lost, all that is superfluous goes, in seconds."""
    proto = workloads.generated(2000)
    blocks = sum(node.op_type == "Tanh" for node in proto.graph.node)
    expected = session(proto).run(None, {"x": ROWS})[0]
    model = load(proto)
    taken = sum(timed(model, "cleanup").values())
    np.testing.assert_array_equal(session(model.proto()).run(None, {"x": ROWS})[0], expected)
    left = "Conv BatchNormalization Relu Conv Sigmoid Add Mul Add Tanh".split()  # of a block; views, pads and twins are gone
    assert len(model.nodes()) <= len(left) * blocks
    assert taken < 30  # about a second in 2025: this is to find a loop inside a loop


@pytest.mark.parametrize("passes", ["cleanup", "cleanup, prune-channels ratio=0.25"])
def test_external_data_through_the_command_line(passes: str, cli: Run, tmp_path: Path) -> None:
    source = workloads.external(tmp_path, 1 << 20, width=64, hidden=256)
    code, _, error = cli("optimize", source, "-o", tmp_path / "out.onnx", "--passes", passes, "-q")
    assert (code, error) == (0, "")
    model = load(tmp_path / "out.onnx")
    assert emit.save(model, tmp_path / "apart.onnx", external=True) == [tmp_path / "apart.onnx", tmp_path / "apart.onnx.data"]
    assert (tmp_path / "apart.onnx").stat().st_size < 100_000 < (tmp_path / "apart.onnx.data").stat().st_size
    rows = np.random.default_rng(0).standard_normal((3, 64)).astype(np.float32)
    expected, inside, apart = (
        session(path).run(None, {"x": rows})[0] for path in (source, tmp_path / "out.onnx", tmp_path / "apart.onnx")
    )
    np.testing.assert_array_equal(inside, apart)
    if "prune" in passes:
        assert model.weight_bytes() == pytest.approx(0.75 * load(source).weight_bytes(), rel=0.01)
    else:
        np.testing.assert_array_equal(inside, expected)


def times(nodes: int) -> dict[str, float]:
    """CPU seconds of loading, every pass, the whole cleanup preset (garbage collection included) and saving."""
    proto = workloads.generated(nodes)
    began = time.process_time()
    model = load(proto)
    taken = {"load": time.process_time() - began}
    cleanup = timed(model, "cleanup")
    taken |= cleanup
    taken["cleanup"] = sum(cleanup.values())
    taken |= timed(model, "fold-bn, fold-scales, prune-channels ratio=0.5 round_to=1, quantize")
    taken.pop(COLLECTOR)
    began = time.process_time()
    model.proto().SerializeToString()
    return {**taken, "save": time.process_time() - began}


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_time_grows_with_the_nodes() -> None:
    """From 10,000 to 20,000 nodes at most 2.5 times, each pass and the whole preset, in turn, the best of three."""
    runs = [(times(10_000), times(20_000)) for _ in range(3)]
    small, large = ({name: min(taken[name] for taken in size) for name in size[0]} for size in zip(*runs, strict=True))
    grown = {name: (small[name], large[name]) for name in large if large[name] > GROWTH * small[name] + NOISE}
    assert not grown, f"CPU seconds at 10,000 and 20,000 nodes: {grown}"


@pytest.mark.slow
def test_cleanup_of_20000_nodes_within_a_minute() -> None:
    model = load(workloads.generated(20_000))
    began = time.perf_counter()
    timed(model, "cleanup")
    assert time.perf_counter() - began < 60


@pytest.fixture(scope="module")
def gigabytes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model of 3 GiB, deleted afterwards."""
    folder = tmp_path_factory.mktemp("gigabytes")
    if shutil.disk_usage(folder).free < 20 << 30:
        pytest.skip("needs 20 GB of disk")
    yield workloads.external(folder, 3 << 30)
    shutil.rmtree(folder)


# getrusage would not do: a child's maximum starts with that of the process it was forked from
PEAK = """
import sys
from pathlib import Path
from graphopt.cli import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert not stop.code, stop.code
print("VmHWM", next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
"""


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("passes", ["cleanup", "cleanup, prune-channels ratio=0.25"])
def test_gigabytes_through_the_command_line(passes: str, gigabytes: Path) -> None:
    """All of `optimize`, comparing and timing in onnxruntime included, in less than twice the model's size of memory."""
    size = gigabytes.with_name("big.onnx.data").stat().st_size
    result = gigabytes.with_name("out.onnx")
    command = [sys.executable, "-c", PEAK, "optimize", str(gigabytes), "-o", str(result), "--passes", passes, "--overwrite", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    peak = int(done.stdout.split()[-1]) * 1024
    assert peak < 2 * size, f"{peak / size:.2f} times the model's size"
    proto = onnx.load(result, load_external_data=False)
    assert len(proto.graph.node) < 0.7 * len(onnx.load(gigabytes, load_external_data=False).graph.node)
    kept = result.with_name("out.onnx.data").stat().st_size / size
    assert kept == pytest.approx(0.75 if "prune" in passes else 1.0, rel=0.01)
    answer = session(result).run(None, {"x": np.zeros((1, workloads.WIDTH), np.float32)})[0]
    assert np.isfinite(answer).all()
