"""Builds an ONNX graph node by node, and writes its weights into a second file."""

from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import onnx
from onnx import helper

WEIGHTS = "model.onnx.data"
MICROSOFT = "com.microsoft"  # The domain of ONNX Runtime's own operators.

_OPSET, _IR_VERSION = 23, 11  # The first opset with RMSNormalization, and its file format.
# A weight of at least `_LARGE` bytes starts at a multiple of `_PAGE`, so that it can be mapped.
_PAGE, _LARGE = 1 << 16, 1 << 20
_ALIGNED = 64


class Graph:
    """An ONNX graph; nodes and initializers stay in the order in which they were added.

    Initializers of at least `_ALIGNED` bytes are written to the file `weights`; smaller ones stay
    in the graph.
    """

    def __init__(self, weights: BinaryIO) -> None:
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self._weights = weights

    def constant(self, name: str, values: np.ndarray) -> str:
        data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
        tensor = onnx.TensorProto(name=name, data_type=data_type, dims=values.shape)
        data = np.ascontiguousarray(values)
        if data.nbytes < _ALIGNED:
            tensor.raw_data = data.tobytes()
        else:
            align = _PAGE if data.nbytes >= _LARGE else _ALIGNED
            self._weights.write(bytes(-self._weights.tell() % align))
            tensor.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": WEIGHTS, "offset": self._weights.tell(), "length": data.nbytes}
            for key, value in place.items():
                tensor.external_data.add(key=key, value=str(value))
            self._weights.write(data.reshape(-1).view(np.uint8).data)
        self.initializers.append(tensor)
        return name

    def node(
        self,
        operator: str,
        *inputs: str,
        outputs: Sequence[str] | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> str:
        """Adds a node and returns the name of its first output."""
        names = outputs or [f"{operator}_{len(self.nodes)}"]
        self.nodes.append(
            helper.make_node(operator, inputs, names, name=names[0], domain=domain, **attributes)
        )
        return names[0]

    def input(self, name: str, dtype: type, shape: Sequence[int | str]) -> str:
        """Adds an input and returns its name; a string in `shape` names a dynamic size."""
        self.inputs.append(_value_info(name, dtype, shape))
        return name

    def output(self, name: str, shape: Sequence[int | str]) -> str:
        """Declares the float32 value `name` as an output of the graph and returns `name`."""
        self.outputs.append(_value_info(name, np.float32, shape))
        return name

    def serialized(self) -> bytes:
        """Returns the bytes of the model file; equal graphs have equal bytes."""
        graph = helper.make_graph(
            self.nodes, "MobileLLM", self.inputs, self.outputs, self.initializers
        )
        model = helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", _OPSET), helper.make_opsetid(MICROSOFT, 1)],
            ir_version=_IR_VERSION,
            producer_name="mobilellm-jax",
        )
        content: bytes = model.SerializeToString(deterministic=True)
        return content


def _value_info(name: str, dtype: type, shape: Sequence[int | str]) -> Any:
    data_type = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return helper.make_tensor_value_info(name, data_type, shape)
