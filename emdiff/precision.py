"""Where networks run in bfloat16: what the hardware has, and what bears it."""

from __future__ import annotations

import torch
from torch import nn

from emdiff.denoise import Denoiser
from emdiff.mdae import MDAE, ChannelMDAE
from emdiff.muvb import MUVB


def set_precision(denoiser: Denoiser, device: str) -> Denoiser:
    """Run the convolutional networks of an MDAE, or of a MUVB of fixed levels, in bfloat16 where the hardware computes in it; returns the denoiser.

    Other energies stay in float32: where noise is small their score is a difference of large terms. So do volumes: the backward pass of torch 2.15's
    three-dimensional convolutions in bfloat16 on a CPU was seen to give NaN.
    """
    if not isinstance(denoiser, (MDAE, ChannelMDAE, MUVB)):
        return denoiser
    flat = any(isinstance(module, (nn.Conv1d, nn.Conv2d)) for module in denoiser.modules())
    fine = isinstance(denoiser, MUVB) and denoiser.pooled
    denoiser.bf16 = flat and not fine and has_bfloat16(device)
    return denoiser


def has_bfloat16(device: str) -> bool:
    """Whether a device, "cpu" or "cuda", computes convolutions in bfloat16 in hardware."""
    if device == "cuda":
        return torch.cuda.is_bf16_supported()
    return device == "cpu" and torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
