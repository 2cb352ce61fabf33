"""VeRA's tensors in foreign files."""

from weights.methods.core.peft import PeftLayout

PEFT = PeftLayout(
    "vera",
    "VERA",
    settings={"rank": ("r", 256), "seed": ("projection_prng_key", 0), "d_initial": ("d_initial", 0.1)},
    tensors={"vera_lambda_b": "vera_lambda_b", "vera_lambda_d": "vera_lambda_d"},
    shared={"vera_A": "base_model.vera_A", "vera_B": "base_model.vera_B"},
    shared_if="save_projection",
    biases=True,
    inert=frozenset({"vera_dropout"}),
)
