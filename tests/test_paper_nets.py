"""Tables 1 and 3: parameter counts from the tables' numbers alone, output shapes and resolutions, spectral normalisation."""

import pytest
import torch
from torch import nn

from emdiff.paper_nets import RSU, TABLE1, TABLE3, Bottleneck, Decoder, Encoder, U2Net, resolutions, spectrally_normalised

# Table 1, row by row: height, in (None: the input's), mid, out; then the side maps.
ROWS = [(6, None, 64, 64), (5, 64, 128, 128), (4, 128, 128, 256), (3, 256, 256, 512), (3, 512, 256, 512),
        (3, 1024, 128, 256), (3, 512, 128, 128), (5, 256, 128, 64), (6, 128, 64, 64)]  # fmt: skip
SIDES = [512, 256, 128, 64, 64]


def count(net):
    return sum(p.numel() for p in net.parameters())


def conv(a, b, k=3):
    return k * k * a * b + b


def table1(channels, f=1):
    """Parameters of the whole network: each row has convolutions in -> out, out -> mid, mid -> mid down to its height, and back with skips."""
    total = 0
    for height, inp, mid, out in ROWS:
        inp, mid, out = (channels if inp is None else f * inp), f * mid, f * out
        total += conv(inp, out) + conv(out, mid) + conv(2 * mid, out) + (height - 2) * (conv(mid, mid) + conv(2 * mid, mid)) + conv(mid, mid)
    return total + sum(conv(f * s, channels) for s in SIDES) + conv(5 * channels, channels, 1)


@pytest.mark.parametrize("channels,f", [(16, 1), (24, 2)])
def test_u2net_has_the_parameters_of_table_1(channels, f):
    """MNIST 1 x 16 (one channel, 16 measurements) and CIFAR-10 1 x 8 (24 channels) with width factor 2, built without memory."""
    with torch.device("meta"):
        assert count(U2Net((channels, 28, 28), width=f)) == table1(channels, f)


def test_table_1_is_written_as_printed():
    assert [(h, i or None, m, o) for h, i, m, o in TABLE1["down"] + TABLE1["up"]] == ROWS


def test_u2net_halves_as_often_as_its_table_says():
    """28, 14, 7, 4, 2 at the five stages; within a stage of height h the input is halved h - 2 times, rounded up."""
    net, seen = U2Net((1, 28, 28), width=1 / 32), {}
    for name, layer in net.named_modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda m, i, o, name=name: seen.__setitem__(name, o.shape[-1]))
    net(torch.zeros(1, 1, 28, 28), torch.zeros(1))
    assert [seen[f"down.{i}.first"] for i in range(5)] == [28, 14, 7, 4, 2]
    assert [seen[f"up.{i}.first"] for i in range(4)] == [4, 7, 14, 28]
    assert [seen[f"down.0.down.{i}"] for i in range(5)] == [28, 14, 7, 4, 2] and seen["down.0.bottom"] == 2
    assert [seen[f"down.1.down.{i}"] for i in range(4)] == [14, 7, 4, 2] and seen["down.4.bottom"] == 1


@pytest.mark.parametrize("shape", [(28, 28), (3, 32, 32), (4, 1, 28, 28), (2, 3, 17, 23)])
def test_outputs_have_the_shape_of_inputs(shape):
    z = torch.randn(2, *shape)
    assert U2Net(shape, width=1 / 32)(z, torch.zeros(1)).shape == z.shape
    assert U2Net(shape, width=0.043)(z, torch.zeros(1)).shape == z.shape, "widths that round unevenly"
    shown = U2Net(shape, width=1 / 32, levels=True)
    assert not torch.equal(shown(z, torch.zeros(1)), shown(z, torch.ones(1)))


def bottleneck(inp, n, k):
    """Parameters of a block: 1, k, k, 1 kernels of widths n, n/4, n/4, n; and the projection where the width falls."""
    return conv(n, n // 4, 1) + 2 * conv(n // 4, n // 4, k) + conv(n // 4, n, 1) + (conv(inp, n, 1) if inp > n else 0)


def test_the_encoder_has_the_parameters_and_resolutions_of_table_3():
    rows = [(28, 128, 2), (14, 256, 2), (7, 512, 2), (4, 1024, 2), (2, 1024, 2), (1, 1024, 1)]
    expected, inp = conv(4, 128, 1) + 1024 * 30 + 30, 128
    for side, width, blocks in rows:
        for _ in range(blocks):
            expected, inp = expected + bottleneck(inp, width, 3 if side >= 3 else 1), width
    with torch.device("meta"):
        encoder = Encoder(4, (28, 28), 30)
    assert count(encoder) == expected and resolutions(28, 6) == [row[0] for row in rows]
    assert (tuple(r[1] for r in rows), tuple(r[2] for r in rows)) == TABLE3


def test_the_decoder_is_the_encoder_in_reverse():
    rows = [(1, 1024, 1), (2, 1024, 2), (4, 1024, 2), (7, 512, 2), (14, 256, 2), (28, 128, 2)]
    expected, inp = 30 * 1024 + 1024 + conv(128, 4, 1), 1024
    for side, width, blocks in rows:
        for _ in range(blocks):
            expected, inp = expected + bottleneck(inp, width, 3 if side >= 3 else 1), width
    with torch.device("meta"):
        decoder = Decoder(30, (28, 28), 4)
    assert count(decoder) == expected and [s[0] for s in decoder.sizes] == [row[0] for row in rows]
    assert Decoder(5, (28, 23), 3, widths=(8, 8))(torch.randn(2, 5)).shape == (2, 3, 28, 23)


def test_a_new_block_is_its_skip():
    h = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(Bottleneck(8, 8, 7)(h), h)
    wider = Bottleneck(8, 12, 7)(h)
    torch.testing.assert_close(wider[:, :8], h)
    assert not wider[:, 8:].any()


def test_spectral_normalisation_holds_every_layer_to_norm_one():
    """Layers that start at 0 are drawn anew: dividing by their norm would give NaN."""
    torch.manual_seed(0)
    net = spectrally_normalised(Encoder(2, (7, 7), 3, widths=(8, 16), blocks=(1, 1)))
    x = torch.randn(2, 2, 7, 7)
    for _ in range(50):
        out = net(x)
    layers = [m for m in net.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    norms = [float(torch.linalg.matrix_norm(m.weight.detach().flatten(1), 2)) for m in layers]
    assert bool(out.isfinite().all()) and len(layers) == 10 and norms == pytest.approx([1.0] * 10, rel=1e-2)


def test_a_stage_is_h_and_a_u_of_h():
    """Height 3, written out: an activation after every convolution, the first of a resolution after pooling, skips beside what comes up."""
    torch.manual_seed(0)
    stage, x, silu = RSU(3, 2, 3, 5), torch.randn(2, 2, 9, 9), lambda a: a * torch.sigmoid(a)
    h = silu(stage.first(x))
    fine = silu(stage.down[0](h))
    coarse = silu(stage.down[1](nn.functional.max_pool2d(fine, 2, ceil_mode=True)))
    up = silu(stage.up[1](torch.cat([silu(stage.bottom(coarse)), coarse], 1)))
    up = nn.functional.interpolate(up, size=(9, 9), mode="bilinear", align_corners=False)
    torch.testing.assert_close(stage(x), h + silu(stage.up[0](torch.cat([up, fine], 1))))
