"""The bytes of adapter files: for every method and every format that holds it, the hashes of what is written.

Tensors have values that every processor computes alike, without random numbers. The hashes cover the file of tensors
with its header, and `adapter_config.json` where the format has one; none of these names the version of a library. The
model card is left out: it is prose, and huggingface_hub formats a part of it.

A change of bytes on purpose is recorded by putting what `python -m tests.adapters.test_written_bytes` prints in the
place of the table.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
import weights
from tests.adapters import pretrained

NUMBERS: dict[str, dict[str, Any]] = {
    "boft": {"block_size": 2},
    "bottleneck": {"size": 3},
    "c3a": {"block_size": 2},
    "diag-oft": {"block_size": 2, "rescale": True},
    "fourierft": {"n_frequency": 6},
    "gralora": {"rank": 4},
    "oft": {"block_size": 2},
    "output-boft": {"block_size": 2, "rescale": True},
    "prefix_tuning": {"num_virtual_tokens": 2},
    "prompt_tuning": {"num_virtual_tokens": 2},
    "road": {"group_size": 2},
    "shira": {"rank": 1, "seed": 4},
    "trainable_tokens": {"tokens": (3, 1)},
    "vblora": {"rank": 2, "num_vectors": 5, "vector_length": 2},
}
NUMBERS_OF_FORMAT: dict[tuple[str, str], dict[str, Any]] = {("ia3", "lycoris"): {"bias": False}}
TARGETS = {"bitfit": "fc", "bottleneck": "fc", "copy": "norm", "norm": "norm", "trainable_tokens": "embed"}
FILES = {
    "fluxion": ("adapter.safetensors",),
    "peft": ("adapter_model.safetensors", "adapter_config.json"),
    "diffusers": ("pytorch_lora_weights.safetensors",),
    "lycoris": ("adapter.safetensors",),
    "mlx": ("adapters.safetensors", "adapter_config.json"),
}

# The first 16 digits of the SHA-256 of each file, by method and format.
WRITTEN: dict[tuple[str, str], tuple[str, ...]] = {
    ("adalora", "fluxion"): ("e96415ba51f20910",),
    ("adalora", "peft"): ("0e5d64bc586c10eb", "a5648321d894f6be"),
    ("bat", "fluxion"): ("9a6e3358a3a152d2",),
    ("bat", "peft"): ("dad9a599bdcf559b", "45cf1346067d6fc5"),
    ("bitfit", "fluxion"): ("6c50098ebcc8cb23",),
    ("boft", "fluxion"): ("f1c2bdda95de21d5",),
    ("boft", "peft"): ("5fdb2212efd87334", "54639f4a80f603fa"),
    ("bottleneck", "fluxion"): ("47f311bd084d608b",),
    ("c3a", "fluxion"): ("cd71a81ed256b2d8",),
    ("c3a", "peft"): ("56facf4cdbab1c6a", "c17f5eede4dddf6f"),
    ("copy", "fluxion"): ("afc028c8f40c8e5c",),
    ("copy", "peft"): ("e2eda013f4c495e2", "fc3085c99115bd56"),
    ("delora", "fluxion"): ("e1e2ad53c1d741b3",),
    ("delora", "peft"): ("17fe9164fe81417e", "1fa659ccc046d2da"),
    ("diag-oft", "fluxion"): ("b86e60b2946e8869",),
    ("diag-oft", "lycoris"): ("96f6c4d37ce82a4a",),
    ("doha", "fluxion"): ("8e8e083f2534d135",),
    ("doha", "lycoris"): ("e6404e44ac936ab7",),
    ("dokr", "fluxion"): ("815f271971e3147e",),
    ("dokr", "lycoris"): ("726d5af38068ffb5",),
    ("dora", "diffusers"): ("49340537d3372507",),
    ("dora", "fluxion"): ("703f22a2798da14f",),
    ("dora", "lycoris"): ("cb5fb8c8edfb4f6b",),
    ("dora", "mlx"): ("a261bd92142e6521", "dd4a547153d32690"),
    ("dora", "peft"): ("f852e24f91154940", "0bbc7734de42db27"),
    ("fourierft", "fluxion"): ("358299c2995c8ed1",),
    ("fourierft", "peft"): ("e557a46bd89fe200", "c87c5d6ecff32a7b"),
    ("full", "fluxion"): ("cd95891ff1843d8f",),
    ("full", "lycoris"): ("4a2333b47658fc38",),
    ("glora", "fluxion"): ("6417cfbad8493f4c",),
    ("glora", "peft"): ("85bb78339a22c27c", "d13e87c3cf1189b8"),
    ("gralora", "fluxion"): ("ab94c1d7ebc502c2",),
    ("gralora", "peft"): ("5ab3bbd714c1b846", "189c09b53a361f1f"),
    ("hira", "fluxion"): ("de4e42aef5041fc4",),
    ("hira", "peft"): ("b14dc8489d488002", "ea3c02981c3b1608"),
    ("hra", "fluxion"): ("9892d56ca7a3a879",),
    ("hra", "peft"): ("f137de6667b75d8b", "bc32f0b2319e0beb"),
    ("ia3", "fluxion"): ("f100b06853bbb9c6",),
    ("ia3", "lycoris"): ("2ac8df6a4d013a3f",),
    ("ia3", "peft"): ("812e0ee2abd78a33", "094c2504443a2b36"),
    ("loha", "fluxion"): ("f0e9dcdab9fd9393",),
    ("loha", "lycoris"): ("7d599ba4f042163f",),
    ("loha", "peft"): ("3bd71e81ad2b8622", "c05c041b1e18a16f"),
    ("lokr", "fluxion"): ("43651b69ec248b4c",),
    ("lokr", "lycoris"): ("830094169b313578",),
    ("lokr", "peft"): ("3e0f9d04451b81f5", "9f58e46cbac8ab67"),
    ("lora", "diffusers"): ("6e1774c198c93ab0",),
    ("lora", "fluxion"): ("839fa319be64df58",),
    ("lora", "lycoris"): ("90c8f113b39d6a48",),
    ("lora", "mlx"): ("0b25f6db6fef47d9", "735d38fc7032e195"),
    ("lora", "peft"): ("441d3c32c67b122b", "711bcceb5c972b39"),
    ("lycoris-glora", "fluxion"): ("76841c58addedee2",),
    ("lycoris-glora", "lycoris"): ("bc559753d77ae8f6",),
    ("miss", "fluxion"): ("1501df5636194083",),
    ("miss", "peft"): ("077e862fab075e24", "1beba9384cc1af1d"),
    ("norm", "fluxion"): ("566beccd7c628558",),
    ("norm", "peft"): ("08a891b80c8a6ed2", "bd48940a31e412c4"),
    ("oft", "fluxion"): ("eaa207d7ad8c0d25",),
    ("oft", "peft"): ("4d1edf6e8d88955a", "34c47cdf4428ac7d"),
    ("output-boft", "fluxion"): ("b45d165362892c8e",),
    ("output-boft", "lycoris"): ("a41e6534054c39e5",),
    ("prefix_tuning", "fluxion"): ("0639d9ecd187c0aa",),
    ("prefix_tuning", "peft"): ("b39858cc7394298b", "7878c5bc1f7494b8"),
    ("prompt_tuning", "fluxion"): ("ef7c34667cc0f7db",),
    ("prompt_tuning", "peft"): ("c65c3e8838dcb57b", "477d701b9f435c30"),
    ("randlora", "fluxion"): ("8da880d123ec8c13",),
    ("randlora", "peft"): ("975f7106568f5fa0", "fb232054bda76768"),
    ("road", "fluxion"): ("323b5f2f32646646",),
    ("road", "peft"): ("7da5df4cc3f9b01a", "2da11fd9e268021e"),
    ("shira", "fluxion"): ("c9a2d138c533d784",),
    ("shira", "peft"): ("b7756879f13cb403", "0f42244087450930"),
    ("trainable_tokens", "fluxion"): ("5a01c0b4fe776659",),
    ("trainable_tokens", "peft"): ("0168b42567051f20", "bf1bd56155fbdc8b"),
    ("vblora", "fluxion"): ("6277746f4afaa74b",),
    ("vblora", "peft"): ("e93f58bbeeab90fb", "5a6454f1e6ee3384"),
    ("vera", "fluxion"): ("d2dbb6a82945b9f3",),
    ("vera", "peft"): ("7dc5b88e68e5bec8", "a1924973b31bf60b"),
}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.conv = nn.Conv2d(4, 6, (3, 2))
        self.norm = nn.LayerNorm(6)
        self.fc = nn.Linear(6, 8)


def fractions(number: int, like: Tensor) -> Tensor:
    """Values of the `number`-th tensor: odd multiples of 1/128 between -1/2 and 1/2, exact in 16 bits."""
    i = torch.arange(like.numel())
    return ((3 * i * i + (2 * number + 5) * i + 7 * number) % 61 * 2 - 61).div(128).view(like.shape).to(like.dtype)


def method_of(key: str, form: str) -> adapters.Method:
    kind = adapters.METHODS[key]
    rank = {"rank": 2} if "rank" in kind.__dataclass_fields__ else {}
    return kind(**{**rank, **NUMBERS.get(key, {}), **NUMBERS_OF_FORMAT.get((key, form), {})})


def written(key: str, form: str, folder: Path) -> tuple[str, ...]:
    """Write an adapter of a method in a format, and hash its files."""
    virtual = key in ("prefix_tuning", "prompt_tuning")
    model = pretrained.build("llama").model if virtual else Net()
    targets = None if virtual else TARGETS.get(key, "fc" if form == "mlx" else ["conv", "fc"])
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter.copy_(fractions(number, parameter))
    patch = adapters.inject(model, method_of(key, form), targets)
    tensors = patch.state_dict()  # Integers are indices into the weights, which a seed determines on any processor.
    patch.load_state_dict(
        {name: fractions(n, t) if t.is_floating_point() else t.clone() for n, (name, t) in enumerate(tensors.items())}
    )
    path = folder / FILES[form][0] if form == "lycoris" else folder
    patch.save_pretrained(path, format=form, component="unet" if form == "diffusers" else None)
    return tuple(hashlib.sha256((folder / name).read_bytes()).hexdigest()[:16] for name in FILES[form])


def everything() -> list[tuple[str, str]]:
    """Every method of this library with every format that holds it."""
    own = sorted(key for key, kind in adapters.METHODS.items() if kind.__module__.startswith("adapters."))
    return [(key, form) for key in own for form in sorted(weights.formats_of(key))]


def test_every_method_is_in_the_table_with_every_format() -> None:
    assert sorted(WRITTEN) == everything(), "run `python -m tests.adapters.test_written_bytes` for the table"


@pytest.mark.parametrize(("key", "form"), WRITTEN, ids=map("-".join, WRITTEN))
def test_the_same_bytes_are_written(key: str, form: str, tmp_path: Path) -> None:
    assert written(key, form, tmp_path) == WRITTEN[key, form]


def main() -> None:
    """Print the table."""
    for key, form in everything():
        with tempfile.TemporaryDirectory() as folder:
            hashes = written(key, form, Path(folder))
        listed = ", ".join(f'"{digits}"' for digits in hashes)
        print(f'    ("{key}", "{form}"): ({listed}{"," * (len(hashes) == 1)}),')


if __name__ == "__main__":
    main()
