"""C3A's tensors in foreign files."""

from weights.methods.core.peft import PeftLayout

PEFT = PeftLayout(
    "c3a",
    "C3A",
    settings={"block_size": ("block_size", 256)},
    patterns={"block_size": "block_size_pattern"},
    pattern=str,
    tensors={"c3a_kernel": "c3a_kernel"},
    biases=True,
    of_layer=lambda config, path, tensors: {"block_size": tensors["c3a_kernel"].shape[-1]},
)
