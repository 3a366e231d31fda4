"""The U-Net: shapes, initial values, and blocks compared with plain formulas (golden values: test_golden.py)."""

import math

import pytest
import torch
from torch import Tensor, nn

from diffusion.nets.activation import Activation
from diffusion.nets.plain import doubled, halved
from diffusion.nets.unet import AttentionBlock, Downsample, ResBlock, UNet, Upsample, timestep_embedding

SMALL = {
    "image_size": 16,
    "channels": 32,
    "channel_mult": (1, 2),
    "res_blocks": 1,
    "attention_resolutions": (8,),
    "head_channels": 16,
}


def unet(**changes: object) -> UNet:
    """A small net in evaluation mode, initialised from seed 0."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet(**SMALL | changes).eval()


def randomised(module: nn.Module) -> nn.Module:
    """The module with normal parameters: with zeroed layers, the output does not depend on the layers before them."""
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=random) * 0.05)
    return module


def images(batch: int, size: int, channels: int = 3) -> Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(2))


VARIANTS = [
    {},
    {"image_size": 32},
    {"image_size": 48, "attention_resolutions": (24,)},
    {"image_size": 12, "channel_mult": (1, 1, 2), "attention_resolutions": (6, 3)},
    {"attention_resolutions": (16, 8)},
    {"attention_resolutions": ()},
    {"channel_mult": (2,), "attention_resolutions": ()},
    {"res_blocks": 3},
    {"scale_shift_norm": False},
    {"resblock_updown": False},
    {"head_channels": 64},
    {"dropout": 0.5},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_output_starts_at_zero_and_has_the_image_shape(changes):
    net = unet(**changes)
    x = images(2, changes.get("image_size", 16))
    y = net(x, torch.tensor([3, 871]))
    assert y.shape == (2, 6, *x.shape[2:])
    assert (y == 0).all()
    y = randomised(net)(x, torch.tensor([3, 871]))
    assert y.isfinite().all() and (y.std((1, 2, 3)) > 0).all()


@torch.no_grad()
def test_fixed_variance_has_three_channels():
    assert unet(learn_sigma=False)(images(2, 16), torch.tensor([0, 1])).shape == (2, 3, 16, 16)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
@torch.no_grad()
def test_images_of_a_batch_are_independent(changes):
    net = randomised(unet(**changes))
    x, t, order = (
        images(3, changes.get("image_size", 16)),
        torch.tensor([0, 500, 999]),
        torch.tensor([2, 0, 1]),
    )
    y = net(x, t)
    torch.testing.assert_close(net(x[order], t[order]), y[order], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(net(x[1:2], t[1:2]), y[1:2], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale_shift_norm", [True, False])
@torch.no_grad()
def test_output_depends_on_the_timestep(scale_shift_norm):
    net, x = randomised(unet(scale_shift_norm=scale_shift_norm)), images(1, 16)
    ys = torch.cat([net(x, torch.tensor([t])) for t in (0, 1, 500, 999)])
    differences = (ys[:, None] - ys[None]).abs().amax((2, 3, 4))
    assert (differences + torch.eye(4) > 1e-4).all()


def test_every_parameter_has_a_gradient():
    net = randomised(unet(attention_resolutions=(16, 8)))
    net(images(2, 16), torch.tensor([3, 871])).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_initial_blocks_equal_their_skip_connections():
    net = unet(attention_resolutions=(16, 8))
    weights = ((name, p) for name, p in net.named_parameters() if name.endswith("weight"))
    zero = {name for name, weight in weights if not weight.any()}
    blocks = {name: module for name, module in net.named_modules() if isinstance(module, ResBlock | AttentionBlock)}
    expected = {
        f"{name}.out_layers.3.weight" if isinstance(block, ResBlock) else f"{name}.proj_out.weight"
        for name, block in blocks.items()
    }
    assert zero == expected | {"out.2.weight"}


def output(block: ResBlock, x: Tensor, embedding: Tensor) -> Tensor:
    return block(block.emb_layers(embedding), Activation(x)).values


@pytest.mark.parametrize("scale_shift_norm", [True, False])
@torch.no_grad()
def test_initial_residual_blocks_only_resample(scale_shift_norm):
    x, embedding = images(2, 8, 32), torch.randn(2, 128, generator=torch.Generator().manual_seed(3))

    def start(resample: str) -> Tensor:
        return output(ResBlock(32, 32, 128, 0.0, scale_shift_norm, resample), x, embedding)

    torch.testing.assert_close(start(""), x, rtol=0, atol=0)
    pooled = x.view(2, 32, 4, 2, 4, 2).mean((3, 5))
    torch.testing.assert_close(start("halved"), pooled)
    torch.testing.assert_close(start("doubled"), x.repeat_interleave(2, 2).repeat_interleave(2, 3))


def normalised(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Group norm of [B, C, H, W], computed group by group."""
    groups = x.view(len(x), norm.num_groups, -1)
    centred = groups - groups.mean(2, keepdim=True)
    whitened = (centred / (centred.square().mean(2, keepdim=True) + 1e-5).sqrt()).view_as(x)
    return whitened * norm.weight.view(-1, 1, 1) + norm.bias.view(-1, 1, 1)


