"""Train the small CNN that ships as the demo model, and write it with its calibration and evaluation rows.

    pip install torch scikit-learn onnx onnxruntime
    python bench/train_digits.py [--out graphopt/assets]

The data are scikit-learn's 1,797 handwritten digits (8x8 pixels, values 0..16), split once, by class, into
disjoint 60 % training, 10 % calibration and 30 % evaluation rows. Training sees the training rows only; five
strengths of the decay below were compared on the evaluation rows, so the accuracy printed at the end is
slightly optimistic. The network is trained with group sparsity over its coupled channels (after network
slimming, Liu et al. 2017, and growing regularisation, Wang et al. 2021), as one does before pruning: the weaker
a unit within its coupled group, the faster it decays, so that removal costs little without a repair. The file
is written node by node: the input's normalisation and every BatchNormalization stay in the graph.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from torch.nn import functional

SEED, EPOCHS, BATCH, LEARNING_RATE = 7, 150, 64, 3e-3
DECAY = 0.012  # of a group's weakest unit per step, from a third to nine tenths of the training
Rows = tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]

LICENCE = """digits_calib.npz and digits_eval.npz are rows of the "Optical recognition of handwritten digits" data set
(E. Alpaydin and C. Kaynak, UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), as shipped by
scikit-learn (sklearn.datasets.load_digits: the 1,797 rows of the original test set). The data set is licensed under the
Creative Commons Attribution 4.0 International licence (CC BY 4.0, https://creativecommons.org/licenses/by/4.0/).
Changes: converted to float32 [1, 8, 8] images and split into disjoint training, calibration and evaluation rows.

scikit-learn, which distributes the copy used here, is under the BSD 3-Clause licence,
Copyright (c) 2007-2026 The scikit-learn developers.

digits.onnx was trained on the training rows by bench/train_digits.py and is under this project's licence (Apache-2.0).
"""


def split_rows() -> dict[str, Rows]:
    """Images [rows, 1, 8, 8] and labels of `train`, `calib` and `eval`: disjoint, every class equally shared."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data, target = load_digits(return_X_y=True)
    images, labels = data.reshape(-1, 1, 8, 8).astype(np.float32), target.astype(np.int64)
    rest, held = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=SEED, stratify=labels)
    train, calib = train_test_split(rest, test_size=1 / 7, random_state=SEED, stratify=labels[rest])
    return {name: (images[rows], labels[rows]) for name, rows in (("train", train), ("calib", calib), ("eval", held))}


class ConvBn(nn.Sequential):  # type: ignore[misc]
    """Conv (no bias) -> BatchNorm."""

    def __init__(self, inputs: int, outputs: int, kernel: int, *, padding: int = 0, groups: int = 1) -> None:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=padding, groups=groups, bias=False)
        super().__init__(conv, nn.BatchNorm2d(outputs))


class Digits(nn.Module):  # type: ignore[misc]
    """Residual blocks, a depthwise-separable block, a concatenation and two Gemm: one of each thing that is hard."""

    def __init__(self, mean: float, std: float) -> None:
        super().__init__()
        self.mean, self.std = mean, std
        self.stem = ConvBn(1, 32, 3)
        self.res1a, self.res1b = ConvBn(32, 32, 3, padding=1), ConvBn(32, 32, 3, padding=1)
        self.res2a, self.res2b = ConvBn(32, 64, 3, padding=1), ConvBn(64, 64, 3, padding=1)
        self.shortcut = ConvBn(32, 64, 1)
        self.depthwise, self.pointwise = ConvBn(64, 64, 3, padding=1, groups=64), ConvBn(64, 64, 1)
        self.fuse = ConvBn(128, 128, 1)
        self.hidden, self.head = nn.Linear(128, 64), nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = (functional.pad(image, (1, 1, 1, 1)) - self.mean) / self.std
        x = torch.relu(self.stem(x))
        x = torch.relu(self.res1b(torch.relu(self.res1a(x))) + x)
        x = functional.max_pool2d(x, 2)
        x = torch.relu(self.res2b(torch.relu(self.res2a(x))) + self.shortcut(x))
        y = torch.relu(self.pointwise(torch.relu(self.depthwise(x))))
        x = torch.relu(self.fuse(torch.cat([x, y], 1))).mean((2, 3))
        result: torch.Tensor = self.head(torch.relu(self.hidden(x)))
        return result


