"""MiSS's and Bat's tensors in foreign files: one type in PEFT, told apart by `init_weights`."""

from weights.adapter_file import AdapterFile
from weights.methods.core.peft import PeftLayout, Settings


def _of_file(adapter: AdapterFile) -> Settings:
    mini = any(layer.hyperparameters.get("mini_r") for layer in adapter.layers.values())
    return {"init_weights": "mini"} if mini else {"mini_r": 1}


PEFT = (
    PeftLayout(
        "miss",
        "MISS",
        settings={"rank": ("r", 64), "mini_r": ("mini_r", 1)},
        tensors={"miss_block": "miss_block"},
        fixed={"init_weights": (True, False, "mini")},
        biases=True,
        inert=frozenset({"miss_dropout"}),
        of_layer=lambda config, *_: {} if config.get("init_weights") == "mini" else {"mini_r": 0},
        of_file=_of_file,
    ),
    PeftLayout(
        "bat",
        "MISS",
        settings={"rank": ("r", 64)},
        tensors={"miss_block": "miss_block"},
        fixed={"init_weights": ("bat",)},
        said=frozenset({"init_weights"}),
        biases=True,
        inert=frozenset({"miss_dropout", "mini_r"}),
    ),
)