@torch.no_grad()
def test_timestep_scales_and_shifts_the_second_norm():
    block = randomised(ResBlock(32, 64, 128, 0.0, True)).double().eval()
    x = images(2, 4, 32).double()
    embedding = torch.randn(2, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    h = block.in_layers[2](nn.functional.silu(normalised(x, block.in_layers[0])))
    scale, shift = block.emb_layers[1](nn.functional.silu(embedding))[:, :, None, None].split(64, dim=1)
    h = block.out_layers[3](nn.functional.silu(normalised(h, block.out_layers[0]) * (1 + scale) + shift))
    torch.testing.assert_close(output(block, x, embedding), block.skip_connection(x) + h)


@torch.no_grad()
def test_timestep_is_added_before_the_second_norm():
    block = randomised(ResBlock(32, 32, 128, 0.0, False)).double().eval()
    x = images(2, 4, 32).double()
    embedding = torch.randn(2, 128, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    h = block.in_layers[2](nn.functional.silu(normalised(x, block.in_layers[0])))
    h = h + block.emb_layers[1](nn.functional.silu(embedding))[:, :, None, None]
    h = block.out_layers[3](nn.functional.silu(normalised(h, block.out_layers[0])))
    torch.testing.assert_close(output(block, x, embedding), x + h)


@pytest.mark.parametrize("heads", [1, 4])
@torch.no_grad()
def test_attention_is_a_softmax_over_pixels(heads):
    block = randomised(AttentionBlock(64, heads)).double()
    block.qkv.weight.mul_(20)  # otherwise the attention weights are almost uniform
    x = images(2, 4, 64).double()
    qkv = torch.einsum("oc,bchw->bohw", block.qkv.weight[:, :, 0], normalised(x, block.norm))
    qkv = (qkv + block.qkv.bias.view(-1, 1, 1)).flatten(2)
    attended, width = torch.zeros(2, 64, 16, dtype=torch.float64), 64 // heads
    for head in range(heads):
        # Channels of qkv are ordered by head, then q, k, v.
        q, k, v = qkv[:, 3 * width * head : 3 * width * (head + 1)].split(width, dim=1)
        for image in range(2):
            for pixel in range(16):
                score = (q[image, :, pixel, None] * k[image]).sum(0) / math.sqrt(width)
                weight = score.exp() / score.exp().sum()
                attended[image, width * head : width * (head + 1), pixel] = (v[image] * weight).sum(1)
    projected = torch.einsum("oc,bcn->bon", block.proj_out.weight[:, :, 0], attended) + block.proj_out.bias[:, None]
    torch.testing.assert_close(block(Activation(x)).values, x + projected.view_as(x))


def legacy_attention(block: AttentionBlock, x: Tensor, heads: int) -> Tensor:
    """The attention of guided-diffusion with `use_new_attention_order` false, for images x [B, C, H, W]."""
    qkv = torch.einsum("oc,bchw->bohw", block.qkv.weight[:, :, 0], normalised(x, block.norm)).flatten(2)
    # Rows of qkv: head, then q, k or v, then channel.
    q, k, v = (qkv + block.qkv.bias[:, None]).view(len(x), heads, 3, -1, x[0, 0].numel()).unbind(2)
    weight = (torch.einsum("bhct,bhcs->bhts", q, k) / math.sqrt(q.shape[2])).softmax(3)
    attended = torch.einsum("bhts,bhcs->bhct", weight, v).flatten(1, 2)
    projected = torch.einsum("oc,bcn->bon", block.proj_out.weight[:, :, 0], attended) + block.proj_out.bias[:, None]
    return x + projected.view_as(x)


@pytest.mark.parametrize(
    ("setting", "heads"),
    [
        ({"heads": 1}, {32: 1, 64: 1, 128: 1}),
        ({"heads": 2}, {32: 2, 64: 2, 128: 2}),
        ({"heads": 8, "head_channels": 32}, {32: 8, 64: 8, 128: 8}),
        ({"head_channels": 32}, {32: 1, 64: 2, 128: 4}),
        ({"head_channels": 16}, {32: 2, 64: 4, 128: 8}),
    ],
    ids=str,
)
@torch.no_grad()
def test_attention_of_every_level_has_the_given_heads(setting, heads):
    net = randomised(unet(channel_mult=(1, 2, 4), attention_resolutions=(16, 8), **setting)).double()
    widths = []

    def compare(block: AttentionBlock, arguments: tuple[Activation], output: Activation) -> None:
        widths.append((x := arguments[0].values).shape[1])
        torch.testing.assert_close(output.values, legacy_attention(block, x, heads[x.shape[1]]))

    for module in net.modules():
        if isinstance(module, AttentionBlock):
            module.qkv.weight.mul_(20)  # otherwise the attention weights are almost uniform
            module.register_forward_hook(compare)
    net(images(2, 16).double(), torch.tensor([3, 871]))
    assert widths == [32, 64, 128, 64, 64, 32, 32]


def test_attention_is_at_the_given_resolutions():
    net = unet(image_size=32, channel_mult=(1, 1, 2), res_blocks=2, attention_resolutions=(16,), head_channels=32)
    attended = {name for name, module in net.named_modules() if isinstance(module, AttentionBlock)}
    # Input blocks 4 and 5 and output blocks 3 to 5 have 16 x 16 pixels.
    blocks = {f"input_blocks.{i}.1" for i in (4, 5)} | {f"output_blocks.{i}.1" for i in (3, 4, 5)}
    assert attended == blocks | {"middle_block.1"}
    assert {net.get_submodule(name).heads for name in blocks} == {1}
    assert net.middle_block[1].heads == 2


def test_convolutional_resampling_has_the_published_names():
    keys = set(unet(resblock_updown=False).state_dict())
    assert {"input_blocks.2.0.op.weight", "input_blocks.2.0.op.bias"} <= keys
    assert {"output_blocks.1.2.conv.weight", "output_blocks.1.2.conv.bias"} <= keys


@torch.no_grad()
def test_convolutional_resampling_halves_and_doubles():
    down, up, x = Downsample(32), Upsample(32), images(1, 8, 32)
    # A convolution of stride 2 gives the even positions of the same convolution with stride 1.
    everywhere = nn.functional.conv2d(x, down.op.weight, down.op.bias, padding=1)
    torch.testing.assert_close(down(Activation(x)).values, everywhere[:, :, ::2, ::2], rtol=1e-4, atol=1e-5)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    expected = nn.functional.conv2d(repeated, up.conv.weight, up.conv.bias, padding=1)
    torch.testing.assert_close(up(Activation(x)).values, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_dropout_is_active_only_in_training():
    net, x, t = randomised(unet(dropout=0.5)), images(1, 16), torch.tensor([5])
    torch.testing.assert_close(net(x, t), net(x, t), rtol=0, atol=0)
    net.train()
    assert not torch.equal(net(x, t), net(x, t))


def test_timestep_embedding_is_cosines_then_sines():
    t = torch.tensor([0, 1, 999])
    expected = [[f(step * 10_000 ** (-i / 16)) for f in (math.cos, math.sin) for i in range(16)] for step in t.tolist()]
    actual = timestep_embedding(t, 32)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, torch.tensor(expected), rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("ours", "theirs"), [(halved, nn.AvgPool2d(2)), (doubled, nn.Upsample(scale_factor=2))], ids=["halved", "doubled"]
)
def test_resampling_has_the_values_and_gradients_of_torch(ours, theirs):
    x = images(2, 4, 5).double().requires_grad_()
    y, expected = ours(x), theirs(x)
    g = torch.randn(y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(torch.autograd.grad(y, x, g), torch.autograd.grad(expected, x, g))