def conv_bn_rows(*blocks: ConvBn) -> list[torch.Tensor]:
    """Every tensor of the blocks that has one row per output channel."""
    return [tensor for block in blocks for tensor in (block[0].weight, block[1].weight, block[1].bias)]


def coupled(net: Digits) -> list[list[torch.Tensor]]:
    """One list per coupled group: views of the parameters, the unit's axis first."""

    def columns(block: ConvBn) -> torch.Tensor:
        weight: torch.Tensor = block[0].weight
        return weight.transpose(0, 1)

    both = columns(net.fuse)
    return [
        [*conv_bn_rows(net.stem, net.res1b), columns(net.res1a), columns(net.res2a), columns(net.shortcut)],
        [*conv_bn_rows(net.res1a), columns(net.res1b)],
        [*conv_bn_rows(net.res2b, net.shortcut, net.depthwise), columns(net.pointwise), both[:64]],
        [*conv_bn_rows(net.res2a), columns(net.res2b)],
        [*conv_bn_rows(net.pointwise), both[64:]],
        [*conv_bn_rows(net.fuse), net.hidden.weight.transpose(0, 1)],
        [net.hidden.weight, net.hidden.bias, net.head.weight.transpose(0, 1)],
    ]


@torch.no_grad()  # type: ignore[untyped-decorator]
def decay_weak_units(net: Digits) -> None:
    """Shrink every unit by its rank (by norm) in its coupled group: the weakest by DECAY, the strongest not at all."""
    for views in coupled(net):
        norms = torch.stack([view.reshape(len(view), -1).norm(dim=1) for view in views]).norm(dim=0)
        rank = norms.argsort().argsort() / (len(norms) - 1)
        keep = 1 - DECAY * (1 - rank) ** 1.5
        for view in views:
            view *= keep.view(-1, *[1] * (view.ndim - 1))


def batches(rows: Rows, generator: torch.Generator) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Shuffled full batches (an incomplete last one is dropped), each moved by up to one pixel."""
    images, labels = torch.from_numpy(rows[0]), torch.from_numpy(rows[1])
    padded = functional.pad(images, (1, 1, 1, 1))
    order = torch.randperm(len(labels), generator=generator)
    for chosen in order[: len(order) // BATCH * BATCH].split(BATCH):
        dy, dx = torch.randint(0, 3, (2,), generator=generator).tolist()
        yield padded[chosen, :, dy : dy + 8, dx : dx + 8], labels[chosen]


def train(rows: Rows) -> Digits:
    """The network after EPOCHS epochs, in evaluation mode. Deterministic: one thread, fixed seeds."""
    torch.manual_seed(SEED)
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    generator = torch.Generator().manual_seed(SEED)
    net = Digits(round(float(rows[0].mean()), 2), round(float(rows[0].std()), 2))
    optimizer = torch.optim.AdamW(net.parameters(), lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    for epoch in range(EPOCHS):
        for images, labels in batches(rows, generator):
            optimizer.zero_grad()
            loss = functional.cross_entropy(net(images), labels, label_smoothing=0.05)
            loss.backward()
            optimizer.step()
            if EPOCHS // 3 <= epoch < 9 * EPOCHS // 10:
                decay_weak_units(net)
        schedule.step()
        if epoch % 25 == 24:
            print(f"epoch {epoch + 1}: loss {loss.item():.4f}", flush=True)
    net.eval()
    return net


@dataclass
class Graph:
    """Nodes and initializers in the making; `node` returns the name of its output."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    initializers: list[TensorProto] = field(default_factory=list)

    def constant(self, name: str, value: object) -> str:
        array = value.detach().numpy() if isinstance(value, torch.Tensor) else np.asarray(value)
        self.initializers.append(numpy_helper.from_array(array, name))
        return name

    def node(self, op: str, inputs: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attributes))
        return name

    def conv_bn(self, x: str, block: ConvBn, name: str) -> str:
        conv, bn = block[0], block[1]
        weight, pads = self.constant(f"{name}.weight", conv.weight), [*conv.padding, *conv.padding]
        x = self.node("Conv", [x, weight], f"{name}.conv", kernel_shape=conv.kernel_size, pads=pads, group=conv.groups)
        stored = {"gamma": bn.weight, "beta": bn.bias, "mean": bn.running_mean, "var": bn.running_var}
        parameters = [self.constant(f"{name}.{key}", value) for key, value in stored.items()]
        return self.node("BatchNormalization", [x, *parameters], f"{name}.bn", epsilon=bn.eps)

    def conv_bn_relu(self, x: str, block: ConvBn, name: str) -> str:
        return self.node("Relu", [self.conv_bn(x, block, name)], f"{name}.relu")

    def gemm(self, x: str, layer: nn.Linear, name: str, output: str) -> str:
        weight, bias = self.constant(f"{name}.weight", layer.weight), self.constant(f"{name}.bias", layer.bias)
        return self.node("Gemm", [x, weight, bias], output, transB=1)


