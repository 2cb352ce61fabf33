"""RoAd's tensors in foreign files."""

from weights.methods.core.peft import PeftLayout

PEFT = PeftLayout(
    "road",
    "ROAD",
    settings={"variant": ("variant", "road_1"), "group_size": ("group_size", 64)},
    tensors={"road_theta": "road_theta", "road_alpha": "road_alpha"},
)
