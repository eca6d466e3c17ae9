"""Heads and neurons of transformers as they are exported and fused: all of them are found, and zeroing equals removing."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx
import pytest
import shape_truth
import soundness
import zoo
from attention_cases import ATTENTION, PACKED

from graphopt.dims import couple, groups
from graphopt.kinds import kind_of
from graphopt.model import Model, load
from graphopt.removal import remove
from graphopt.shapes import shapes

MODELS = Path(__file__).parent / "models"
SIZES = ({"batch": 2, "seq": 5, "seq2": 4}, {"batch": 3, "seq": 4, "seq2": 6})
TRACED = "seq2seq_torchscript"  # torch.nn's layers are traced with their lengths
FOUND: dict[str, dict[tuple[str, int], int]] = {  # kind, units -> groups
    "bert": {("heads", 3): 2, ("neurons", 20): 2},
    "gpt2": {("heads", 3): 2, ("neurons", 20): 2},
    "llama": {("heads", 2): 2, ("neurons", 20): 2},  # two heads of keys, each with two of queries
    "moe": {("neurons", 20): 1},
    "seq2seq": {("heads", 3): 3, ("neurons", 20): 2},
    "swin": {("heads", 3): 2, ("neurons", 20): 2},
    "t5": {("heads", 3): 1, ("neurons", 20): 1},
    "vit": {("heads", 3): 2, ("neurons", 20): 2},
}


def kinds(model: Model) -> Counter[tuple[str, int]]:
    dims, tensors = couple(model), model.tensors()
    return Counter((kind_of(g, dims, tensors), len(g.units)) for g in groups(model, dims))


@pytest.mark.parametrize("name", sorted(p.stem for p in MODELS.glob("*.onnx")))
def test_an_export(name: str) -> None:
    path = MODELS / f"{name}.onnx"
    assert kinds(load(path)) == FOUND[name.split("_")[0]]
    proto = onnx.load(path)
    feeds = [soundness.inputs(proto, symbols=sizes) for sizes in SIZES[: 1 if name == TRACED else 2]]
    assert soundness.findings(proto, feeds) == []


@pytest.mark.parametrize(
    "name",
    [
        "bert_torchscript",
        "gpt2_dynamo18",
        "llama_dynamo18",
        "seq2seq_dynamo18",
        "swin_torchscript",
        "t5_torchscript",
        "vit_dynamo23",
    ],
)
def test_an_export_as_onnxruntime_saves_it(name: str, tmp_path: Path) -> None:
    """Optimised for the CPU: FusedMatMul, BiasGelu, FastGelu, SkipLayerNormalization, SimplifiedLayerNormalization."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath, options.log_severity_level = str(tmp_path / "saved.onnx"), 4
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    onnxruntime.InferenceSession(str(MODELS / f"{name}.onnx"), options, providers=["CPUExecutionProvider"])
    assert kinds(load(tmp_path / "saved.onnx")) == FOUND[name.split("_")[0]]
    proto = onnx.load(tmp_path / "saved.onnx")
    assert soundness.findings(proto, [soundness.inputs(proto, symbols=SIZES[0])]) == []


@pytest.mark.parametrize("name", ["bert_fused", "gpt2_fused", "llama_fused_dynamo", "llama_sdpa_dynamo23", "vit_fused"])
def test_shapes_of_fused_operators(name: str) -> None:
    model = load(MODELS / f"{name}.onnx")
    assert shape_truth.lies(model, soundness.inputs(model.proto(), symbols=SIZES[0])) == []


@pytest.mark.parametrize("name", ATTENTION)
def test_shapes_of_layouts(name: str) -> None:
    model = load(soundness.model(ATTENTION[name].text))
    assert shape_truth.lies(model, soundness.inputs(model.proto(), symbols=ATTENTION[name].symbols)) == []
    assert all(shapes(model).shape(t.name) is not None for n in model.nodes() for t in n.outputs[:1])


@pytest.mark.parametrize("name", ATTENTION)
def test_a_layout(name: str) -> None:
    case = ATTENTION[name]
    proto = soundness.model(case.text)
    model = load(proto)
    assert tuple(len(g.units) for g in groups(model, couple(model))) == case.units
    assert soundness.findings(proto, [soundness.inputs(proto, symbols=case.symbols)]) == []


@pytest.mark.parametrize("name", PACKED)
def test_packed_inputs_lose_heads(name: str) -> None:
    model = load(soundness.model(PACKED[name]))
    dims = couple(model)
    (group,) = groups(model, dims)
    assert len(group.units) == 3
    assert remove(model, dims, group.units[:1]) > 0
    (node,) = (n for n in model.nodes() if n.op == "MultiHeadAttention")
    assert node.attrs["num_heads"] == 2
    assert tuple(model.tensors()["w1"].shape) == ((6, 24) if name == "all" else (6, 16))
    model.verify()


@pytest.mark.network
def test_all_heads_and_neurons_of_minilm() -> None:
    path = zoo.model("minilm_l3")
    assert kinds(load(path)) == {("heads", 12): 3, ("neurons", 1536): 3}