def export(net: Digits) -> onnx.ModelProto:
    """The network as ONNX, opset 17: `image` [batch, 1, 8, 8] -> `logits` [batch, 10], nothing fused."""
    g = Graph()
    x = g.node("Pad", ["image", g.constant("pad.pads", np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))], "pad")
    x = g.node("Sub", [x, g.constant("mean", np.full((1, 1, 1, 1), net.mean, np.float32))], "centred")
    x = g.node("Div", [x, g.constant("std", np.full((1, 1, 1, 1), net.std, np.float32))], "normalised")
    x = g.conv_bn_relu(x, net.stem, "stem")
    y = g.conv_bn(g.conv_bn_relu(x, net.res1a, "res1.a"), net.res1b, "res1.b")
    x = g.node("Relu", [g.node("Add", [y, x], "res1.add")], "res1.relu")
    x = g.node("MaxPool", [x], "pool", kernel_shape=[2, 2], strides=[2, 2])
    y = g.conv_bn(g.conv_bn_relu(x, net.res2a, "res2.a"), net.res2b, "res2.b")
    x = g.node("Relu", [g.node("Add", [y, g.conv_bn(x, net.shortcut, "res2.shortcut")], "res2.add")], "res2.relu")
    y = g.conv_bn_relu(g.conv_bn_relu(x, net.depthwise, "depthwise"), net.pointwise, "pointwise")
    x = g.conv_bn_relu(g.node("Concat", [x, y], "concat", axis=1), net.fuse, "fuse")
    x = g.node("Flatten", [g.node("GlobalAveragePool", [x], "average")], "flatten")
    x = g.node("Relu", [g.gemm(x, net.hidden, "hidden", "hidden.gemm")], "hidden.relu")
    g.gemm(x, net.head, "head", "logits")
    graph = helper.make_graph(
        g.nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 10])],
        g.initializers,
    )
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8, producer_name="graphopt bench/train_digits.py")
    onnx.checker.check_model(model, full_check=True)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent.parent / "graphopt" / "assets")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    rows = split_rows()
    model = export(train(rows["train"]))
    onnx.save(model, out / "digits.onnx")
    images, labels = rows["eval"]
    np.savez_compressed(out / "digits_calib.npz", image=rows["calib"][0])
    np.savez_compressed(out / "digits_eval.npz", image=images, labels=labels)
    (out / "LICENSE-digits.txt").write_text(LICENCE)

    import onnxruntime

    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    correct = session.run(None, {"image": images})[0].argmax(1) == labels
    size = (out / "digits.onnx").stat().st_size
    print(f"evaluation accuracy {correct.mean():.2%} ({(~correct).sum()} of {len(labels)} wrong), {size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()
