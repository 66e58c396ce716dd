"""Sizes of the Wan2.1 transformers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerConfig:
    """Sizes of a Wan transformer.

    Raises:
        ValueError: heads do not divide dim, an odd head_dim, or an odd freq_dim.
    """

    dim: int
    ffn_dim: int
    num_layers: int
    num_heads: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    text_len: int = 512
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    cross_attn_norm: bool = True
    qk_norm: bool = True
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.dim % self.num_heads or self.head_dim % 2 or self.freq_dim % 2 or self.patch_size[0] != 1:
            raise ValueError(
                f"transformer: got dim={self.dim}, num_heads={self.num_heads}, freq_dim={self.freq_dim}, "
                f"patch_size={self.patch_size}, expected an even dim/num_heads, "
                f"an even freq_dim and patches of one frame"
            )

    @property
    def head_dim(self) -> int:
        """Numbers of one attention head."""
        return self.dim // self.num_heads


# Wan-Video/Wan2.1 wan/configs/wan_t2v_14B.py and wan_t2v_1_3B.py at 9737cba
WAN_14B = TransformerConfig(dim=5120, ffn_dim=13824, num_layers=40, num_heads=40)
WAN_1_3B = TransformerConfig(dim=1536, ffn_dim=8960, num_layers=30, num_heads=12)
