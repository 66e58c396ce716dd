"""What kind of work a kernel does, told from the name that the profiler gives.

GPU names are those of CUPTI, demangled: cuBLAS and CUTLASS name tiles, torch names functors, Inductor names its
Triton kernels by kind (`triton_poi`, `triton_red`, `triton_per`, `triton_tem`) and by the operators they fuse.
Fused names therefore hold the names of their neighbours (`triton_poi_fused_addmm_gelu`), so the kind is looked at
before the operators. CPU names are operators (`aten::addmm`) and Inductor's `cpp_fused` loops.
"""

from __future__ import annotations

import re
from enum import StrEnum


class Work(StrEnum):
    """A class of work. ELEMENTWISE covers pointwise, reduction and norm kernels: what a compiler can fuse."""

    GEMM = "gemm"
    ATTENTION = "attention"
    CONVOLUTION = "convolution"
    ELEMENTWISE = "elementwise"
    COPY = "copy"
    COLLECTIVE = "collective"
    OTHER = "other"


FUSIBLE = (Work.ELEMENTWISE, Work.COPY)

# The first pattern that is found decides; case does not matter.
_GPU: tuple[tuple[Work, str], ...] = (
    (Work.COLLECTIVE, r"nccl|all_?reduce|all_?gather|reduce_?scatter|all_?to_?all"),
    (Work.COLLECTIVE, r"symm_mem|multimem|cross_device_reduce"),
    (Work.ATTENTION, r"^triton_tem_\w*(flex|attention)"),
    (Work.GEMM, r"^triton_(tem|mm|bmm|addmm)_|^triton_mm|^_?scaled_mm_kernel"),
    (Work.ELEMENTWISE, r"^triton_(poi|red|per|for|unk|split_scan|mix_order)"),
    (Work.ELEMENTWISE, r"_?add_norm_kernel|rope_norm_kernel|_?merge_kernel"),
    (
        Work.ATTENTION,
        r"flash|fmha|attention|attn|sdpa|cudnn_generated_fort_native_sdpa|pytorch_flash|mha_|softmax_gemm",
    ),
    (
        Work.CONVOLUTION,
        r"conv(?!ert)|fprop|dgrad|wgrad|winograd|im2col|vol2col|nchwToNhwc|nhwcToNchw|implicit_gemm",
    ),
    (Work.ELEMENTWISE, r"elementwise_kernel.*(CUDAFunctor_add|BinaryFunctor|gelu)"),
    (Work.COPY, r"^memcpy|^memset|CatArrayBatchedCopy|copy_kernel|_copy|copy_device|FillFunctor|fill_"),
    (
        Work.COPY,
        r"index(SelectLargeIndex|SelectSmallIndex|_copy)|gather_kernel|scatter_kernel|transpose_kernel",
    ),
    (
        Work.GEMM,
        r"gemm|gemv|cutlass|xmma|nvjet|cublas|splitK|ampere_|turing_|volta_|hopper_|sgemm|hgemm|dot_kernel"
        r"|device_kernel<.*(mma|Gemm)",
    ),
    (
        Work.ELEMENTWISE,
        r"elementwise|reduce_kernel|layer_?norm|rms_?norm|group_?norm|softmax|gelu|silu|sigmoid|functor|RowwiseMoments"
        r"|welford|distribution|arange|cumsum|scan_kernel|where|clamp",
    ),
)

_CPU: tuple[tuple[Work, str], ...] = (
    (Work.ELEMENTWISE, r"cpp_fused|mkldnn::_(gelu|softmax)"),
    (Work.GEMM, r"packed_gemm|micro_gemm|cpp_\w*template"),
    (Work.COLLECTIVE, r"^c10d::|^_c10d_functional::|^gloo:|^nccl:"),
    (
        Work.ATTENTION,
        r"::_(scaled_dot_product_(flash|efficient|cudnn|fused)|flash|efficient)_attention|^wanrt::flash_attention",
    ),
    (
        Work.CONVOLUTION,
        r"::(_?convolution|mkldnn_convolution|conv[123]d|thnn_conv|slow_conv|_convolution)|mkldnn::_conv",
    ),
    (
        Work.GEMM,
        r"::(addmm|mm|bmm|baddbmm|addbmm|matmul_out|addmv|mv|dot|_scaled_mm|_int_mm)$|(mkldnn|mkl|onednn)::_?(mkl_)?q?linear",
    ),
    (
        Work.COPY,
        r"::(copy_|cat|fill_|zero_|index_select|gather|scatter_?|index_copy_?|constant_pad_nd|repeat_interleave)$",
    ),
)

# Operators that compute nothing: views, allocations, and wrappers whose work appears under another name. On a CPU
# their time is the host's, as Python's is.
_CPU_HOST = re.compile(
    r"^aten::(_?to(_copy)?|clone|contiguous|linear|matmul|as_strided\w*|_?reshape\w*|_unsafe_view|view\w*|slice|select"
    r"|t|transpose|permute|expand\w*|unsqueeze|squeeze|flatten|unflatten|unbind|split\w*|chunk|narrow|detach\w*|alias"
    r"|lift_fresh|empty\w*|new_empty\w*|resize_|set_|result_type|resolve_(conj|neg)|item|_local_scalar_dense|is_nonzero"
    r"|scaled_dot_product_attention|_scaled_dot_product_attention_math|_fused_sdp_choice|stack|layer_norm|rms_norm|pad|zeros\w*|ones\w*|full\w*|new_zeros"
    r"|_has_compatible_shallow_copy_type|broadcast_to|conv[123]d|movedim|numpy_T|type_as|float|half|double)$"
)  # fmt: skip


def _compile(table: tuple[tuple[Work, str], ...]) -> tuple[tuple[Work, re.Pattern[str]], ...]:
    return tuple((work, re.compile(pattern, re.IGNORECASE)) for work, pattern in table)


_GPU_TABLE, _CPU_TABLE = _compile(_GPU), _compile(_CPU)


def gpu_work(kernel: str) -> Work:
    """The class of a CUDA kernel or memory operation, by its name; OTHER when nothing fits."""
    return next((work for work, pattern in _GPU_TABLE if pattern.search(kernel)), Work.OTHER)


def cpu_work(operator: str) -> Work | None:
    """The class of a CPU operator or Inductor loop, by its name; None for what is only the host's bookkeeping.

    An `aten::` operator in no list is elementwise: there are hundreds of them.
    """
    for work, pattern in _CPU_TABLE:
        if pattern.search(operator):
            return work
    if not re.match(r"^(aten|mkldnn|mkl|quantized|prims|wanrt)::", operator) or _CPU_HOST.match(operator):
        return None
    return Work.ELEMENTWISE
