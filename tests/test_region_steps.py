"""Steps of regions that are made one of several, and rows of the engine that are cut for threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from region_cases import Graph, compiled, feed, judge, plan_of, regions

from graphopt.kernels import plan as p
from graphopt.kernels import reference_plan, runtime
from graphopt.region_fuse import Draft, finish

Fields = dict[str, int]


def integers(g: Graph, *lists: list[int]) -> list[str]:
    return [g.constant(v, np.int64) for v in lists]


def test_focus_slices_are_one_copy_each() -> None:
    """YOLO's focus: every other row, then every other column of it, four times, into one image."""
    g = Graph()
    x = g.q(g.input("N", 3, 8, 6))
    parts = []
    for row, column in ((0, 0), (1, 0), (0, 1), (1, 1)):
        lines = g.q(g.op("Slice", x, *integers(g, [row], [2**31 - 1], [2], [2])))
        parts.append(g.q(g.op("Slice", lines, *integers(g, [column], [2**31 - 1], [3], [2]))))
    joined = g.q(g.op("Concat", *parts, axis=1))
    (node,) = regions(judge(g.model(g.q(g.conv(joined, 12, 8), 0.3, 100))))
    copies = [s for s in plan_of(node).steps if s.kind == p.COPY]
    assert [(s.h0, s.hs, s.w0, s.ws, s.offset) for s in copies] == [
        (0, 2, 0, 2, 0),
        (1, 2, 0, 2, 3),
        (0, 2, 1, 2, 6),
        (1, 2, 1, 2, 9),
    ]


def axis(random: np.random.Generator, size: int, names: tuple[str, ...]) -> tuple[Fields, int]:
    """A slice, a repetition and a padding of one axis, and its size then."""
    start, step, repeat = int(random.integers(0, size)), int(random.integers(1, 4)), int(random.choice([1, 1, 2, 3]))
    if random.random() < 0.4:
        start, step = 0, 1
    most = -(-(size - start) // step)
    count = int(random.choice([-1, int(random.integers(1, most + 1))]))
    pads = [int(random.choice([0, 0, 1, 2])) for _ in range(2)]
    taken = most if count < 0 else count
    return dict(zip(names, (start, step, count, repeat, *pads), strict=True)), taken * repeat + sum(pads)


@given(seed=st.integers(0, 100_000))
@settings(max_examples=300, deadline=None)
def test_a_copy_of_a_copy_is_what_both_do(seed: int) -> None:
    random = np.random.default_rng(seed)
    channels = int(random.integers(1, 6))
    size, drafts, tensors = [int(v) for v in random.integers(1, 10, 2)], [], [p.Tensor(channels, 7)]
    x = random.integers(0, 256, (2, *size, channels)).astype(np.uint8)
    drafts.append(Draft(p.INPUT, {"index": 0, "out": 0, "type": p.UINT8, "layout": p.CHANNELS_LAST, "rank": 4}))
    for number in range(3):
        rows, size[0] = axis(random, size[0], ("h0", "hs", "hn", "rh", "pt", "pb"))
        columns, size[1] = axis(random, size[1], ("w0", "ws", "wn", "rw", "pl", "pr"))
        first = int(random.integers(0, channels))
        count, offset = int(random.integers(1, channels - first + 1)), int(random.choice([0, 0, 2]))
        fields = {"x": number, "out": number + 1, "c0": first, "count": count, "offset": offset, "fill": 1, **rows, **columns}
        fields["table"] = int(random.choice([-1, -1, 0]))
        channels = count + offset
        drafts.append(Draft(p.COPY, fields))
        tensors.append(p.Tensor(channels, int(random.integers(0, 256))))
    drafts.append(Draft(p.OUTPUT, {"x": 3, "index": 0, "type": p.UINT8, "layout": p.CHANNELS_LAST, "rank": 4}))
    tables = [random.integers(0, 256, 256).astype(np.uint8)]
    plain = p.Plan(tensors, [p.step(d.kind, **d.fields) for d in drafts], [], 1, 1, 1)
    wanted = reference_plan.run(plain, [x], tables)
    made, _ = finish(drafts, tensors, [], (1, 1), [True])
    np.testing.assert_array_equal(reference_plan.run(made, [x], tables)[0], wanted[0])
    assert len(made.steps) <= len(plain.steps)


def opened(proto: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    runtime.register(options)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def convolution(g: Graph) -> str:
    return g.q(g.conv(g.q(g.input("N", 40, 5, 5)), 40, 168), 0.3, 100)


def residual(g: Graph) -> str:
    x = g.q(g.input("N", 120, 5, 5))
    return g.q(g.op("Add", g.q(g.conv(x, 120, 120), 0.4, 130), x), 0.3, 0)


def floats(g: Graph) -> str:
    return str(g.op("MatMul", g.q(g.input("N", 9, 330)), g.weight(330, 330, axis=1)))


@pytest.mark.parametrize("build", [convolution, residual, floats])
def test_few_pixels_are_cut_by_channels(build: Callable[[Graph], str]) -> None:
    g = Graph()
    proto = g.model(build(g))
    model, _ = compiled(proto)
    assert len(regions(model)) == 1
    inputs = feed(proto)
    one, two = (opened(model.proto(), threads).run(None, inputs)[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)
    assert one.std() > 0
