"""Kernels by their names: as CUPTI and torch's profiler write them on Ampere, Hopper and a CPU."""

# ruff: noqa: E501 (names are as long as they are)

import pytest

from wanrt.probes.compile_kernels import Work, cpu_work, gpu_work

# fmt: off
GPU = {
    # cuBLAS, cuBLASLt, CUTLASS
    "nvjet_tst_256x128_64x4_1x2_h_bz_coopA_bias_TNN": "gemm",
    "nvjet_hsh_128x256_64x4_2x1_v_bz_coopA_TNT": "gemm",
    "sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n_tilesize128x128x64_warpgroupsize1x1x1_execute_segment_k_off_kernel__5x_cublas": "gemm",
    "ampere_bf16_s16816gemm_bf16_128x128_ldg8_f2f_stages_32x5_tn": "gemm",
    "ampere_sgemm_128x64_tn": "gemm",
    "void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8>(cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128_32x3_tn_align8::Params)": "gemm",
    "void cutlass::device_kernel<cutlass::gemm::kernel::GemmUniversal<cute::tuple<int, int, int, int>, cutlass::gemm::collective::CollectiveMma<...>>>(Params)": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16, float, false>(cublasLt::cublasSplitKParams<float>)": "gemm",
    "void gemv2T_kernel_val<int, int, __nv_bfloat16, __nv_bfloat16, __nv_bfloat16, float, 128, 16, 4, 4, false, true>": "gemm",
    "void gemmSN_TN_kernel<float, 128, 16, 2, 4, 4, 4, true, cublasGemvTensorStridedBatched<float const>>": "gemm",
    "void dot_kernel<float, 128, 0, cublasDotParams<cublasGemvTensor<float const>, cublasGemvTensor<float>>>": "gemm",
    "sm80_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x16_stage4_warpsize2x2x1_ffma_aligna4_alignc4_execute_kernel__5x_cublas": "gemm",
    "triton_tem_fused_addmm_gelu_view_3": "gemm",
    "triton_tem_fused_mm_0": "gemm",
    # attention
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x128_4x1x1_kernel0_0": "attention",
    "cudnn_generated_fort_native_sdpa_sm80_flash_fprop_f16_knob_3_64x64x128_4x1x1_kernel0_0": "attention",
    "void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 128, 64, 4, false, false, cutlass::bfloat16_t>, false, false, false, false, true, true, false, false>(pytorch_flash::Flash_fwd_params)": "attention",
    "void pytorch_flash::flash_fwd_splitkv_combine_kernel<Flash_fwd_kernel_traits<128, 64, 128, 4>>": "attention",
    "fmha_cutlassF_bf16_aligned_64x128_rf_sm80(PyTorchMemEffAttention::AttentionKernel<cutlass::bfloat16_t>::Params)": "attention",
    "void flash::device_kernel<flash::enable_sm90_or_later<flash::FlashAttnFwdSm90<flash::CollectiveMainloopFwdSm90<2>>>>": "attention",
    "triton_tem_fused_flex_attention_0": "attention",
    "kernel_cutlass_flash_attncute_flash_fwdFlashAttentionForwardSm90_object_at__tensor000o": "attention",
    # elementwise, reductions, norms
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>, std::array<char*, 3ul>>(int)": "elementwise",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::BinaryFunctor<float, float, float, at::native::binary_internal::MulFunctor<float>>>>": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::GeluCUDAKernelImpl(at::TensorIteratorBase&, at::native::GeluType)::{lambda()#1}>": "elementwise",
    "void at::native::unrolled_elementwise_kernel<at::native::CUDAFunctorOnSelf_add<float>, std::array<char*, 2ul>, 4>": "elementwise",
    "void at::native::(anonymous namespace)::vectorized_layer_norm_kernel<float, float>(int, float, float const*)": "elementwise",
    "void at::native::reduce_kernel<512, 1, at::native::ReduceOp<float, at::native::MeanOps<float, float, float, float>, unsigned int, float, 4>>": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::rsqrt_kernel_cuda(at::TensorIteratorBase&)::{lambda()#2}>": "elementwise",
    "void at::native::vectorized_elementwise_kernel<4, at::native::(anonymous namespace)::pow_tensor_scalar_kernel_impl<float, float>>": "elementwise",
    "void at::native::elementwise_kernel<128, 2, at::native::gpu_kernel_impl<at::native::addcmul_cuda_scalar_tensor2>>": "elementwise",
    "void (anonymous namespace)::softmax_warp_forward<float, float, float, 9, false, false>": "elementwise",
    "void at::native::(anonymous namespace)::RowwiseMomentsCUDAKernel<float>(long, float, float const*, float*, float*)": "elementwise",
    "triton_poi_fused_addmm_gelu_view_4": "elementwise",
    "triton_poi_fused__scaled_dot_product_cudnn_attention_transpose_5": "elementwise",
    "triton_red_fused_add_addcmul_native_layer_norm_view_0": "elementwise",
    "triton_per_fused_native_layer_norm_mean_1": "elementwise",
    "triton_for_fused_0": "elementwise",
    "_add_norm_kernel": "elementwise",
    "_rope_norm_kernel": "elementwise",
    "_merge_kernel": "elementwise",
    # copies
    "Memcpy DtoD (Device -> Device)": "copy",
    "Memcpy HtoD (Pageable -> Device)": "copy",
    "Memset (Device)": "copy",
    "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}>>": "copy",
    "void at::native::vectorized_elementwise_kernel<4, at::native::bfloat16_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda(float)#1}>": "copy",
    "void at::native::unrolled_elementwise_kernel<at::native::direct_copy_kernel_cuda(at::TensorIteratorBase&)::{lambda()#3}::operator()() const::{lambda()#7}>": "copy",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_contig<at::native::(anonymous namespace)::OpaqueType<4u>, unsigned int, 4, 64, 64>": "copy",
    "void at::native::(anonymous namespace)::CatArrayBatchedCopy_alignedK_contig<OpaqueType<2u>, unsigned int, 2, 128, 1, 16>": "copy",
    "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, std::array<char*, 1ul>>": "copy",
    # convolutions
    "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128x64_warpgroupsize1x1x1_g1_execute_segment_k_off_kernel__5x_cudnn": "convolution",
    "void cudnn::ops::nchwToNhwcKernel<__nv_bfloat16, __nv_bfloat16, float, false, true>": "convolution",
    "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816fprop_optimized_bf16_128x128_32x5_nhwc_align8>": "convolution",
    "void implicit_convolve_sgemm<float, float, 1024, 5, 5, 3, 3, 3, 1, false, false, true>": "convolution",
    "cudnn_infer_ampere_scudnn_winograd_128x128_ldg1_ldg4_relu_tile148t_nt_v0": "convolution",
    # collectives
    "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collective",
    "ncclKernel_SendRecv_RING_SIMPLE_Sum_int8_t(ncclDevComm*, unsigned long, ncclWork*)": "collective",
    "ncclDevKernel_AllGather_RING_LL(ncclDevKernelArgsStorage<4096ul>)": "collective",
    "void c10d::symmetric_memory::multimem_all_reduce_kernel<c10::BFloat16, 16>": "collective",
    "void vllm::cross_device_reduce_1stage<__nv_bfloat16, 4>": "collective",
    # nothing known
    "my_secret_kernel": "other",
}

CPU = {
    "aten::addmm": "gemm", "aten::mm": "gemm", "aten::bmm": "gemm", "aten::baddbmm": "gemm",
    "mkldnn::_linear_pointwise": "gemm", "mkl::_mkl_linear": "gemm",
    "aten::_scaled_dot_product_flash_attention_for_cpu": "attention", "wanrt::flash_attention_4": "attention",
    "aten::mkldnn_convolution": "convolution", "aten::_convolution": "convolution",
    "aten::native_layer_norm": "elementwise", "aten::gelu": "elementwise", "aten::addcmul": "elementwise",
    "aten::mean": "elementwise", "aten::_softmax": "elementwise", "aten::mul": "elementwise",
    "graph_1_cpp_fused_gelu_view_7": "elementwise",
    "graph_0_cpp_fused__scaled_dot_product_flash_attention_for_cpu_add_copy_mean_mul_pow_2": "elementwise",
    "aten::copy_": "copy", "aten::cat": "copy", "aten::fill_": "copy",
    "c10d::allreduce_": "collective", "_c10d_functional::all_to_all_single": "collective", "gloo:all_reduce": "collective",
    "aten::linear": None, "aten::view": None, "aten::transpose": None, "aten::empty_strided": None, "aten::to": None,
    "aten::scaled_dot_product_attention": None, "aten::layer_norm": None, "aten::as_strided": None,
    "TorchDynamo Cache Lookup": None, "Torch-Compiled Region: 0/1": None, "Pregraph bytecode": None,
    "## Call CompiledFxGraph ftspc2s437hezjzawfkn7p2ofks4yyosfwhaaze4iflx5fgjttuv ##": None,
    "AOTDispatcher Runtime Wrapper Prologue": None, "ProfilerStep#3": None,
}
# fmt: on


@pytest.mark.parametrize(("name", "work"), GPU.items())
def test_gpu_kernels(name, work):
    assert gpu_work(name) == work


@pytest.mark.parametrize(("name", "work"), CPU.items())
def test_cpu_operators(name, work):
    assert cpu_work(name) == work


def test_every_class_has_an_example():
    assert set(GPU.values()) == set(map(str, Work))
