"""What the peers need that train on a GPU alone: found before anything is imported, or said in one line."""

import sys
from importlib.util import find_spec


def require_gpu(package: str) -> None:
    """Leave with a message where the package is not installed, or torch sees no CUDA device."""
    if find_spec(package) is None:
        sys.exit(
            f"{package} is not installed in {sys.executable}: make it an environment from benchmarks/peers/{package}.txt "
            "and name that one's interpreter with --python"
        )
    import torch

    if not torch.cuda.is_available():
        sys.exit(f"{package} trains on a CUDA device, and torch {torch.__version__} sees none")
