r"""The networks of Multimeasurement Generative Models (Saremi & Srivastava 2022), Tables 1 and 3, of any width.

U2Net (Table 1; U2-Net: Going deeper with nested U-structure, Qin et al. 2020): a U-Net whose every stage is a U-Net, without normalisation and with
x sigmoid(x). A stage RSU(height, in, mid, out) is h + U(h), h = silu(conv(x)), where U goes down height - 1 halvings less one and up again. The
outputs of
the deepest stage and of the four decoder stages each give a side map; a 1x1 convolution of all five is the output.

Encoder, Decoder (Table 3): residual networks of bottleneck blocks of widths [N, N/4, N/4, N] and kernels [1, 3, 3, 1], all kernels 1 where the
resolution is below
3, with average pooling between stages; the decoder is the encoder in reverse with nearest-neighbour upsampling. The tables leave open: how channels
enter and
leave (here a 1x1 convolution each) and how a block's skip changes width (here zeros are appended on the way up in width, a 1x1 convolution on the
way down).

A backbone is F(z, c) as in `nn`: c is shown to the network only if `levels`, as two more channels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from emdiff.nn import LAYOUTS, level_features

TABLE1 = {
    "down": [(6, 0, 64, 64), (5, 64, 128, 128), (4, 128, 128, 256), (3, 256, 256, 512), (3, 512, 256, 512)],
    "up": [(3, 1024, 128, 256), (3, 512, 128, 128), (5, 256, 128, 64), (6, 128, 64, 64)],
}
"""(height, in, mid, out) of each stage; 0 stands for the channels of the input."""

TABLE3 = ((128, 256, 512, 1024, 1024, 1024), (2, 2, 2, 2, 2, 1))
"""Widths and numbers of blocks of the encoder's stages."""


class RSU(nn.Module):
    """One stage of U2Net: (B, inp, H, W) -> (B, out, H, W).

    Args:
        height: Convolutions on the way down, the last of them dilated instead of pooled; at least 2.
        inp, mid, out: Channels.
    """

    def __init__(self, height: int, inp: int, mid: int, out: int) -> None:
        super().__init__()
        conv = lambda a, b, d=1: nn.Conv2d(a, b, 3, padding=d, dilation=d)
        self.first = conv(inp, out)
        self.down = nn.ModuleList(conv(mid if i else out, mid) for i in range(height - 1))
        self.bottom = conv(mid, mid, 2)
        self.up = nn.ModuleList(conv(2 * mid, mid if i else out) for i in range(height - 1))

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inp, H, W) -> (B, out, H, W)."""
        h = x = F.silu(self.first(x))
        skips = []
        for i, layer in enumerate(self.down):
            h = F.silu(layer(_pool(h) if i else h))
            skips.append(h)
        h = F.silu(self.bottom(h))
        for skip, layer in zip(skips[::-1], self.up[::-1]):
            h = F.silu(layer(torch.cat([_resize(h, skip), skip], dim=1)))
        return x + h


class U2Net(nn.Module):
    """The network of Table 1 on images; measurements are channels.

    Args:
        shape: Shape of the input without the batch: (..., H, W); all axes before the last two are channels.
        width: Width factor; the paper's is 1 for MNIST, 2 for CIFAR-10 and FFHQ-256.
        levels: Show the network c.

    >>> U2Net((4, 1, 28, 28), width=1 / 16)(torch.zeros(2, 4, 1, 28, 28), torch.zeros(1)).shape
    torch.Size([2, 4, 1, 28, 28])
    """

    def __init__(self, shape: tuple[int, ...], width: float = 1.0, levels: bool = False) -> None:
        super().__init__()
        self.shape, self.levels, channels = tuple(shape), levels, math.prod(shape[:-2])
        wide = lambda n: max(1, round(width * n)) if n else channels + 2 * levels
        self.down = nn.ModuleList(RSU(height, *map(wide, rest)) for height, *rest in TABLE1["down"])
        self.up = nn.ModuleList(RSU(height, 2 * wide(inp // 2), *map(wide, rest)) for height, inp, *rest in TABLE1["up"])
        self.side = nn.ModuleList(nn.Conv2d(wide(spec[3]), channels, 3, padding=1) for spec in [TABLE1["down"][-1], *TABLE1["up"]])
        self.fuse = nn.Conv2d(len(self.side) * channels, channels, 1)
        self.to(memory_format=LAYOUTS[2])

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z (B, *shape), c (B or 1, ...) -> (B, *shape)."""
        h = z.reshape(len(z), -1, *self.shape[-2:])
        if self.levels:
            h = torch.cat([h, level_channels(c, h)], dim=1)
        h = h.contiguous(memory_format=LAYOUTS[2])
        full, skips = h, []
        for i, stage in enumerate(self.down):
            h = stage(_pool(h) if i else h)
            skips.append(h)
        maps = [_resize(self.side[0](h), full)]
        for skip, stage, side in zip(skips[-2::-1], self.up, self.side[1:]):
            h = stage(torch.cat([_resize(h, skip), skip], dim=1))
            maps.append(_resize(side(h), full))
        return self.fuse(torch.cat(maps[::-1], dim=1)).reshape(z.shape)


