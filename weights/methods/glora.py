"""GLoRA's tensors in foreign files. LyCORIS's method of this name is another one: `lycoris_glora`."""

from weights.methods.core.peft import PeftLayout

_ENDS = {
    f"glora_{letter}_{tensor}": f"glora_{letter}.{tensor}"
    for letter in "ABCDE"
    for tensor in ("X", "Xd", "Xu", "zeros")
}

PEFT = PeftLayout(
    "glora",
    "GLORA",
    settings={
        "rank": ("r", 8),
        "config_a_b": ("config_A_B", "lora"),
        "config_c": ("config_C", "lora"),
        "config_d_e": ("config_D_E", "constant"),
    },
    tensors=_ENDS,
    optional=frozenset(_ENDS),
    biases=True,
)
