"""Every layer against torch itself."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import fluxion as fl

X = torch.randn(2, 4, 6, 6)
LINE = torch.randn(2, 4, 10)
CUBE = torch.randn(2, 4, 5, 5, 5)
ROWS = torch.randn(3, 8)

# Layer, the torch module that does the same, and an input. Weights are copied from one to the other.
SAME: list[tuple[nn.Module, nn.Module, Tensor]] = [
    (fl.Linear(8, 3), nn.Linear(8, 3), ROWS),
    (fl.Linear(8, 3, bias=False), nn.Linear(8, 3, bias=False), ROWS),
    (fl.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), LINE),
    (fl.Conv2d(4, 6, 3, padding="same", use_bias=False), nn.Conv2d(4, 6, 3, padding="same", bias=False), X),
    (
        fl.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, padding_mode="circular"),
        nn.Conv2d(4, 6, (3, 2), stride=2, padding=1, dilation=2, padding_mode="circular"),
        X,
    ),
    (fl.Conv3d(4, 2, 3, padding=1), nn.Conv3d(4, 2, 3, padding=1), CUBE),
    (
        fl.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
        nn.ConvTranspose1d(4, 6, 3, stride=2, output_padding=1),
        LINE,
    ),
    (
        fl.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, groups=2),
        X,
    ),
    (fl.ConvTranspose3d(4, 2, 2, use_bias=False), nn.ConvTranspose3d(4, 2, 2, bias=False), CUBE),
    (fl.Embedding(10, 4), nn.Embedding(10, 4), torch.tensor([[1, 2], [9, 0]])),
    (fl.Embedding(10, 4, padding_idx=0), nn.Embedding(10, 4, padding_idx=0), torch.tensor([0, 3])),
    (fl.LayerNorm(8), nn.LayerNorm(8), ROWS),
    (fl.LayerNorm([6, 6], eps=0.1), nn.LayerNorm([6, 6], eps=0.1), X),
    (fl.RMSNorm(8), nn.RMSNorm(8), ROWS),
    (fl.GroupNorm(4, 2), nn.GroupNorm(2, 4), X),
    (fl.BatchNorm1d(8), nn.BatchNorm1d(8), ROWS),
    (fl.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, momentum=None), X),
    (fl.InstanceNorm2d(4), nn.InstanceNorm2d(4), X),
    (fl.ReLU(), nn.ReLU(), X),
    (fl.SiLU(), nn.SiLU(), X),
    (fl.Sigmoid(), nn.Sigmoid(), X),
    (fl.Tanh(), nn.Tanh(), X),
    (fl.GeLU(), nn.GELU(), X),
    (fl.GeLU(fl.GeLUApproximation.TANH), nn.GELU(approximate="tanh"), X),
    (fl.Softmax(), nn.Softmax(dim=-1), X),
    (fl.Softmax(dim=1), nn.Softmax(dim=1), X),
    (fl.MaxPool1d(3, stride=2), nn.MaxPool1d(3, stride=2), LINE),
    (fl.MaxPool2d(2, padding=1), nn.MaxPool2d(2, padding=1), X),
    (fl.AvgPool2d(2), nn.AvgPool2d(2), X),
    (fl.AdaptiveAvgPool2d((2, 3)), nn.AdaptiveAvgPool2d((2, 3)), X),
    (fl.ReflectionPad2d(2), nn.ReflectionPad2d(2), X),
    (fl.ZeroPad2d((0, 1, 2, 3)), nn.ZeroPad2d((0, 1, 2, 3)), X),
    (fl.PixelShuffle(2), nn.PixelShuffle(2), X),
    (fl.PixelUnshuffle(2), nn.PixelUnshuffle(2), X),
    (fl.Identity(), nn.Identity(), X),
    (fl.Flatten(1, 2), nn.Flatten(1, 2), X),
    (fl.Dropout(0.5).eval(), nn.Dropout(0.5).eval(), X),
]


@pytest.mark.parametrize("ours, theirs, x", SAME, ids=[f"{type(row[0]).__name__}-{i}" for i, row in enumerate(SAME)])
def test_same_as_the_module_of_torch(ours: nn.Module, theirs: nn.Module, x: Tensor) -> None:
    assert isinstance(ours, fl.Module)
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(x), theirs(x))
    assert isinstance(ours, fl.WeightedModule) == bool(theirs.state_dict())


# Layer and the function that does the same.
FUNCTIONS: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [
    (fl.GeLU(fl.GeLUApproximation.SIGMOID), lambda x: x * torch.sigmoid(1.702 * x)),
    (fl.GLU(fl.SiLU()), lambda x: x[..., :3] * functional.silu(x[..., 3:])),
    (fl.Reshape(2, 72), lambda x: x.reshape(2, 2, 72)),
    (fl.Transpose(1, -1), lambda x: x.transpose(1, 3)),
    (fl.Permute(0, 2, 3, 1), lambda x: x.permute(0, 2, 3, 1)),
    (fl.Slicing(dim=1, start=1), lambda x: x[:, 1:]),
    (fl.Slicing(dim=-1, start=-4, end=-1, step=2), lambda x: x[..., -4:-1:2]),
    (fl.Slicing(end=1), lambda x: x[:1]),
    (fl.Unsqueeze(1), lambda x: x.unsqueeze(1)),
    (fl.Chain(fl.Unsqueeze(-1), fl.Squeeze(-1)), lambda x: x),
    (fl.Multiply(2.0, 1.0), lambda x: 2 * x + 1),
    (fl.Sin(), torch.sin),
    (fl.Cos(), torch.cos),
    (fl.Lambda(torch.abs), torch.abs),
]


@pytest.mark.parametrize(
    "layer, function", FUNCTIONS, ids=[f"{type(row[0]).__name__}-{i}" for i, row in enumerate(FUNCTIONS)]
)
def test_same_as_the_function_of_torch(layer: nn.Module, function: Callable[[Tensor], Tensor]) -> None:
    assert torch.equal(layer(X), function(X))


def test_layers_of_several_inputs() -> None:
    assert fl.GetArg(1)(X, LINE) is LINE
    assert torch.equal(fl.Unflatten(1)(X, torch.Size((2, 2))), X.unflatten(1, (2, 2)))
    assert torch.equal(fl.Interpolate()(X, (12, 3)), functional.interpolate(X, size=(12, 3)))
    smooth = fl.Interpolate("bilinear", antialias=True)(X, torch.Size((3, 3)))
    assert torch.equal(smooth, functional.interpolate(X, size=(3, 3), mode="bilinear", antialias=True))


def test_layer_norm_2d_normalises_channels() -> None:
    layer = fl.LayerNorm2d(4)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    expected = functional.layer_norm(X.movedim(1, -1), (4,), layer.weight, layer.bias, eps=1e-6).movedim(-1, 1)
    torch.testing.assert_close(layer(X), expected)


def test_parameter() -> None:
    layer = fl.Parameter(3, 5)
    assert torch.equal(layer(X), layer.weight.expand(2, 3, 5))
    assert layer.requires_grad
    layer.requires_grad = False
    assert not layer.weight.requires_grad
    assert not fl.Parameter(1, requires_grad=False).requires_grad


def test_dropout() -> None:
    assert (fl.Dropout(1.0)(X) == 0).all()
    assert str(fl.Dropout(0.1)) == "Dropout(probability=0.1)"


def test_glu_of_an_odd_dimension() -> None:
    with pytest.raises(fl.ChainValueError, match="which is 3 here"):
        fl.GLU(fl.ReLU())(torch.ones(1, 3))


def test_multi_linear() -> None:
    layer = fl.MultiLinear(8, 2, inner_dim=5, num_layers=3)
    assert [type(child) for child in layer] == [fl.Linear, fl.ReLU, fl.Linear, fl.ReLU, fl.Linear]
    assert torch.equal(layer(ROWS), nn.Sequential(*layer)(ROWS))
    assert layer(ROWS).shape == (3, 2)


def test_converter() -> None:
    chain = fl.Chain(fl.Converter(), fl.Linear(8, 2, dtype=torch.float64))
    assert chain(ROWS).dtype == torch.float64
    keep = fl.Chain(
        fl.Converter(set_dtype=False), fl.Parallel(fl.Identity()), fl.GetArg(0), fl.Passthrough(fl.Linear(8, 2))
    )
    assert keep(ROWS).dtype == torch.float32
    with pytest.raises(fl.ChainValueError, match="no parameter to take"):
        fl.Chain(fl.Converter())(ROWS)


# Attention


def formula(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool) -> Tensor:
    out = []
    for q_head, k_head, v_head in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        scores = q_head @ k_head.mT / q_head.shape[-1] ** 0.5
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), -torch.inf)
        out.append(scores.softmax(-1) @ v_head)
    return torch.cat(out, -1)


@pytest.mark.parametrize("slice_size", [None, 1, 2, 100])
@pytest.mark.parametrize("optimized", [True, False])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [1, 2])
def test_scaled_dot_product_attention(heads: int, causal: bool, optimized: bool, slice_size: int | None) -> None:
    q, k, v = torch.randn(3, 2, 5, 8)
    layer = fl.ScaledDotProductAttention(heads, is_causal=causal, is_optimized=optimized, slice_size=slice_size)
    torch.testing.assert_close(layer(q, k, v), formula(q, k, v, heads, causal))


def test_attention_of_wrong_widths() -> None:
    with pytest.raises(fl.ChainValueError, match="a multiple of 3"):
        fl.ScaledDotProductAttention(3)(*torch.randn(3, 2, 5, 8))
    with pytest.raises(fl.ChainValueError, match="not a multiple of num_heads=3"):
        fl.Attention(8, num_heads=3)


def peer_of(layer: fl.Attention) -> nn.MultiheadAttention:
    """torch's own attention with the same weights."""
    peer = nn.MultiheadAttention(layer.embedding_dim, layer.num_heads, batch_first=True)
    q, k, v = layer.Distribute
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
        peer.in_proj_bias.copy_(torch.cat([q.bias, k.bias, v.bias]))
        peer.out_proj.load_state_dict(layer.Linear.state_dict())
    return peer


