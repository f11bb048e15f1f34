"""Runs `model.pte` in ExecuTorch's runtime; XNNPACK uses all cores."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401  # registers kernels, as the line above
import numpy as np
import torch
from executorch.runtime import Runtime as Library
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime, check_room

_METHOD = "forward"


class ExecutorchRuntime:
    """A program with its own cache; this object only counts the tokens of the sequence."""

    def __init__(self, method: Any, chunk: int, info: ArtifactInfo) -> None:
        self._method = method
        self._chunk = chunk
        self.name = f"ExecuTorch {metadata.version('executorch')}"
        self.vocab_size = info.vocab_size
        self.max_seq_len = info.max_seq_len
        self._length = 0

    def read(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        check_room(self, len(tokens))
        self._length = 0
        chunks = (tokens[i : i + self._chunk] for i in range(0, len(tokens), self._chunk))
        return np.concatenate([self._extend(chunk) for chunk in chunks])

    def append(self, token: int) -> NDArray[np.float32]:
        check_room(self, self._length + 1)
        last_V: NDArray[np.float32] = self._extend([token])[-1]
        return last_V

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        [logits_1TV] = self._method.execute(
            (torch.tensor([list(tokens)]), torch.tensor([self._length]))
        )
        self._length += len(tokens)
        logits_TV: NDArray[np.float32] = logits_1TV[0].numpy()
        return logits_TV


def load(file: Path, info: ArtifactInfo) -> Runtime:
    """Loads a program that `executorch/writer.py` wrote.

    Raises:
      UserError: if ExecuTorch cannot load the file.
    """
    data = file.with_suffix(".ptd")
    try:
        program: Any = Library.get().load_program(file, data_path=data if data.exists() else None)
        names = program.method_names
        method = program.load_method(_METHOD) if _METHOD in names else None
    except RuntimeError as error:
        raise UserError(f"{file} is no program that ExecuTorch loads: {error}") from error
    if method is None:
        raise UserError(f"{file} has the methods {sorted(names)}, and not {_METHOD!r}.")
    meta = method.metadata
    shapes = [meta.input_tensor_meta(i).sizes() for i in range(meta.num_inputs())]
    shapes += [meta.output_tensor_meta(i).sizes() for i in range(meta.num_outputs())]
    chunk = shapes[0][-1] if shapes else 0
    if shapes != [(1, chunk), (1,), (1, chunk, info.vocab_size)]:
        raise UserError(
            f"{file} is no program of ours for {info.vocab_size:,} tokens: it takes and gives "
            f"{shapes}."
        )
    return ExecutorchRuntime(method, chunk, info)
