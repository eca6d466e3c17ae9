"""compile-int8 leaves to onnxruntime what onnxruntime does faster: by measurement, by estimate, in a way that can be repeated."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import onnx
import pytest
import zoo
from fake_clock import ticking, timer
from region_cases import Graph, compiled, feed, regions

from graphopt.api import optimize
from graphopt.cli_compiled import region_lines
from graphopt.context import Context
from graphopt.data import open_dataset
from graphopt.errors import OptionError, PassError
from graphopt.feeds import input_specs
from graphopt.measure import ROUNDS, Paired, paired
from graphopt.model import Model, from_proto
from graphopt.passes.compile_int8 import compile_regions
from graphopt.region_choose import ALONE, difference
from graphopt.registry import register
from graphopt.runtime import session
from graphopt.targets import ORT_CPU_GRAPHOPT, TENSORRT


def two_regions(bits: int = 7) -> onnx.ModelProto:
    """A Softmax between two convolutions. With weights of 7 bits onnxruntime computes the same on every CPU."""
    g = Graph()
    x = g.op("Softmax", g.q(g.conv(g.q(g.input("N", 4, 9, 9)), 4, 16), 0.3, 100), axis=1)
    proto = g.model(g.q(g.conv(g.q(x), 16, 4), 0.3, 100))
    for tensor in proto.graph.initializer:
        if bits == 7 and tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) // 2, tensor.name))
    return proto


def run(proto: onnx.ModelProto, *speeds: float, **options: Any) -> tuple[Model, dict[str, Any], Context]:
    """The model compiled under a faked clock, what the pass said of its boundaries, and the context."""
    model, context = from_proto(proto), Context(target=ORT_CPU_GRAPHOPT)
    compile_regions(model, context, options.pop("boundaries", "auto"), timer=timer(*(speeds or (1.0,))), **options)
    model.sort()
    return model, context.facts["boundaries"], context


def names(model: Model) -> list[str]:
    return [n.op for n in regions(model)]


def again(proto: onnx.ModelProto, recipe: str) -> onnx.ModelProto:
    return optimize(proto, passes=recipe).proto()


# ---- timing


def test_timing_stops_where_the_speed_is_clear() -> None:
    runner = session(two_regions())
    given = feed(two_regions())
    found = paired(runner, runner, given, border=0.97, clock=ticking(1.0, 2.0))
    assert (found.speed, found.low, found.high, found.rounds) == (0.5, 0.5, 0.5, ROUNDS)
    assert (found.first_ms, found.second_ms) == (1000, 2000)


def test_timing_goes_on_until_the_time_is_over_where_it_is_not() -> None:
    """Every other pair on either side of the border: no number of rounds settles it."""
    runner, given = session(two_regions()), feed(two_regions())
    seconds, rounds = itertools.count(), 25
    pattern = itertools.cycle([0.9, 1.1])

    def ticks() -> Any:
        yield 0.0
        for done in seconds:
            yield from (0.0, 1.0, 0.0, 1 / next(pattern))
            if done + 1 >= ROUNDS:
                yield 0.0 if done + 1 < rounds else 99.0

    times = ticks()
    found = paired(runner, runner, given, border=1.0, clock=lambda: next(times))
    assert found.rounds == rounds
    assert found.low < 1 < found.high


# ---- by measurement


def test_a_region_that_loses_stays_with_onnxruntime_and_the_report_says_so() -> None:
    proto = two_regions()
    model, said, context = run(proto, 2.0, 0.5, 1.5)
    assert names(model) == ["Int8Region0"]
    assert sum(n.op == "Conv" for n in model.nodes()) == 1
    assert (said["how"], said["why"], said["speed"]) == ("measured", "on random inputs", 1.5)
    first, second = said["candidates"]
    assert (first["name"], first["taken"], first["speed"]) == ("Int8Region0", True, 2.0)
    assert (second["name"], second["taken"], second["speed"], second["reason"]) == ("Int8Region1", False, 0.5, ALONE)
    assert (second["onnxruntime_ms"], second["graphopt_ms"]) == (1000, 2000)
    assert context.rejected[ALONE, "Conv"] == 1
    inputs = feed(proto)
    np.testing.assert_array_equal(session(model.proto()).run(None, inputs)[0], session(proto).run(None, inputs)[0])


def test_what_was_measured_can_be_made_again() -> None:
    proto = two_regions()
    model, said, _ = run(proto, 2.0, 0.5, 1.5)
    assert said["recipe"] == "compile-int8 boundaries=all exclude='Int8Region1'"
    assert again(proto, said["recipe"]).SerializeToString() == model.proto().SerializeToString()
    model, said, _ = run(proto, 2.0)
    assert said["recipe"] == "compile-int8 boundaries=all"
    assert again(proto, said["recipe"]).SerializeToString() == model.proto().SerializeToString()


def test_a_model_that_is_slower_as_a_whole_is_left_alone() -> None:
    proto = two_regions()
    before = from_proto(proto).proto().SerializeToString()
    model, said, _ = run(proto, 1.2, 1.2, 0.9)
    assert names(model) == []
    assert model.proto().SerializeToString() == before
    assert said["speed"] == 0.9
    assert all("the whole model is slower with regions: 0.90x" in row["reason"] for row in said["candidates"])


def test_a_region_that_onnxruntime_computes_otherwise_is_kept_although_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where its kernels saturate: on CPUs without INT8 dot products, with weights of 8 bits."""
    monkeypatch.setattr("graphopt.region_choose.difference", lambda ours, theirs, feeds: 0.5)
    model, said, _ = run(two_regions(), 0.5)
    assert names(model) == ["Int8Region0", "Int8Region1"]
    assert "onnxruntime's kernels saturate here: outputs differ by 50% of their spread" in said["candidates"][0]["reason"]
    assert model.notes == ["compile-int8: 0.50x the speed of onnxruntime's own INT8, whose kernels saturate on this CPU"]


