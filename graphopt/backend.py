"""graphopt as an ONNX backend (onnx.backend.base): the exact passes, then onnxruntime.

import graphopt.backend
outputs = graphopt.backend.prepare(onnx.load("model.onnx")).run([array])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnx.backend.base import Backend, BackendRep, namedtupledict
from onnx.backend.test.runner import BackendIsNotSupposedToImplementIt

from graphopt.errors import DataError, ModelError, OptionError
from graphopt.model import MIN_OPSET
from graphopt.runtime import run, session

PASSES = "cleanup, fold-bn, fold-scales, cleanup"


class GraphoptRep(BackendRep):
    """A prepared model: run it as often as wanted."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model
        self._session = session(model)
        self._inputs = [i.name for i in self._session.get_inputs()]
        self._outputs = [o.name for o in self._session.get_outputs()]

    def run(self, inputs: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Outputs for a sequence of arrays (in input order), one array, or a dict by input name; a named tuple."""
        if kwargs:
            raise OptionError(f"graphopt.backend: run takes no options, found {', '.join(kwargs)}")
        named = namedtupledict("Outputs", self._outputs)
        outputs: tuple[Any, ...] = named(*run(self._session, self._feed(inputs)))
        return outputs

    def _feed(self, inputs: Any) -> dict[str, Any]:
        if isinstance(inputs, Mapping):
            return {name: _array(value) for name, value in inputs.items()}
        values = [_array(v) for v in ([inputs] if isinstance(inputs, np.ndarray | np.generic) else inputs)]
        if len(values) != len(self._inputs):
            raise DataError(f"graphopt.backend: the model takes {len(self._inputs)} inputs ({self._inputs}), found {len(values)}")
        return dict(zip(self._inputs, values, strict=True))


def _without_arrays(model: onnx.ModelProto) -> str:
    """The first element type of an input or output that numpy itself lacks (bfloat16, float8 ...): there are no arrays of it."""
    known = helper.get_all_tensor_dtypes()
    infos = (*model.graph.input, *model.graph.output)
    kinds = [i.type.tensor_type.elem_type for i in infos if i.type.tensor_type.elem_type in known]
    dtypes = [np.dtype(helper.tensor_dtype_to_np_dtype(kind)) for kind in kinds]
    return next((d.name for d in dtypes if d.isbuiltin != 1), "")


def _array(value: Any) -> Any:
    """numpy's scalars as arrays without axes, which is what onnxruntime takes; sequences, maps and None as they are."""
    return np.asarray(value) if isinstance(value, np.generic) else value


class GraphoptBackend(Backend):
    """The backend interface over `graphopt.optimize` with the exact passes."""

    @classmethod
    def prepare(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> GraphoptRep:
        """Optimise and load the model. BackendIsNotSupposedToImplementIt where onnxruntime cannot load the original."""
        from graphopt.context import Context
        from graphopt.model import from_proto
        from graphopt.pipeline import parse
        from graphopt.pipeline import run as run_passes

        if not cls.supports_device(device):
            raise OptionError(f"graphopt.backend runs on CPU only, not '{device}'")
        if kwargs:
            raise OptionError(f"graphopt.backend: prepare takes no options, found {', '.join(kwargs)}")
        strange = _without_arrays(model)
        if strange:
            raise BackendIsNotSupposedToImplementIt(f"onnxruntime takes and gives no arrays of {strange}")
        try:
            session(model)
            work = from_proto(model)
        except ModelError as error:
            raise BackendIsNotSupposedToImplementIt(str(error)) from error
        run_passes(work, parse(PASSES), Context())
        return GraphoptRep(work.proto())

    @classmethod
    def run_model(cls, model: onnx.ModelProto, inputs: Any, device: str = "CPU", **kwargs: Any) -> tuple[Any, ...]:
        """`prepare` and run once."""
        return cls.prepare(model, device, **kwargs).run(inputs)

    @classmethod
    def run_node(
        cls,
        node: onnx.NodeProto,
        inputs: Any,
        device: str = "CPU",
        outputs_info: Sequence[tuple[Any, Any]] | None = None,
        **kwargs: Any,
    ) -> tuple[Any, ...]:
        """Run one node on arrays, in its newest version; `outputs_info` gives (dtype, shape) of its outputs."""
        if not onnx.defs.has(node.op_type, node.domain):
            raise OptionError(f"graphopt.backend: there is no operator '{node.op_type}' in ONNX domain '{node.domain}'")
        names = [n for n in node.input if n]
        given = [inputs[n] for n in names] if isinstance(inputs, Mapping) else list(inputs)
        arrays = [np.asarray(v) for v in given]
        typed = [(helper.np_dtype_to_tensor_dtype(a.dtype), list(a.shape)) for a in arrays]
        graph_inputs = [helper.make_tensor_value_info(n, t, s) for n, (t, s) in zip(names, typed, strict=True)]
        outs = [onnx.ValueInfoProto(name=n) for n in node.output if n]
        if outputs_info is not None:
            kinds = [(helper.np_dtype_to_tensor_dtype(np.dtype(t)), list(s)) for t, s in outputs_info]
            outs = [helper.make_tensor_value_info(o.name, t, s) for o, (t, s) in zip(outs, kinds, strict=True)]
        graph = helper.make_graph([node], "node", graph_inputs, outs)
        opset = max(onnx.defs.get_schema(node.op_type, domain=node.domain).since_version, MIN_OPSET)
        imports = [helper.make_opsetid(node.domain, opset)]
        made = helper.make_model(graph, opset_imports=imports, ir_version=8)  # old enough for every onnxruntime
        model = onnx.shape_inference.infer_shapes(made)
        return cls.run_model(model, arrays, device, **kwargs)

    @classmethod
    def supports_device(cls, device: str) -> bool:
        """CPU only."""
        return device.split(":", 1)[0].upper() == "CPU"

    @classmethod
    def is_compatible(cls, model: onnx.ModelProto, device: str = "CPU", **kwargs: Any) -> bool:
        """Whether onnxruntime can load the model."""
        try:
            session(model)
        except ModelError:
            return False
        return cls.supports_device(device)


prepare = GraphoptBackend.prepare
run_model = GraphoptBackend.run_model
run_node = GraphoptBackend.run_node
supports_device = GraphoptBackend.supports_device
is_compatible = GraphoptBackend.is_compatible
