"""Pipelines: parsing, typing, order, repetition, verification, and what a failing pass leads to."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_graphsurgeon as gs
import pytest

import graphopt
from graphopt import pipeline, presets
from graphopt.context import Context
from graphopt.edit import remove_nodes, set_input
from graphopt.errors import CheckError, ModelError, OptionError, PassError
from graphopt.hooks import NumericCheck, dump_after, print_after
from graphopt.model import Model, from_proto, load
from graphopt.pipeline import Step, parse, run, to_text, to_toml
from graphopt.registry import REGISTRY, Pass

TEXT = '<ir_version: 8, opset_import: ["" : 17]> m (float[4] x) => (float[4] y) { a = Relu(x) b = Neg(a) c = Abs(b) y = Neg(c) }'


def chain() -> Model:
    return from_proto(onnx.parser.parse_model(TEXT))


def drop_one(model: Model, context: Context, *, op: str = "Neg", times: int = 1, names: tuple[str, ...] = ()) -> int:
    """Relu of the first op instead of it; used to count."""
    found = [n for n in model.nodes() if n.op == op][:times]
    for node in found:
        node.op = "Relu"
    if not found:
        context.reject(model.nodes()[0], "no such op")
    return len(found)


def break_graph(model: Model, context: Context) -> int:
    """Leaves an input that nothing produces."""
    set_input(model.graph.nodes[1], 0, gs.Variable("ghost", np.dtype(np.float32), [4]))
    return 1


def crash(model: Model, context: Context) -> int:
    """Raises."""
    raise ZeroDivisionError("oops")


def shift(model: Model, context: Context, *, by: float = 0.1) -> int:
    """Claims to be exact and moves the output of Abs."""
    node = next(n for n in model.nodes() if n.op == "Abs")
    out = gs.Variable("moved", np.dtype(np.float32), [4])
    add = gs.Node("Add", "culprit", inputs=[node.inputs[0], gs.Constant("by", np.array(by, np.float32))], outputs=[out])
    model.graph.nodes.insert(model.graph.nodes.index(node), add)
    set_input(node, 0, out)
    return 1


def remove_first(model: Model, context: Context) -> int:
    """Removes the first Relu, exactly, for non-negative inputs only."""
    node = model.graph.nodes[0]
    if node.op != "Relu":
        return 0
    set_input(model.graph.nodes[1], 0, node.inputs[0])
    return remove_nodes(model.graph, [node])


@pytest.fixture(autouse=True)
def _passes(monkeypatch: pytest.MonkeyPatch) -> None:
    for entry in (
        Pass("drop-one", drop_one),
        Pass("late", drop_one, after=frozenset({"drop-one"})),
        Pass("break-graph", break_graph),
        Pass("crash", crash),
        Pass("shift", shift, exact=True),
        Pass("remove-first", remove_first, exact=True),
        Pass("wants-data", drop_one, needs_data=True),
    ):
        REGISTRY.passes[entry.name] = entry
    monkeypatch.setitem(presets.PRESETS, "until-done", presets.Preset("drop-one", "test", repeat=True))


def test_options_are_typed_and_round_trip(tmp_path: Path) -> None:
    steps = parse("drop-one op=Abs times=2 names='a b,c*', late")
    assert steps[0].options == {"op": "Abs", "times": 2, "names": ("a b", "c*")}
    assert parse(to_text(steps)) == steps
    path = tmp_path / "p.toml"
    path.write_text(to_toml(steps))
    assert pipeline.from_toml(path) == steps
    assert parse([("drop-one", {"op": "Abs", "times": 2, "names": ["a b", "c*"]}), "late"]) == steps


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "pipeline is empty"),
        ("drop-on", "unknown pass 'drop-on'; did you mean 'drop-one'"),
        ("drop-one tmies=2", "drop-one: unknown option 'tmies'; did you mean 'times'"),
        ("drop-one times=many", "drop-one: times=many: .*integer"),
        ("drop-one Abs", "expected option=value, found 'Abs'"),
        ("crash x=1", "crash: unknown option 'x'; it has none"),
        ("cleanup x=1", "preset 'cleanup' takes no options"),
        ("late, drop-one", "late must come after drop-one; a legal order: drop-one, late"),
        ("drop-one 'x", "cannot read the pipeline"),
    ],
)
def test_mistakes_are_found_before_any_work(text: str, message: str) -> None:
    with pytest.raises(OptionError, match=message):
        parse(text)


def test_toml_mistakes(tmp_path: Path) -> None:
    path = tmp_path / "p.toml"
    with pytest.raises(OptionError, match="cannot read the pipeline"):
        pipeline.from_toml(path)
    for content, message in (("[[pass", "is not TOML"), ("[pass]\nname='x'", r"expected an array of tables \[\[pass\]\]")):
        path.write_text(content)
        with pytest.raises(OptionError, match=message):
            pipeline.from_toml(path)


def test_a_repeating_preset_stops_when_nothing_changes() -> None:
    results = run(chain(), parse("until-done"), Context())
    assert [r.changes for r in results] == [1, 1, 0]


def test_rejections_are_counted_with_an_example() -> None:
    (result,) = run(chain(), parse("drop-one op=Sin"), Context())
    assert [(r.reason, r.op, r.count) for r in result.rejected] == [("no such op", "Relu", 1)]


def test_every_change_is_verified_and_the_pass_named() -> None:
    with pytest.raises(ModelError, match="after break-graph: .*'ghost' is produced by no node"):
        run(chain(), parse("drop-one, break-graph"), Context())


def test_a_bug_in_a_pass_names_it() -> None:
    with pytest.raises(PassError, match="crash: failed with ZeroDivisionError: oops; this is a bug in the pass"):
        run(chain(), parse("crash"), Context())


def test_missing_data_is_said_before_any_work() -> None:
    model = chain()
    with pytest.raises(PassError, match="wants-data: needs calibration data"):
        run(model, parse("drop-one, wants-data"), Context())
    assert [n.op for n in model.nodes()] == ["Relu", "Neg", "Abs", "Neg"]


def test_analyses_are_cached_and_dropped_unless_kept() -> None:
    calls = []

    def analysis(model: Model) -> int:
        calls.append(1)
        return len(model.nodes())

    context, model = Context(), chain()
    context.get(analysis, model)
    run(model, parse("drop-one op=Sin"), context)  # no change: kept
    context.get(analysis, model)
    assert len(calls) == 1
    run(model, [Step(Pass("keeper", drop_one, keeps=frozenset({"analysis"})))], context)
    context.get(analysis, model)
    assert len(calls) == 1
    run(model, parse("drop-one"), context)
    context.get(analysis, model)
    assert len(calls) == 2


def test_hooks_print_and_dump(tmp_path: Path) -> None:
    shown: list[str] = []
    run(chain(), parse("drop-one, drop-one op=Sin"), Context(), [print_after("all", shown.append), dump_after(tmp_path / "d")])
    assert len(shown) == 1
    assert "after drop-one: 1 changes, 4 nodes" in shown[0]
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["01-drop-one.onnx"]
    assert [n.op for n in load(tmp_path / "d" / "01-drop-one.onnx").nodes()] == ["Relu", "Relu", "Abs", "Neg"]


def test_the_numeric_check_names_pass_output_and_node() -> None:
    result = graphopt.optimize(chain(), "shift by=0.5", check=True)
    assert isinstance(result.failure, CheckError)
    assert "shift changed output 'y'" in str(result.failure)
    assert "the first tensor that differs is 'c', written by node 'Abs_2'" in str(result.failure)
    with pytest.raises(CheckError):
        result.save("never.onnx")


def test_the_numeric_check_lets_exact_changes_pass() -> None:
    check = NumericCheck([{"x": np.array([1, 2, 3, 4], np.float32)}])
    model = chain()
    check.start(model)
    run(model, parse("remove-first"), Context(), [check])
    assert check.checked == 1
    assert len(model.nodes()) == 3


def test_bisect_names_the_pass_among_several() -> None:
    data = {"x": np.ones(4, np.float32)}
    with pytest.raises(CheckError, match="shift changed output 'y' by .* of its scale .*written by node"):
        graphopt.bisect(chain(), "remove-first, shift, drop-one op=Sin", calibration=lambda: [data], tolerance=0.01)


def test_the_input_model_is_never_changed() -> None:
    model = chain()
    before = model.proto().SerializeToString(deterministic=True)
    result = graphopt.optimize(model, "drop-one")
    assert model.proto().SerializeToString(deterministic=True) == before
    assert [n.op for n in result.model.nodes()] == ["Relu", "Relu", "Abs", "Neg"]
    assert result.report.passes[0].changes == 1
    assert onnx.load_from_string(result.proto().SerializeToString()).graph.node[1].op_type == "Relu"