def test_difference_is_that_of_the_outputs() -> None:
    seven, other = two_regions(), two_regions()
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.float32(0.1), other.graph.initializer[0].name))
    same, wrong, feeds = session(seven), session(other), [feed(seven), feed(seven, 1)]
    assert difference(same, session(compiled(seven)[0].proto()), feeds) == 0
    assert difference(same, wrong, feeds) > 0.02


def test_regions_inside_an_if_cannot_be_timed_and_are_estimated() -> None:
    g = Graph()
    y = g.q(g.conv(g.q(g.input("N", 4, 5, 5)), 4, 4), 0.3, 100)
    infos = [onnx.helper.make_tensor_value_info("out", onnx.TensorProto.FLOAT, ["N", 4, 5, 5])]
    then = onnx.helper.make_graph([*g.nodes, onnx.helper.make_node("Identity", [y], ["out"])], "then", [], infos, g.initializers)
    other = onnx.helper.make_graph([onnx.helper.make_node("Neg", ["x"], ["out"])], "else", [], infos)
    g.nodes, g.initializers = [], []
    g.input(name="flag", kind=onnx.TensorProto.BOOL)
    model, said, _ = run(g.model(g.op("If", "flag", then_branch=then, else_branch=other)), 1.5)
    assert names(model) == ["Int8Region0"]
    assert said["candidates"][0]["taken"]


def test_a_real_model_is_measured_and_made_again() -> None:
    path = zoo.model("ppocr_cls")
    rows = [zoo.feeds(path)]
    int8 = optimize(path, passes="fold, quantize method=minmax", calibration=rows, target="ort-cpu-no-vnni").proto()
    result = optimize(int8, passes="compile-int8", calibration=rows, target="ort-cpu+graphopt")
    said = result.report.passes[-1].facts["boundaries"]
    assert said["how"] == "measured"
    assert all(row["onnxruntime_ms"] > 0 and row["graphopt_ms"] > 0 for row in said["candidates"])
    assert all(row["taken"] or row["speed"] < 0.97 for row in said["candidates"]) or said["speed"] < 0.97
    taken = [row["name"] for row in said["candidates"] if row["taken"]]
    assert names(result.model) == taken
    assert again(int8, said["recipe"]).SerializeToString() == result.proto().SerializeToString()


@pytest.mark.parametrize("gone", [{0}, {2, 5}])
def test_regions_of_a_real_model_can_be_dropped(gone: set[int]) -> None:
    """Of neighbours that pass integers to each other, too: what is left computes what it did."""
    path = zoo.model("ppocr_rec")
    rows = [zoo.feeds(path)]
    int8 = optimize(path, passes="fold, quantize method=minmax", calibration=rows, target="ort-cpu-no-vnni").proto()
    wanted = session(int8).run(None, rows[0])[0]
    count = len(regions(from_proto(again(int8, "compile-int8 boundaries=all"))))
    speeds = iter([0.5 if i in gone else 1.5 for i in range(count)] + [1.5])

    def compare(first: Any, second: Any, given: Any, **options: Any) -> Paired:
        speed = next(speeds)
        return Paired(1.0, 1 / speed, speed, speed, speed, ROUNDS)

    model, context = from_proto(int8), Context(open_dataset(rows, input_specs(int8)), ORT_CPU_GRAPHOPT)
    assert compile_regions(model, context, "measured", timer=compare) == count - len(gone)
    model.sort()
    assert not {f"Int8Region{i}" for i in gone} & set(names(model))
    found = session(model.proto()).run(None, rows[0])[0]
    assert np.abs(found - wanted).max() <= 0.01 * np.abs(wanted).max()


