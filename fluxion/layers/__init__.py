"""Layers, and every other public name of the tree and its combinators."""

from fluxion.chain import Chain
from fluxion.combinators import Concatenate, Distribute, Matmul, Parallel, Passthrough, Residual, Sum
from fluxion.context import Context, ContextProvider, Contexts
from fluxion.copying import structural_copy
from fluxion.errors import ChainError, ChainTypeError, ChainValueError, ChildNotFoundError, ContextError
from fluxion.layers.activations import (
    GLU,
    Activation,
    GeLU,
    GeLUApproximation,
    ReLU,
    Sigmoid,
    SiLU,
    Softmax,
    Tanh,
)
from fluxion.layers.attention import Attention, ScaledDotProductAttention, SelfAttention, SelfAttention2d
from fluxion.layers.basics import (
    Cos,
    Dropout,
    Flatten,
    GetArg,
    Identity,
    Multiply,
    Parameter,
    Permute,
    Reshape,
    Sin,
    Slicing,
    Squeeze,
    Transpose,
    Unflatten,
    Unsqueeze,
)
from fluxion.layers.conv import Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d
from fluxion.layers.converter import Converter
from fluxion.layers.embedding import Embedding
from fluxion.layers.linear import Linear, MultiLinear
from fluxion.layers.norm import (
    BatchNorm1d,
    BatchNorm2d,
    GroupNorm,
    InstanceNorm2d,
    LayerNorm,
    LayerNorm2d,
    RMSNorm,
)
from fluxion.layers.padding import PixelShuffle, PixelUnshuffle, ReflectionPad2d, ZeroPad2d
from fluxion.layers.pooling import AdaptiveAvgPool2d, AvgPool2d, MaxPool1d, MaxPool2d
from fluxion.layers.sampling import Downsample, Interpolate, Upsample
from fluxion.leaves import Lambda, SetContext, UseContext
from fluxion.links import ContextModule
from fluxion.module import Module, WeightedModule
from fluxion.walk import walk

__all__ = [
    "GLU",
    "Activation",
    "AdaptiveAvgPool2d",
    "Attention",
    "AvgPool2d",
    "BatchNorm1d",
    "BatchNorm2d",
    "Chain",
    "ChainError",
    "ChainTypeError",
    "ChainValueError",
    "ChildNotFoundError",
    "Concatenate",
    "Context",
    "ContextError",
    "ContextModule",
    "ContextProvider",
    "Contexts",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Converter",
    "Cos",
    "Distribute",
    "Downsample",
    "Dropout",
    "Embedding",
    "Flatten",
    "GeLU",
    "GeLUApproximation",
    "GetArg",
    "GroupNorm",
    "Identity",
    "InstanceNorm2d",
    "Interpolate",
    "Lambda",
    "LayerNorm",
    "LayerNorm2d",
    "Linear",
    "Matmul",
    "MaxPool1d",
    "MaxPool2d",
    "Module",
    "MultiLinear",
    "Multiply",
    "Parallel",
    "Parameter",
    "Passthrough",
    "Permute",
    "PixelShuffle",
    "PixelUnshuffle",
    "RMSNorm",
    "ReLU",
    "ReflectionPad2d",
    "Reshape",
    "Residual",
    "ScaledDotProductAttention",
    "SelfAttention",
    "SelfAttention2d",
    "SetContext",
    "SiLU",
    "Sigmoid",
    "Sin",
    "Slicing",
    "Softmax",
    "Squeeze",
    "Sum",
    "Tanh",
    "Transpose",
    "Unflatten",
    "Unsqueeze",
    "Upsample",
    "UseContext",
    "WeightedModule",
    "ZeroPad2d",
    "structural_copy",
    "walk",
]
