"""Triton kernels, one file each with its plain PyTorch reference.

Imported as wanrt_kernels; never imports wanrt.
"""
