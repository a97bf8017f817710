"""GPU ops run on the GPU where there is one, elsewhere under Triton's interpreter with its corrections."""

import pytest
import torch

from weft.kernels.gpu.interpreter import install

if not torch.cuda.is_available():
    install()


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