class Bottleneck(nn.Module):
    """h + B(h) with widths [N, N/4, N/4, N], each convolution after an activation.

    The last convolution starts at 0, so that a new block is its skip.
    """

    def __init__(self, inp: int, width: int, resolution: int) -> None:
        super().__init__()
        k, mid = 3 if resolution >= 3 else 1, max(1, width // 4)
        self.grow = width - inp
        self.project = nn.Conv2d(inp, width, 1) if width < inp else nn.Identity()
        sizes = [(width, mid, 1), (mid, mid, k), (mid, mid, k), (mid, width, 1)]
        self.convs = nn.ModuleList(nn.Conv2d(a, b, s, padding=s // 2) for a, b, s in sizes)
        nn.init.zeros_(self.convs[-1].weight)
        nn.init.zeros_(self.convs[-1].bias)

    def forward(self, h: Tensor) -> Tensor:
        """h (B, inp, H, W) -> (B, width, H, W)."""
        h = F.pad(self.project(h), (0, 0, 0, 0, 0, max(self.grow, 0)))
        out = h
        for conv in self.convs:
            out = conv(F.silu(out))
        return h + out


def resolutions(side: int, stages: int) -> list[int]:
    """Sides after each pooling, rounded up: 28, 14, 7, 4, 2, 1 for six stages from 28."""
    return [-(-side // 2**i) for i in range(stages)]


class Encoder(nn.Module):
    """The encoder of Table 3, also used as metaencoder: (B, channels, H, W) -> (B, out).

    Args:
        channels: Input channels.
        size: (H, W).
        out: Output features, of the average over what positions are left (one, for 28 x 28).
        widths: Channels of each stage.
        blocks: Blocks of each stage.

    >>> Encoder(4, (28, 28), 10, widths=(8, 8, 8))(torch.zeros(2, 4, 28, 28)).shape
    torch.Size([2, 10])
    """

    def __init__(
        self, channels: int, size: tuple[int, int], out: int, widths: tuple[int, ...] = TABLE3[0], blocks: tuple[int, ...] = TABLE3[1]
    ) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, widths[0], 1)
        inputs, sides = [widths[0], *widths], resolutions(min(size), len(widths))
        self.stages = nn.ModuleList(
            nn.Sequential(*(Bottleneck(inputs[i] if j == 0 else w, w, sides[i]) for j in range(n))) for i, (w, n) in enumerate(zip(widths, blocks))
        )
        self.head = nn.Linear(widths[-1], out)
        self.to(memory_format=LAYOUTS[2])

    def forward(self, x: Tensor) -> Tensor:
        """x (B, channels, H, W) -> (B, out)."""
        h = self.first(x.contiguous(memory_format=LAYOUTS[2]))
        for i, stage in enumerate(self.stages):
            h = stage(F.avg_pool2d(h, 2, ceil_mode=True) if i else h)
        return self.head(F.silu(h).mean((2, 3)))


class Decoder(nn.Module):
    """The encoder of Table 3 in reverse: (B, inp) -> (B, channels, H, W).

    >>> Decoder(10, (28, 28), 4, widths=(8, 8, 8))(torch.zeros(2, 10)).shape
    torch.Size([2, 4, 28, 28])
    """

    def __init__(
        self, inp: int, size: tuple[int, int], channels: int, widths: tuple[int, ...] = TABLE3[0], blocks: tuple[int, ...] = TABLE3[1]
    ) -> None:
        super().__init__()
        n = len(widths)
        self.sizes = list(zip(resolutions(size[0], n), resolutions(size[1], n)))[::-1]
        self.first = nn.Linear(inp, widths[-1])
        inputs, sides, wide, counts = [widths[-1], *widths[::-1]], resolutions(min(size), n)[::-1], widths[::-1], blocks[:n][::-1]
        self.stages = nn.ModuleList(
            nn.Sequential(*(Bottleneck(inputs[i] if j == 0 else wide[i], wide[i], sides[i]) for j in range(counts[i]))) for i in range(n)
        )
        self.head = nn.Conv2d(widths[0], channels, 1)
        self.to(memory_format=LAYOUTS[2])

    def forward(self, z: Tensor) -> Tensor:
        """z (B, inp) -> (B, channels, H, W)."""
        h = self.first(z)[:, :, None, None]
        for size, stage in zip(self.sizes, self.stages):
            h = stage(F.interpolate(h, size=size, mode="nearest"))
        return self.head(F.silu(h))


def spectrally_normalised(net: nn.Module) -> nn.Module:
    """Divide the weights of every convolution and linear layer by their largest singular value (Miyato et al. 2018); changes net and returns it.

    A weight that starts at 0 has no direction to normalise and is drawn anew.
    """
    for layer in [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]:
        if not layer.weight.is_meta and not bool(layer.weight.any()):
            layer.reset_parameters()
        spectral_norm(layer)
    return net


def _pool(h: Tensor) -> Tensor:
    return F.max_pool2d(h, 2, ceil_mode=True)


def _resize(h: Tensor, like: Tensor) -> Tensor:
    return h if h.shape[-2:] == like.shape[-2:] else F.interpolate(h, size=like.shape[-2:], mode="bilinear", align_corners=False)


def level_channels(c: Tensor, like: Tensor) -> Tensor:
    """The features of c as two channels (B, 2, H, W), the mean where it differs between channels."""
    c = c.reshape(len(c), -1, *c.shape[-2:]) if c.ndim > 2 else c.reshape(len(c), 1, 1, 1)
    return level_features(c.mean(1, keepdim=True)).expand(len(like), -1, *like.shape[-2:])
