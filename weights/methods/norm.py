"""The tensors of trained normalisation layers in foreign files."""

from weights.methods.core.peft import PeftLayout

_ENDS = {
    name: f"ln_tuning_layers.{name}"
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
}

PEFT = PeftLayout(
    "norm",
    "LN_TUNING",
    settings={},
    tensors=_ENDS,
    optional=frozenset(_ENDS),
    parameters=True,
)
