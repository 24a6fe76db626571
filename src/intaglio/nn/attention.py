"""softmax(QKᵀ/√E)V in the way that is fastest where it runs.

Shapes: B batch, H heads, T queries, M keys, E width of a head.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel


def attend(q_BHTE: Tensor, k_BHME: Tensor, v_BHME: Tensor) -> Tensor:
    """``scaled_dot_product_attention``, (B, H, T, E); on a CPU, where gradients are wanted, as plain products.

    There its fused backward takes 3 to 5 times as long in bf16, and its ``MATH`` converts everything to float32.
    """
    if not (q_BHTE.requires_grad and q_BHTE.device.type == "cpu"):
        return F.scaled_dot_product_attention(q_BHTE, k_BHME, v_BHME)
    if torch.promote_types(q_BHTE.dtype, k_BHME.dtype) == torch.bfloat16:
        return (q_BHTE * q_BHTE.shape[-1] ** -0.5 @ k_BHME.mT).softmax(-1) @ v_BHME
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q_BHTE, k_BHME, v_BHME)
