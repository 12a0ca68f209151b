r"""Networks that a learned denoiser is built from.

A backbone is a function F(z, c) of a preconditioned input z (B, *S) and of a noise coordinate c, which says how precisely every
entry was measured:

    c = log(1 + 1/tau^2) / 2 >= 0,     0 where nothing was measured,     about -log(tau) where tau is small.

c broadcasts against z: (B, 1, ..., 1) for one noise level per datum, (B, *S) for a level per entry. Both networks modulate their
hidden features by functions of c (FiLM: Visual Reasoning with a General Conditioning Layer, Perez et al. 2018), and neither uses
normalisation layers, as in Table 1 of Multimeasurement Generative Models (Saremi & Srivastava 2022).

A U-Net sees a map of levels at its input, and its blocks are modulated by the mean over the datum. With `gain` it ends with two outputs per
entry, F = f + g z: where an entry does not vary, g undoes at once what the estimator around the network passes of y. Where it sees maps, f
and g are affine in the two features of the entry's own level, so that entries measured well and badly side by side have gains of their
own; convolutions alone, which would have to multiply z by what they know of c, were seen to mix these up (docs/method.md, Levels per entry).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


def level_features(c: Tensor) -> Tensor:
    """Two bounded functions of the noise coordinate: the signal's share of the input's std, and c itself.

    Args:
        c: Noise coordinate, non-negative, shape (B, 1, ...).

    Returns:
        Features (B, 2, ...).
    """
    return torch.cat([torch.sqrt(-torch.expm1(-2 * c) + 1e-12), c / 3], dim=1)


CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
LAYOUTS = {1: torch.contiguous_format, 2: torch.channels_last, 3: torch.contiguous_format}
"""Memory formats by dimension."""


class ResBlock(nn.Module):
    """h + W2 silu((1 + a(c)) W1 silu(h) + b(c)), with W2 = 0 at the start, so that a new block is the identity."""

    def __init__(self, width: int, embed: int, dims: int = 2) -> None:
        super().__init__()
        conv = CONVOLUTIONS[dims]
        self.conv1 = conv(width, width, 3, padding=1)
        self.conv2 = conv(width, width, 3, padding=1)
        self.film = conv(embed, 2 * width, 1)
        nn.init.zeros_(self.conv2.weight)
        nn.init.zeros_(self.conv2.bias)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """h (B, width, *space), e (B or 1, embed, *ones) -> (B, width, *space)."""
        a, b = self.film(e).chunk(2, dim=1)
        return h + self.conv2(F.silu(torch.addcmul(b, 1 + a, self.conv1(F.silu(h)))))


class UNet(nn.Module):
    """A small U-Net on series, images or volumes of any size and number of channels, with blocks of entries folded into channels.

    Args:
        shape: Shape S of a datum: (H, W) or (C, H, W), and with dims 1 (L,) or (C, L), with dims 3 (D, H, W) or (C, D, H, W).
        widths: Channels at each resolution, the finest first; each further one halves height and width.
        patch: Side of the pixel blocks folded into channels at the input; 1 folds nothing.
        blocks: Residual blocks at each resolution, on the way down and on the way up.
        embed: Width of the embedding of the noise coordinate.
        dims: Axes of space, 1 to 3.
        maps: Show the network c entry by entry, next to z; needed where levels differ between entries, since what modulates the blocks is the
            mean over the datum.
        gain: F = f + g z. Not for the outputs of several measurements, which would differ by the one each multiplies.

    Raises:
        ValueError: if shape has not dims axes, or one more.

    >>> net = UNet((1, 17, 23), widths=(8, 16))
    >>> net(torch.randn(2, 1, 17, 23), torch.ones(2, 1, 1, 1)).shape
    torch.Size([2, 1, 17, 23])
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        widths: tuple[int, ...] = (32, 64),
        patch: int = 2,
        blocks: int = 1,
        embed: int = 16,
        maps: bool = False,
        dims: int = 2,
        gain: bool = False,
    ) -> None:
        super().__init__()
        if len(shape) not in (dims, dims + 1):
            raise ValueError(f"a U-Net of {dims} dimensions takes data with {dims} or {dims + 1} axes, not {tuple(shape)}; use the MLP")
        self.shape, self.patch, self.maps, self.dims, self.gain = tuple(shape), patch, maps, dims, gain
        conv = CONVOLUTIONS[dims]
        channels = 1 if len(shape) == dims else shape[0]
        folded = channels * patch**dims
        self.embed = nn.Sequential(conv(2, embed, 1), nn.SiLU(), conv(embed, embed, 1), nn.SiLU())
        self.stem = conv(folded + 2 * maps * patch**dims, widths[0], 3, padding=1)
        stage = lambda w: nn.ModuleList(ResBlock(w, embed, dims) for _ in range(blocks))  # noqa: E731
        self.down = nn.ModuleList(stage(w) for w in widths)
        self.shrink = nn.ModuleList(conv(a, b, 3, stride=2, padding=1) for a, b in zip(widths, widths[1:]))
        self.up = nn.ModuleList(stage(w) for w in widths[-2::-1])
        self.grow = nn.ModuleList(conv(b, a, 1) for a, b in zip(widths[-2::-1], widths[:0:-1]))
        self.head = conv(widths[0], 2 * (1 + 2 * maps) * folded if gain else folded, 3, padding=1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        self.to(memory_format=LAYOUTS[dims])

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z (B, *S), c (B or 1, *S or ones) -> (B, *S)."""
        B, space = z.shape[0], self.shape[-self.dims :]
        pad = tuple(side for length in reversed(space) for side in (0, -length % self.patch))
        h, levels = _pad(z.reshape(B, -1, *space), pad, "constant"), level_features(self._mean_level(c))
        if self.maps:
            h = torch.cat([h, _pad(levels.expand(B, -1, *space), pad, "replicate")], dim=1)
        h = self.stem(fold(h.contiguous(memory_format=LAYOUTS[self.dims]), self.patch))
        e = self.embed(levels.mean(tuple(range(2, levels.ndim)), keepdim=True))
        skips = []
        for i, stage in enumerate(self.down):
            if i:
                h = self.shrink[i - 1](h)
            for block in stage:
                h = block(h, e)
            skips.append(h)
        for i, stage in enumerate(self.up):
            skip = skips[-2 - i]
            h = skip + F.interpolate(self.grow[i](h), size=skip.shape[2:], mode="nearest")
            for block in stage:
                h = block(h, e)
        h = unfold(self.head(F.silu(h)), self.patch)[(..., *(slice(length) for length in space))]
        if not self.gain:
            return h.reshape(z.shape)
        parts = h.to(z.dtype).unflatten(1, (2, 1 + 2 * self.maps, -1))
        both = parts[:, :, 0]
        for k in range(2 * self.maps):
            both = torch.addcmul(both, parts[:, :, 1 + k], levels[:, None, k : k + 1])
        return torch.addcmul(both[:, 0], both[:, 1], z.reshape(B, -1, *space)).reshape(z.shape)

    def _mean_level(self, c: Tensor) -> Tensor:
        """c with one channel and the axes of space: channels of one datum share the mean of their levels."""
        c = c.reshape(c.shape[0], -1, *c.shape[-self.dims :])
        return c if c.shape[1] == 1 else c.mean(1, keepdim=True)


def _pad(h: Tensor, pad: tuple[int, ...], mode: str) -> Tensor:
    """F.pad, without the copy that it makes where there is nothing to pad."""
    return F.pad(h, pad, mode=mode) if any(pad) else h


def fold(h: Tensor, patch: int) -> Tensor:
    """Blocks of patch entries along each axis of space become channels, (B, C, *space) -> (B, C patch^dims, *space / patch)."""
    if h.ndim == 4:
        return F.pixel_unshuffle(h, patch)
    if h.ndim == 3:
        return rearrange(h, "b c (l p) -> b (c p) l", p=patch)
    return rearrange(h, "b c (d p) (h q) (w r) -> b (c p q r) d h w", p=patch, q=patch, r=patch)


def unfold(h: Tensor, patch: int) -> Tensor:
    """The inverse of `fold`."""
    if h.ndim == 4:
        return F.pixel_shuffle(h, patch)
    if h.ndim == 3:
        return rearrange(h, "b (c p) l -> b c (l p)", p=patch)
    return rearrange(h, "b (c p q r) d h w -> b c (d p) (h q) (w r)", p=patch, q=patch, r=patch)


class MLP(nn.Module):
    """A residual multilayer perceptron for data of any shape, flattened.

    Args:
        shape: Shape S of a datum.
        width: Hidden features.
        blocks: Residual blocks.

    >>> MLP((5,))(torch.randn(3, 5), torch.ones(3, 1)).shape
    torch.Size([3, 5])
    """

    def __init__(self, shape: tuple[int, ...], width: int = 128, blocks: int = 3) -> None:
        super().__init__()
        d = math.prod(shape)
        self.shape = tuple(shape)
        self.stem = nn.Linear(3 * d, width)
        self.film = nn.ModuleList(nn.Linear(2 * d, 2 * width) for _ in range(blocks))
        self.first = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Linear(width, width) for _ in range(blocks))
        self.head = nn.Linear(width, d)
        for layer in [*self.second, self.head]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, z: Tensor, c: Tensor) -> Tensor:
        """z (B, *S), c (B or 1, *S or ones) -> (B, *S)."""
        levels = rearrange(level_features(c.expand(z.shape).unsqueeze(1)), "b f ... -> b (f ...)")
        h = self.stem(torch.cat([z.flatten(1), levels], dim=1))
        for film, first, second in zip(self.film, self.first, self.second):
            a, b = film(levels).chunk(2, dim=1)
            h = h + second(F.silu((1 + a) * first(F.silu(h)) + b))
        return self.head(F.silu(h)).reshape(z.shape)