def test_attention_is_the_one_of_torch() -> None:
    layer = fl.Attention(8, num_heads=2)
    q, k, v = torch.randn(2, 5, 8), torch.randn(2, 7, 8), torch.randn(2, 7, 8)
    torch.testing.assert_close(layer(q, k, v), peer_of(layer)(q, k, v)[0])


def test_self_attention_is_the_one_of_torch() -> None:
    layer = fl.SelfAttention(8, num_heads=2, is_causal=True)
    x = torch.randn(2, 5, 8)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    torch.testing.assert_close(layer(x), peer_of(layer)(x, x, x, attn_mask=mask)[0])


def test_attention_between_widths() -> None:
    layer = fl.Attention(8, num_heads=2, key_embedding_dim=3, value_embedding_dim=4, inner_dim=6, use_bias=False)
    out = layer(torch.randn(2, 5, 8), torch.randn(2, 7, 3), torch.randn(2, 7, 4))
    assert out.shape == (2, 5, 8)
    assert [name for name, _ in layer.Distribute.named_parameters()] == [
        "Linear_1.weight",
        "Linear_2.weight",
        "Linear_3.weight",
    ]


def test_self_attention_2d() -> None:
    layer = fl.SelfAttention2d(4, num_heads=2)
    pixels = X.flatten(2).mT
    expected = peer_of(layer)(pixels, pixels, pixels)[0].mT.reshape(X.shape)
    torch.testing.assert_close(layer(X), expected)
    torch.testing.assert_close(layer(X[..., :3]).shape, X[..., :3].shape)


