"""Makes the exports in this folder: small random networks, written by both of PyTorch's exporters and fused by onnxruntime.

`python make_models.py [NAME ...]` in an environment with torch, onnxscript, onnx and onnxruntime; the tests need only the files.
The files as committed were made with torch 2.13.0, onnxscript 0.7.2, onnxruntime 1.32.0.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import onnx
import torch
from networks import MODELS, Export
from torch import nn

HERE = Path(__file__).parent


def randomized(module: nn.Module) -> nn.Module:
    """Every parameter random, those of norms too: ones and zeros would hide a wrong slice."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            scale = parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.5
            parameter.copy_(torch.randn_like(parameter) * scale + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
    return module.eval()


def torchscript(export: Export, path: Path) -> None:
    """The old exporter: traced, with axes named."""
    axes = {name: dict(named) for name, named in export.axes.items()}
    torch.onnx.export(
        randomized(export.make()),
        export.example,
        str(path),
        dynamo=False,
        opset_version=17,
        input_names=list(export.axes),
        output_names=["y"],
        dynamic_axes=axes,
    )


def dynamo(export: Export, path: Path, opset: int) -> None:
    """The new exporter: torch.export, then onnxscript's optimiser."""
    made: dict[str, Any] = {}
    shapes = tuple({i: made.setdefault(n, torch.export.Dim(n)) for i, n in named.items()} for named in export.axes.values())
    program = torch.onnx.export(
        randomized(export.make()),
        export.example,
        dynamo=True,
        opset_version=opset,
        input_names=list(export.axes),
        output_names=["y"],
        dynamic_shapes=shapes,
        verbose=False,
    )
    assert program is not None
    program.save(str(path))


def fused(source: Path, path: Path, kind: str, heads: int, hidden: int) -> None:
    """onnxruntime's transformer fusions."""
    from onnxruntime.transformers import optimizer

    optimizer.optimize_model(str(source), kind, num_heads=heads, hidden_size=hidden, opt_level=0).save_model_to_file(str(path))


def stripped(path: Path) -> None:
    """Without stack traces and notes, which are most of a dynamo export."""
    proto = onnx.load(path)
    for holder in (proto, proto.graph, *proto.functions):
        holder.ClearField("doc_string")
        holder.ClearField("metadata_props")
    graphs = [proto.graph, *proto.functions]
    for node in (n for g in graphs for n in g.node):
        node.ClearField("doc_string")
        node.ClearField("metadata_props")
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info, *proto.graph.initializer):
        value.ClearField("doc_string")
        value.ClearField("metadata_props")
    onnx.save(proto, path)


def main(names: list[str]) -> None:
    for name, export in MODELS.items():
        if names and name not in names:
            continue
        for way in export.ways:
            path = HERE / f"{name}_{way}.onnx"
            if way == "torchscript":
                torchscript(export, path)
            elif way.startswith("dynamo"):
                dynamo(export, path, int(way.removeprefix("dynamo")))
            else:
                with tempfile.TemporaryDirectory() as folder:
                    raw = Path(folder) / "raw.onnx"
                    torchscript(export, raw) if way == "fused" else dynamo(export, raw, 18)
                    fused(raw, path, export.fusion, export.heads, export.hidden)
            stripped(path)
            sys.stdout.write(f"{path.name} {path.stat().st_size}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
