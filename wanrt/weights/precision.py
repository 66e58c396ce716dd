"""Which parameters keep fp32 whatever precision the model runs in."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

import torch

from wanrt.weights.names import Kind

# The transformer computes with these in fp32 (wanrt/models/transformer.py, "Precision"): kept so, they are neither
# rounded at load nor converted at every step. diffusers 0.42.1 `WanTransformer3DModel._keep_in_fp32_modules` names
# the same parameters, less the q/k norms and the head.
FP32_PARAMETERS: Mapping[Kind, tuple[str, ...]] = {
    Kind.TRANSFORMER: (
        "time_embedding.*",
        "time_projection.*",
        "*.modulation",
        "*.norm_q.weight",
        "*.norm_k.weight",
        "*.norm3.*",
        "head.head.*",
    )
}


def stored_dtype(kind: Kind, name: str, dtype: torch.dtype) -> torch.dtype:
    """Dtype of a parameter in a model of this kind that runs in `dtype`."""
    keep = any(fnmatchcase(name, pattern) for pattern in FP32_PARAMETERS.get(kind, ()))
    return torch.float32 if keep else dtype