# Sampling


@pytest.mark.parametrize("padding, size", [(0, 3), (1, 3)])
def test_downsample(padding: int, size: int) -> None:
    layer = fl.Downsample(4, scale_factor=2, padding=padding, register_shape=False)
    padded = functional.pad(X, (0, 1, 0, 1)) if padding == 0 else functional.pad(X, (1, 1, 1, 1))
    conv = layer.ensure_find(fl.Conv2d)
    torch.testing.assert_close(layer(X), functional.conv2d(padded, conv.weight, conv.bias, stride=2))
    assert layer(X).shape == (2, 4, size, size)


def test_upsample_by_a_factor() -> None:
    layer = fl.Upsample(4, upsample_factor=3)
    wide = functional.interpolate(X, scale_factor=3)
    torch.testing.assert_close(layer(X), layer.ensure_find(fl.Conv2d)(wide))


def test_upsample_to_the_size_before_the_downsample() -> None:
    class Both(fl.Chain):
        def init_context(self) -> fl.Contexts:
            return {"sampling": {"shapes": []}}

    chain = Both(fl.Downsample(4, 2), fl.Downsample(4, 2), fl.Upsample(4), fl.Upsample(4))
    for height, width in ((7, 9), (8, 5)):
        assert chain(torch.randn(1, 4, height, width)).shape == (1, 4, height, width)


# All of them


ALL = [*(row[0] for row in SAME), *(row[0] for row in FUNCTIONS)]


@pytest.mark.parametrize("layer", ALL, ids=lambda layer: type(layer).__name__)
def test_every_layer_prints_on_one_line_per_node(layer: fl.Module) -> None:
    lines = repr(layer).splitlines()
    assert len(lines) == len(list(layer.modules()))
    assert lines[0].startswith(("(CHAIN)", type(layer).__name__ + "("))


def test_device_and_dtype_reach_every_weight() -> None:
    kind = {"device": "meta", "dtype": torch.float16}
    layers = [
        fl.Linear(1, 1, **kind),
        fl.MultiLinear(1, 1, 1, 2, **kind),
        fl.Conv1d(1, 1, 1, **kind),
        fl.Conv2d(1, 1, 1, **kind),
        fl.Conv3d(1, 1, 1, **kind),
        fl.ConvTranspose1d(1, 1, 1, **kind),
        fl.ConvTranspose2d(1, 1, 1, **kind),
        fl.ConvTranspose3d(1, 1, 1, **kind),
        fl.Embedding(1, 1, **kind),
        fl.LayerNorm(1, **kind),
        fl.RMSNorm(1, **kind),
        fl.GroupNorm(1, 1, **kind),
        fl.LayerNorm2d(1, **kind),
        fl.BatchNorm1d(1, **kind),
        fl.BatchNorm2d(1, **kind),
        fl.Parameter(1, **kind),
        fl.Attention(1, **kind),
        fl.SelfAttention(1, **kind),
        fl.SelfAttention2d(1, **kind),
        fl.Downsample(1, 2, **kind),
        fl.Upsample(1, 2, **kind),
    ]
    for layer in layers:
        assert {(str(p.device), p.dtype) for p in layer.parameters()} == {("meta", torch.float16)}, layer
        assert (str(layer.device), layer.dtype) == ("meta", torch.float16), layer
    assert fl.Chain(fl.ReLU()).device is None
    assert fl.Chain(fl.ReLU()).dtype is None
