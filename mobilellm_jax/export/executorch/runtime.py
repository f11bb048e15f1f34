"""Runs `model.pte` in ExecuTorch's runtime; its XNNPACK backend uses all CPU cores."""

from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import executorch.extension.llm.custom_ops.custom_ops
import executorch.kernels.quantized  # noqa: F401  # Registers kernels, as the import above does.
import numpy as np
import torch
from executorch.runtime import Runtime as Library
from numpy.typing import NDArray

from mobilellm_jax.errors import UserError
from mobilellm_jax.export.runtime import ArtifactInfo, Runtime, wrong_model

_METHOD = "forward"


class ExecutorchRuntime(Runtime):
    """A program that `executorch/writer.py` wrote; the program keeps its own cache."""

    def __init__(self, file: Path, info: ArtifactInfo) -> None:
        data = file.with_suffix(".ptd")
        try:
            program: Any = Library.get().load_program(
                file, data_path=data if data.exists() else None
            )
            names = program.method_names
            method = program.load_method(_METHOD) if _METHOD in names else None
        except RuntimeError as error:
            raise UserError(f"ExecuTorch cannot load {file}: {error}") from error
        if method is None:
            raise wrong_model(file, info, f", because its methods are {sorted(names)}")
        meta = method.metadata
        shapes = [meta.input_tensor_meta(i).sizes() for i in range(meta.num_inputs())]
        shapes += [meta.output_tensor_meta(i).sizes() for i in range(meta.num_outputs())]
        chunk = shapes[0][-1] if shapes else 0
        if shapes != [(1, chunk), (1,), (1, chunk, info.model.vocab_size)]:
            raise wrong_model(file, info, f", because its shapes are {shapes}")
        super().__init__(f"ExecuTorch {metadata.version('executorch')}", info.model, chunk)
        self._method = method

    def _extend(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        [logits_1TV] = self._method.execute(
            (torch.tensor([list(tokens)]), torch.tensor([self._length]))
        )
        logits_TV: NDArray[np.float32] = logits_1TV[0].numpy()
        return logits_TV
