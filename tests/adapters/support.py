"""Which methods adapt which kinds of layers, by the names that `test_methods.py` gives to both.

It tries every pair that is here, and shows that the methods refuse the others.
"""

from __future__ import annotations

LINEARS = {"linear", "linear without bias", "linear subclass", "transformers conv1d", "weight norm", "orthogonal"}
CONVOLUTIONS = {
    *("conv1d", "conv2d", "conv2d same", "depthwise conv2d", "conv3d", "old weight norm"),
    *("transposed conv1d", "transposed conv2d", "transposed conv3d"),
}
LOOKUPS = {"embedding", "embedding with padding", "embedding with max_norm", "scaled embedding"}
EMBEDDINGS = {*LOOKUPS, "weight read by the model"}
ATTENTION = {
    *("attention", "attention by name", "attention, sequence first", "attention with masks"),
    *("attention, own key size", "bare parameter", "encoder layer", "encoder layer, norm first"),
}
NORMS = {
    *("layer normalisation", "group normalisation", "batch normalisation", "instance normalisation"),
    "root mean square normalisation",
}
MATRICES = LINEARS | CONVOLUTIONS | ATTENTION
LAYERS = MATRICES | EMBEDDINGS | {"experts"}
# Those with even numbers of inputs and outputs, which methods of square blocks of two divide.
EVEN = ATTENTION | {"conv1d", "conv3d", "transposed conv1d", "transposed conv2d", "orthogonal"}
# Those with inputs, times the size of a kernel, that blocks of two divide.
ROTATED = (MATRICES | LOOKUPS) - {"conv2d same", "depthwise conv2d"}
# Those with no bias, as an option of the layer or because it is another parameter.
UNBIASED = {"linear without bias", "attention, own key size", "bare parameter", "root mean square normalisation"}
# Those that are no layer without children.
UNCALLED = {"weight norm", "orthogonal", "bare parameter"}

# Where the variants of a method are tried, but for the first, which is tried everywhere.
MAIN = {"linear", "depthwise conv2d", "conv2d", "embedding", "experts", "attention"}

ROWS: list[tuple[set[str], tuple[str, ...]]] = [
    (LAYERS, ("lora", "dora", "adalora", "hira", "fourierft", "gralora", "shira")),
    (LAYERS | NORMS, ("copy", "full")),
    (MATRICES, ("loha", "doha", "lokr", "dokr", "hra", "glora", "lycoris-glora", "delora")),
    (MATRICES | {"experts"}, ("vera", "randlora")),
    (MATRICES | EMBEDDINGS, ("ia3",)),
    (MATRICES - {"attention, own key size"}, ("miss",)),
    (MATRICES - {"conv2d same", "depthwise conv2d"}, ("boft",)),
    (ROTATED, ("oft", "oft, shared", "coft")),
    (ROTATED - {"attention, own key size"}, ("oft of blocks",)),
    (EVEN, ("c3a", "bat", "vblora")),
    (EVEN | {"depthwise conv2d"}, ("diag-oft", "output boft")),
    ((EVEN | EMBEDDINGS | {"depthwise conv2d"}) - {"conv1d", "transposed conv1d", "transposed conv2d"}, ("road_1",)),
    ((MATRICES | NORMS) - UNBIASED, ("bitfit",)),
    (NORMS | {"encoder layer"}, ("norm",)),
    (EMBEDDINGS | {"linear", "linear without bias", "linear subclass"}, ("tokens",)),
    ((MATRICES | LOOKUPS) - UNCALLED, ("bottleneck",)),
    ((LINEARS | ATTENTION) - UNCALLED, ("parallel bottleneck",)),
    (MAIN, ("rslora", "pissa", "olora", "orthogonal", "gaussian", "lora_ga")),
    (MAIN, ("rsdora", "dora of inputs", "dora from pissa", "pruned adalora", "full with bias")),
    (MAIN, ("vblora of pieces of one", "fourierft of one frequency", "shira from a seed")),
    (
        MAIN & MATRICES,
        ("loha with cores", "lokr of full factors", "lokr of two decomposed factors", "lokr with a core"),
    ),
    (MAIN & MATRICES, ("dokr of inputs", "diag-oft, one block", "boft of one block", "hra of odd rank")),
    (MAIN & MATRICES, ("hra, orthogonal", "c3a of ones", "glora of vectors", "glora of constants")),
    (MAIN - {"embedding"}, ("vera from another seed", "sparse randlora", "very sparse randlora")),
    (MAIN - {"experts"}, ("ia3 that leaves the bias", "ia3 of the input")),
    ({"linear", "depthwise conv2d", "conv2d"}, ("lora with bias", "eva")),
    ({"depthwise conv2d", "embedding", "attention"}, ("road_4",)),
    ({"depthwise conv2d", "attention"}, ("output boft, constrained", "mini miss")),
    ({"embedding", "attention"}, ("road_2",)),
    ({"linear", "attention"}, ("boft of two factors",)),
    ({"attention"}, ("gralora of blocks", "hybrid gralora")),
    ({"conv1d", "transposed conv1d", "transposed conv2d", "transposed conv3d"}, ("diag-oft, constrained",)),
    (
        {"conv1d", "conv2d", "conv2d same", "depthwise conv2d", "transposed conv1d", "transposed conv2d"},
        ("oft, exact",),
    ),
    (
        {
            *("linear", "conv1d", "conv2d", "depthwise conv2d", "transposed conv2d", "transformers conv1d"),
            *("weight norm", "attention", "encoder layer"),
        },
        ("glora of biases",),
    ),
]
ADAPTED = {variant: kinds for kinds, variants in ROWS for variant in variants}

# What can be adapted, and is not tried: a rotation of an embedding does not show in products of its rows, a bottleneck
# not where a weight is read, and tokens are rows of embeddings and heads, not of whatever else is a linear layer.
UNTRIED: dict[str, set[str]] = {
    "oft": {"weight read by the model"},
    "bottleneck": {"weight read by the model"},
    "tokens": {"weight norm", "orthogonal"} | ATTENTION - {"bare parameter"},
}