# ---- otherwise


@pytest.mark.parametrize(
    ("context", "why"),
    [
        (Context(), "no target was named"),
        (Context(target=TENSORRT), "tensorrt does not run in onnxruntime here"),
        (Context(target=ORT_CPU_GRAPHOPT, here=False), "the model is for another machine"),
    ],
    ids=["no-target", "tensorrt", "elsewhere"],
)
def test_what_does_not_run_here_is_estimated(context: Context, why: str) -> None:
    model = from_proto(two_regions())
    assert compile_regions(model, context, "auto", timer=timer(0.1)) == 2
    assert (context.facts["boundaries"]["how"], context.facts["boundaries"]["why"]) == ("estimated", why)


def thin(filters: int, weights: int) -> onnx.ModelProto:
    """A 1x1 convolution of few channels to many pixels: mostly requantisation, which onnxruntime does faster on AVX2."""
    g = Graph()
    x = g.q(g.input(1, 16, 112, 112))
    w = g.weight(filters, 16, 1, 1)
    proto = g.model(g.q(g.op("Conv", x, w, g.bias(filters)), 0.3, 100))
    for tensor in proto.graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 4:
            values = np.clip(onnx.numpy_helper.to_array(tensor), -weights, weights)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    return proto


def test_estimates_drop_what_is_clearly_slower_and_are_always_the_same() -> None:
    results = [run(thin(96, 64), boundaries="estimated") for _ in range(2)]
    (model, said, _), (_, same, _) = results
    assert said == same
    assert names(model) == []
    assert (said["how"], said["candidates"][0]["reason"]) == ("estimated", ALONE)
    assert said["candidates"][0]["speed"] < 0.8


def test_estimates_keep_what_onnxruntime_may_compute_otherwise() -> None:
    model, said, _ = run(thin(96, 127), boundaries="estimated")
    assert names(model) == ["Int8Region0"]
    assert "may saturate" in said["candidates"][0]["reason"]


def test_a_size_that_is_not_known_is_no_reason_to_drop() -> None:
    g = Graph()
    proto = g.model(g.q(g.conv(g.q(g.input("N", 4, "h", "w")), 4, 4), 0.3, 100))
    model, said, _ = run(proto, boundaries="estimated")
    assert names(model) == ["Int8Region0"]
    assert said["candidates"][0]["reason"] == "its sizes are not known"


def test_measuring_what_cannot_be_fed_is_an_error() -> None:
    g = Graph()
    flat = g.q(g.op("Reshape", g.input("a", "b", "c"), g.constant([-1, 12], np.int64)))
    proto = g.model(g.q(g.op("MatMul", flat, g.weight(12, 4, axis=1)), 0.3, 100))  # random sizes are no multiple of 12
    with pytest.raises(PassError, match=r"boundaries=measured: the model does not run on .*give rows of data"):
        run(proto, boundaries="measured")
    assert run(proto)[1]["how"] == "estimated"


def test_nodes_and_regions_are_excluded_by_name() -> None:
    proto = two_regions()
    last = [n for n in from_proto(proto).nodes() if n.op == "Conv"][-1].name
    model, said, context = run(proto, boundaries="all", exclude=(last,))
    assert names(model) == ["Int8Region0"]
    assert said["recipe"] == f"compile-int8 boundaries=all exclude='{last}'"
    assert ("excluded by name", "Conv") in context.rejected
    assert names(run(proto, boundaries="all", exclude=("Int8Region0",))[0]) == ["Int8Region1"]
    with pytest.raises(OptionError, match="exclude='Int8Region7' fits the name of no node and no region"):
        run(proto, boundaries="all", exclude=("Int8Region7",))


def test_the_command_line_says_what_was_left_and_why() -> None:
    @register("timed-compile")
    def timed_compile(model: Model, context: Context) -> int:
        """compile-int8 under a faked clock."""
        return compile_regions(model, context, "measured", timer=timer(2.0, 0.5, 1.5))

    lines = region_lines(optimize(two_regions(), passes="timed-compile", target="ort-cpu+graphopt").report)
    assert any(line.startswith("Int8Region0: 1 nodes") and "2.00x onnxruntime's INT8" in line for line in lines)
    assert f"Int8Region1: left to onnxruntime, 0.50x onnxruntime's INT8: {ALONE}" in lines
    assert any(line.startswith("regions chosen: measured (on random inputs); the whole model: 1.50x") for line in lines)
