"""One small file of every writer's kind, with what it says and what becomes of the weights of a model with it.

The names are those that the writers give: PEFT, diffusers, kohya's scripts, LyCORIS, ComfyUI, ai-toolkit, OneTrainer,
XLabs, Black Forest Labs, the trainer of Wan Fun, cloneofsimo/lora, torchtune, mlx-lm and llama.cpp. What becomes of a
weight is written here as a closed form.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor, nn

import weights

Change = Callable[[Tensor], Tensor]
Tensors = dict[str, Tensor]
IN, OUT, RANK = 6, 8, 2


@dataclass(frozen=True)
class Case:
    """A file, and what is expected of it.

    Attributes:
        format: The one by which it is recognised.
        tensors: By name.
        layers: By path in the file, the method and the scale, None where that is not alpha by rank.
        modules: By path in the model, the layer to make.
        changes: By the name of a parameter of the model, what becomes of it.
        components: Those that the file says.
        others: The names of tensors for no layer.
        file: The name of the file.
        metadata: That of the header.
        config: The settings beside it.
        whole: The bytes of a file that is no safetensors file.
    """

    format: str
    tensors: Tensors
    layers: Mapping[str, tuple[str, float | None]]
    modules: Mapping[str, Callable[[], nn.Module]]
    changes: Mapping[str, Change]
    components: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    file: str = "file.safetensors"
    metadata: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] | None = None
    whole: bytes = b""

    def write(self, folder: Path) -> Path:
        """Write what there is into a folder, and return the path to read."""
        path = folder / self.file
        if self.whole:
            path.write_bytes(self.whole)
        else:
            weights.save(self.tensors, path, self.metadata)
        if self.config is not None:
            (folder / "adapter_config.json").write_text(json.dumps(self.config))
        return path

    def model(self) -> nn.Module:
        """One that has these layers."""
        torch.manual_seed(1)
        root = Attention()
        for path, make in self.modules.items():
            *above, name = path.split(".")
            holder: nn.Module = root
            for part in above:
                if part not in dict(holder.named_children()):
                    holder.add_module(part, Attention())
                holder = holder.get_submodule(part)
            holder.add_module(name, make())
        return root


class Attention(nn.Module):
    """A module with others in it, of a class whose layers cloneofsimo's files count."""


def linear() -> nn.Module:
    return nn.Linear(IN, OUT)


def conv() -> nn.Module:
    return nn.Conv2d(IN, OUT, 3)


def wide() -> nn.Module:
    return nn.Linear(2 * IN, 2 * OUT)


def wide_conv() -> nn.Module:
    return nn.Conv2d(2 * IN, 2 * OUT, 3)


def norm() -> nn.Module:
    return nn.LayerNorm(OUT)


def embedding() -> nn.Module:
    return nn.Embedding(10, OUT)


def no_bias() -> nn.Module:
    return nn.Linear(IN, OUT, bias=False)


@dataclass(frozen=True)
class Method:
    """The tensors of one layer by the ends of their names in LyCORIS' files, and what they do to its weight."""

    key: str
    make: Callable[[], nn.Module]
    ends: Tensors
    change: Change
    scale: float | None = None
    bias: Tensor | None = None


def random(*shape: int) -> Tensor:
    return torch.randn(shape) * 0.4


def times(a: Tensor, b: Tensor) -> Tensor:
    """A product of matrices, of which convolutions are flattened ones."""
    return a.flatten(1) @ b.flatten(1)


def plus(delta: Tensor, scale: float = 1.0) -> Change:
    return lambda weight: weight + scale * delta.reshape(weight.shape)


def decomposed(delta: Tensor, lengths: Tensor, scale: float = 1.0) -> Change:
    """The rows of the changed weight, of these lengths."""

    def change(weight: Tensor) -> Tensor:
        rows = weight.flatten(1) + scale * delta
        return (lengths.view(-1, 1) * rows / rows.norm(dim=1, keepdim=True)).view_as(weight)

    return change


def cayley(q: Tensor) -> Tensor:
    identity = torch.eye(q.shape[-1])
    return (identity + q) @ torch.linalg.inv(identity - q)


def on_rows(blocks: Tensor, bound: float = 0.0, rescale: Tensor | None = None) -> Change:
    """Rows rotated in blocks, with the norm of all Q bounded, as LyCORIS and kohya's scripts have it."""
    q = blocks - blocks.mT
    if bound:
        q = q * min(1.0, bound / float(q.norm()))
    rotation = cayley(q)

    def change(weight: Tensor) -> Tensor:
        rows = weight.flatten(1).unflatten(0, (len(rotation), -1))
        turned = torch.einsum("knm,kni->kmi", rotation, rows).flatten(0, 1)
        return (turned if rescale is None else rescale.view(-1, 1) * turned).view_as(weight)

    return change


def series(upper: Tensor) -> Tensor:
    """The rotations of PEFT and OneTrainer: I + 2 Q + 2 Q² + 2 Q³ + Q⁴."""
    size = (1 + math.isqrt(1 + 8 * upper.shape[-1])) // 2
    q = torch.zeros(len(upper), size, size)
    q[:, *torch.triu_indices(size, size, 1)] = upper
    q = q - q.mT
    return torch.eye(size) + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q


def on_inputs(rotation: Tensor) -> Change:
    """Columns rotated in blocks."""

    def change(weight: Tensor) -> Tensor:
        columns = weight.flatten(1).unflatten(1, (-1, rotation.shape[-1]))
        return torch.einsum("ork,rkc->orc", columns, rotation.expand(columns.shape[1], -1, -1)).reshape(weight.shape)

    return change


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Weights `(out, in, ...)` of a core `(r, r, ...)`, and of factors `(r, out)` and `(r, in)`."""
    return torch.einsum("ij...,ip,jr->pr...", core, a, b).contiguous()


def butterfly(blocks: Tensor) -> Change:
    """Rows through two factors, in whose blocks pairs take turns that are 2 rows apart, and then 4."""
    rotations = cayley(blocks - blocks.mT)

    def change(weight: Tensor) -> Tensor:
        for level, rotation in enumerate(rotations):
            order = torch.arange(OUT).view(-1, 2, 2 * 2**level).mT.flatten()
            turned = torch.einsum("kmn,kni->kmi", rotation, weight[order].unflatten(0, (2, 4)))
            weight = torch.empty_like(weight).index_copy(0, order, turned.flatten(0, 1))
        return weight

    return change


@cache
def methods() -> dict[str, Method]:
    """What LyCORIS, kohya's scripts, ComfyUI and OneTrainer can have of one layer."""
    torch.manual_seed(0)
    up, down, alpha = random(OUT, RANK), random(RANK, IN), torch.tensor(3.0)
    lora = {"lora_up.weight": up, "lora_down.weight": down}
    up4, down4 = random(OUT, RANK, 1, 1), random(RANK, IN, 3, 3)
    lora4 = {"lora_up.weight": up4, "lora_down.weight": down4}
    flat, core = random(RANK, IN, 1, 1), random(RANK, RANK, 3, 3)
    tuckered = tucker(core, up.T, flat.flatten(1))
    lengths, longer = torch.rand(OUT, 1) + 0.5, torch.rand(2 * OUT, 1) + 0.5
    hada = {"hada_w1_a": random(OUT, RANK), "hada_w1_b": random(RANK, IN)}
    hada |= {"hada_w2_a": random(OUT, RANK), "hada_w2_b": random(RANK, IN)}
    hada_delta = (hada["hada_w1_a"] @ hada["hada_w1_b"]) * (hada["hada_w2_a"] @ hada["hada_w2_b"])
    hada4 = {**hada, "hada_w1_b": random(RANK, IN * 9), "hada_w2_b": random(RANK, IN * 9)}
    hada4_delta = (hada4["hada_w1_a"] @ hada4["hada_w1_b"]) * (hada4["hada_w2_a"] @ hada4["hada_w2_b"])
    cores = {"hada_t1": random(RANK, RANK, 3, 3), "hada_t2": random(RANK, RANK, 3, 3)}
    hada_t = {**hada, "hada_w1_a": random(RANK, OUT), "hada_w2_a": random(RANK, OUT), **cores}
    hada_t_delta = tucker(cores["hada_t1"], hada_t["hada_w1_a"], hada["hada_w1_b"])
    hada_t_delta = hada_t_delta * tucker(cores["hada_t2"], hada_t["hada_w2_a"], hada["hada_w2_b"])
    w1, w2 = random(4, 3), random(4, 4)
    w1_a, w1_b, w2_a, w2_b = random(4, 1), random(1, 3), random(4, 1), random(1, 4)
    second, second4, core1 = {"lokr_w2_a": w2_a, "lokr_w2_b": w2_b}, random(4, 4, 3, 3), random(1, 1, 3, 3)
    kron_t = {"lokr_w1": w1, "lokr_w2_a": random(1, 4), "lokr_w2_b": random(1, 4), "lokr_t2": core1}
    kron_t_second, w1_4 = tucker(core1, kron_t["lokr_w2_a"], kron_t["lokr_w2_b"]), w1[..., None, None]
    a1, a2, b1, b2 = random(IN, RANK), random(RANK, IN), random(OUT, RANK), random(RANK, IN)
    glora = {"a1.weight": a1, "a2.weight": a2, "b1.weight": b1, "b2.weight": b2}
    blocks, rescale, four = random(2, 4, 4), torch.rand(OUT, 1) + 0.5, random(2, 2, 4, 4)
    diff, diff_b = random(OUT, IN), random(OUT)
    upper, upper4, shared = random(2, 3) * 0.3, random(IN * 9 // 3, 3) * 0.3, random(1, 3) * 0.3
    scaled = torch.tensor(True)
    w_in, w_out, set_weight = random(IN), random(OUT), random(OUT, IN)
    return {
        "lora": Method("lora", linear, {**lora, "alpha": alpha}, plus(up @ down, 1.5), 1.5),
        "lora without alpha": Method("lora", linear, lora, plus(up @ down), 1.0),
        "lora of a convolution": Method("lora", conv, {**lora4, "alpha": alpha}, plus(times(up4, down4), 1.5), 1.5),
        "lora with a core": Method(
            "lora",
            conv,
            {"lora_up.weight": up.view_as(up4), "lora_down.weight": flat, "lora_mid.weight": core, "alpha": alpha},
            plus(tuckered, 1.5),
            1.5,
        ),
        "dora": Method(
            "dora", linear, {**lora, "dora_scale": lengths, "alpha": alpha}, decomposed(up @ down, lengths, 1.5), 1.5
        ),
        "dora of a convolution": Method(
            "dora",
            conv,
            {**lora4, "dora_scale": lengths.view(OUT, 1, 1, 1)},
            decomposed(times(up4, down4), lengths),
            1.0,
        ),
        "loha": Method("loha", linear, {**hada, "alpha": alpha}, plus(hada_delta, 1.5), 1.5),
        "loha of a convolution": Method("loha", conv, hada4, plus(hada4_delta), 1.0),
        "loha with cores": Method("loha", conv, {**hada_t, "alpha": alpha}, plus(hada_t_delta, 1.5), 1.5),
        "doha": Method("doha", linear, {**hada, "dora_scale": lengths}, decomposed(hada_delta, lengths), 1.0),
        "lokr of two whole factors": Method(
            "lokr", wide, {"lokr_w1": w1, "lokr_w2": w2, "alpha": torch.tensor(1e5)}, plus(torch.kron(w1, w2)), 1.0
        ),
        "lokr": Method(
            "lokr", wide, {"lokr_w1": w1, **second, "alpha": alpha}, plus(torch.kron(w1, w2_a @ w2_b), 3.0), 3.0
        ),
        "lokr of four factors": Method(
            "lokr",
            wide,
            {"lokr_w1_a": w1_a, "lokr_w1_b": w1_b, **second, "alpha": alpha},
            plus(torch.kron(w1_a @ w1_b, w2_a @ w2_b), 3.0),
            3.0,
        ),
        "lokr of a convolution": Method(
            "lokr", wide_conv, {"lokr_w1": w1, "lokr_w2": second4}, plus(torch.kron(w1_4, second4)), 1.0
        ),
        "lokr with a core": Method(
            "lokr", wide_conv, {**kron_t, "alpha": alpha}, plus(torch.kron(w1_4, kron_t_second), 3.0), 3.0
        ),
        "dokr": Method(
            "dokr",
            wide,
            {"lokr_w1": w1, "lokr_w2": w2, "dora_scale": longer},
            decomposed(torch.kron(w1, w2), longer),
            1.0,
        ),
        "glora": Method(
            "lycoris-glora",
            linear,
            {**glora, "alpha": alpha},
            lambda weight: weight + 1.5 * (weight @ a1 @ a2 + b1 @ b2),
            1.5,
        ),
        "diag-oft": Method("diag-oft", linear, {"oft_blocks": blocks}, on_rows(blocks)),
        "diag-oft with a constraint": Method(
            "diag-oft", conv, {"oft_blocks": blocks, "alpha": torch.tensor(0.05)}, on_rows(blocks, 0.05 * OUT)
        ),
        "diag-oft with factors": Method(
            "diag-oft", linear, {"oft_blocks": blocks, "rescale": rescale}, on_rows(blocks, 0.0, rescale)
        ),
        "boft": Method("output-boft", linear, {"oft_blocks": four}, butterfly(four)),
        "full": Method("full", linear, {"diff": diff, "diff_b": diff_b}, plus(diff), None, diff_b),
        "norm": Method("full", norm, {"w_norm": w_out, "b_norm": diff_b}, plus(w_out), None, diff_b),
        "ia3": Method(
            "ia3",
            linear,
            {"weight": w_out, "on_input": torch.tensor(0)},
            lambda weight: weight * (1 + w_out).view(-1, 1),
        ),
        "ia3 of the input": Method(
            "ia3", linear, {"weight": w_in, "on_input": torch.tensor(1)}, lambda weight: weight * (1 + w_in)
        ),
        "set": Method("copy", linear, {"set_weight": set_weight}, lambda weight: set_weight),
        "oft": Method("oft", linear, {"oft_R.weight": upper}, on_inputs(series(upper).mT)),
        "oft of one block": Method("oft", linear, {"oft_R.weight": shared}, on_inputs(series(shared).mT)),
        "oft of a convolution": Method("oft", conv, {"oft_R.weight": upper4}, on_inputs(series(upper4))),
        "scaled oft": Method(
            "oft",
            linear,
            {"oft_R.weight": upper, "oft_R.scaled_oft": scaled},
            on_inputs(series(upper / (2 * math.sqrt(2))).mT),
        ),
    }  # fmt: skip


def one(
    form: str, method: Method, key: str, path: str, place: str, components: tuple[str, ...] = (), **options: Any
) -> Case:
    """A file with one layer.

    Args:
        form: The format.
        method: What is in it.
        key: What the names of its tensors begin with.
        path: That of the layer in the file.
        place: That of the layer in the model.
        components: Those that the file says.
        options: More of the case.
    """
    layers: dict[str, tuple[str, float | None]] = {path: (method.key, method.scale)}
    changes = {f"{place}.weight": method.change}
    if method.bias is not None:
        layers[f"{path}{'_' if form == 'lycoris' else '.'}bias"] = (method.key, None)
        changes[f"{place}.bias"] = plus(method.bias)
    tensors = {f"{key}.{end}": tensor for end, tensor in method.ends.items()}
    tensors |= options.pop("tensors", {})
    return Case(form, tensors, layers, {place: method.make}, changes, components, **options)


SPELLINGS = {
    "lora_up.weight": ("lora_up.weight", "lora_down.weight"),
    "lora_B.weight": ("lora_B.weight", "lora_A.weight"),
    "lora_B": ("lora_B", "lora_A"),
    "lora_B.default.weight": ("lora_B.default.weight", "lora_A.default.weight"),
    "lora.up.weight": ("lora.up.weight", "lora.down.weight"),
    "lora_linear_layer.up.weight": ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight"),
}
LENGTHS = (
    "dora_scale",
    "magnitude",
    "lora_magnitude_vector",
    "lora_magnitude_vector.weight",
    "lora_magnitude_vector.default.weight",
)


def spelled(method: Method, spelling: str, lengths: str = "dora_scale") -> Method:
    """The same tensors by other names."""
    up, down = SPELLINGS[spelling]
    names = {"lora_up.weight": up, "lora_down.weight": down, "dora_scale": lengths}
    return replace(method, ends={names.get(end, end): tensor for end, tensor in method.ends.items()})


KOHYA = {
    "lycoris": "",
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
    "lora_prior_unet": "prior",
    "lora_prior_te": "text_encoder",
    "lora_unet_": "unet",
    "oft_unet": "unet",
}
COMFY = {
    "diffusion_model": ("unet", "unet"),
    "model.diffusion_model": ("unet", "unet"),
    "unet.base_model.model": ("unet", "unet"),
    "base_model.model": ("", ""),
    "text_encoders.clip_l.transformer": ("clip_l", "text_encoder"),
    "text_encoders.clip_g.transformer": ("clip_g", "text_encoder_2"),
    "text_encoders.t5xxl.transformer": ("t5xxl", "text_encoder_3"),
    "text_encoders.qwen3_06b.transformer": ("text_encoder", "text_encoder"),
    "clip_l": ("clip_l", "text_encoder"),
    "clip_g": ("clip_g", "text_encoder_2"),
    "t5xxl": ("t5xxl", "text_encoder_3"),
    "": ("", ""),
}
EMBEDDINGS = {"bundle_emb.<s1>.clip_l": torch.ones(2, 4), "bundle_emb.<s1>.clip_g_out": torch.ones(2, 4)}


def dotted(*names: str) -> str:
    return ".".join(filter(None, names))


def kohya_cases() -> Iterator[tuple[str, Case]]:
    for name, method in methods().items():
        if method.key != "copy":
            yield (
                name,
                one("lycoris", method, "lora_unet_down_0_to_q", "unet.down_0_to_q", "unet.down.0.to_q", ("unet",)),
            )
    for prefix, component in KOHYA.items():
        method = methods()["diag-oft with a constraint" if prefix == "oft_unet" else "lora"]
        path, place = dotted(component, "down_0_to_q"), dotted(component, "down.0.to_q")
        yield prefix, one("lycoris", method, f"{prefix}_down_0_to_q", path, place, (component,) if component else ())
    wan = one(
        "lycoris",
        methods()["lora"],
        "lora_unet__blocks_0_self_attn_q",
        "unet.blocks_0_self_attn_q",
        "unet.blocks.0.self_attn.q",
        ("unet",),
    )
    yield "Wan Fun", wan
    # OneTrainer, whose embeddings are in the same file, and whose KOHYA does not flatten one kind of name.
    legacy = {"tensors": EMBEDDINGS, "others": tuple(EMBEDDINGS)}
    for name, prefix, component in (
        ("LEGACY", "lora_transformer", "transformer"),
        ("KOHYA", "lora_te1", "text_encoder"),
    ):
        case = one(
            "lycoris",
            methods()["dora"],
            f"{prefix}_a_b",
            f"{component}.a_b",
            f"{component}.a.b",
            (component,),
            **legacy,
        )
        yield f"OneTrainer {name}", case
    case = one("lycoris", methods()["scaled oft"], "lora_unet_a_b", "unet.a_b", "unet.a.b", ("unet",))
    tensors = {
        key.replace("a_b.oft_R.scaled", "a.b.oft_R.scaled").replace("unet_a.b", "unet.a.b"): t
        for key, t in case.tensors.items()
    }
    yield "OneTrainer KOHYA scaled oft", replace(case, tensors=tensors)


def comfyui_cases() -> Iterator[tuple[str, Case]]:
    for name, method in methods().items():
        if not name.startswith("ia3"):
            yield (
                name,
                one(
                    "comfyui", method, "diffusion_model.down.0.to_q", "unet.down.0.to_q", "unet.down.0.to_q", ("unet",)
                ),
            )
    ia3 = methods()["ia3"]
    yield "ia3", one("comfyui", ia3, "diffusion_model.a.b", "unet.a.b", "unet.a.b", ("unet",))
    for prefix, (component, place) in COMFY.items():
        key, path = dotted(prefix, "down.0.to_q"), dotted(component, "down.0.to_q")
        where = dotted(place, "down.0.to_q")
        yield f"prefix {prefix}", one("comfyui", methods()["lora"], key, path, where, (component,) if component else ())
    for spelling in SPELLINGS:
        lora, at = spelled(methods()["lora"], spelling), "diffusion_model.a.b"
        yield spelling, one("comfyui", lora, at, "unet.a.b", "unet.a.b", ("unet",))
    # `<layer>_lora.up.weight` is for the layer before it.
    lora = methods()["lora"]
    oldest = replace(
        lora,
        ends={"up.weight": lora.ends["lora_up.weight"], "down.weight": lora.ends["lora_down.weight"]},
        change=plus(lora.ends["lora_up.weight"] @ lora.ends["lora_down.weight"]),
        scale=1.0,
    )
    yield "_lora.up.weight", one("comfyui", oldest, "diffusion_model.a.b_lora", "unet.a.b", "unet.a.b", ("unet",))
    for lengths in LENGTHS:  # ai-toolkit has `magnitude`.
        dora = spelled(methods()["dora"], "lora_B.weight", lengths)
        yield f"dora {lengths}", one("comfyui", dora, "diffusion_model.a.b", "unet.a.b", "unet.a.b", ("unet",))
    peft = spelled(methods()["lora without alpha"], "lora_B.weight")
    yield (
        "ai-toolkit",
        one(
            "comfyui",
            peft,
            "diffusion_model.double_blocks.0.img_attn.proj",
            "unet.double_blocks.0.img_attn.proj",
            "unet.double_blocks.0.img_attn.proj",
            ("unet",),
        ),
    )
    original = spelled(methods()["lora"], "lora_B.weight")
    yield "OneTrainer ORIGINAL", one("comfyui", original, "a.b", "a.b", "a.b")
    named = {"tensors": EMBEDDINGS, "others": tuple(EMBEDDINGS)}
    yield (
        "OneTrainer COMFY",
        one(
            "comfyui",
            original,
            "text_encoders.clip_l.transformer.a.b",
            "clip_l.a.b",
            "text_encoder.a.b",
            ("clip_l",),
            **named,
        ),
    )


def diffusers_cases() -> Iterator[tuple[str, Case]]:
    plain = methods()["lora without alpha"]
    for component in (
        "unet",
        "transformer",
        "transformer_2",
        "prior",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
    ):
        for spelling in ("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"):
            at = f"{component}.a.to_q" if not component.startswith("text") else f"{component}.a.fc1"
            yield f"{component} {spelling}", one("diffusers", spelled(plain, spelling), at, at, at, (component,))
    lora, dora = (spelled(methods()[name], "lora_B.weight", "lora_magnitude_vector") for name in ("lora", "dora"))
    del_alpha = [replace(m, ends={e: t for e, t in m.ends.items() if e != "alpha"}) for m in (lora, dora)]
    for name, method in zip(("lora", "dora"), del_alpha, strict=True):
        method = replace(
            method, ends={e: t.flatten() if e == "lora_magnitude_vector" else t for e, t in method.ends.items()}
        )
        table = {"unet.r": RANK, "unet.lora_alpha": 3, "unet.use_dora": name == "dora"}
        metadata = {"format": "pt", "lora_adapter_metadata": json.dumps(table)}
        yield (
            f"{name} with metadata",
            one("diffusers", method, "unet.a.b", "unet.a.b", "unet.a.b", ("unet",), metadata=metadata),
        )
    metadata = {"lora_adapter_metadata": json.dumps({"r": RANK, "lora_alpha": 3})}
    yield "with metadata for one", one("diffusers", del_alpha[0], "a.b", "a.b", "a.b", metadata=metadata)
    yield "with an alpha", one("diffusers", lora, "unet.a.b", "unet.a.b", "unet.a.b", ("unet",))
    up, down = plain.ends["lora_up.weight"], plain.ends["lora_down.weight"]
    for front in ("", "unet."):
        tensors: Tensors = {}
        for name in ("to_q", "to_out"):
            stem = f"{front}down.0.attn1.processor.{name}_lora"
            tensors |= {f"{stem}.up.weight": up, f"{stem}.down.weight": down}
        paths = {f"{front}down.0.attn1.{name}" for name in ("to_q", "to_out.0")}
        yield (
            f"processors {front}",
            Case(
                "diffusers",
                tensors,
                dict.fromkeys(paths, ("lora", 1.0)),
                dict.fromkeys(paths, linear),
                {f"{path}.weight": plain.change for path in paths},
                ("unet",) if front else (),
            ),
        )
    text = one(
        "diffusers",
        spelled(plain, "lora_linear_layer.up.weight"),
        "text_encoder.layers.0.self_attn.to_q",
        "text_encoder.layers.0.self_attn.q_proj",
        "text_encoder.layers.0.self_attn.q_proj",
        ("text_encoder",),
    )
    yield "old text encoder", text
    folded = spelled(plain, "lora_B.weight")
    yield (
        "OneTrainer DIFFUSERS",
        one(
            "diffusers",
            folded,
            "transformer.a.b",
            "transformer.a.b",
            "transformer.a.b",
            ("transformer",),
            tensors=EMBEDDINGS,
            others=tuple(EMBEDDINGS),
        ),
    )
    for name in ("loha", "lokr", "scaled oft"):
        yield (
            f"OneTrainer DIFFUSERS {name}",
            one("diffusers", methods()[name], "unet.a.b", "unet.a.b", "unet.a.b", ("unet",)),
        )


def peft_cases() -> Iterator[tuple[str, Case]]:
    def case(
        kind: str,
        ends: Tensors,
        change: Change,
        key: str,
        scale: float | None = None,
        make: Any = linear,
        shared: Any = None,
        **numbers: Any,
    ) -> Case:
        tensors = {f"base_model.model.a.b.{end}": tensor for end, tensor in ends.items()} | (shared or {})
        config = {"peft_type": kind, "target_modules": ["b"], **numbers}
        return Case(
            "peft",
            tensors,
            {"a.b": (key, scale)},
            {"a.b": make},
            {"a.b.weight": change},
            file="adapter_model.safetensors",
            config=config,
        )

    torch.manual_seed(2)
    a, b, lengths = random(RANK, IN), random(OUT, RANK), torch.rand(OUT) + 0.5
    lora = {"lora_A.weight": a, "lora_B.weight": b}
    numbers = {"r": RANK, "lora_alpha": 3}
    yield "lora", case("LORA", lora, plus(b @ a, 1.5), "lora", 1.5, **numbers)
    yield "rslora", case("LORA", lora, plus(b @ a, 3 / math.sqrt(2)), "lora", 1.5, use_rslora=True, **numbers)
    yield (
        "patterns",
        case(
            "LORA",
            lora,
            plus(b @ a, 2.5),
            "lora",
            2.5,
            r=7,
            lora_alpha=1,
            rank_pattern={"a.b": RANK},
            alpha_pattern={".*b": 5},
        ),
    )
    for end in ("lora_magnitude_vector", "lora_magnitude_vector.weight"):
        yield (
            end,
            case(
                "LORA", {**lora, end: lengths}, decomposed(b @ a, lengths, 1.5), "dora", 1.5, use_dora=True, **numbers
            ),
        )
    a4, b4 = random(RANK, IN, 3, 3), random(OUT, RANK, 1, 1)
    lora4 = {"lora_A.weight": a4, "lora_B.weight": b4}
    yield (
        "lora of a convolution",
        case("LORA", lora4, plus(times(b4, a4), 1.5), "lora", 1.5, conv, **numbers),
    )
    yield (
        "dora of a convolution",
        case(
            "LORA",
            {**lora4, "lora_magnitude_vector": lengths.view(1, OUT, 1, 1)},
            decomposed(times(b4, a4), lengths, 1.5),
            "dora",
            1.5,
            conv,
            use_dora=True,
            **numbers,
        ),
    )
    rows, features = random(RANK, 10), random(OUT, RANK)
    yield (
        "lora of an embedding",
        case(
            "LORA",
            {"lora_embedding_A": rows, "lora_embedding_B": features},
            plus((features @ rows).T, 1.5),
            "lora",
            1.5,
            embedding,
            **numbers,
        ),
    )
    hada, kron = methods()["loha"], methods()["lokr"]
    for name, kind, method in (("loha", "LOHA", hada), ("lokr", "LOKR", kron)):
        ends = {end: tensor for end, tensor in method.ends.items() if end != "alpha"}
        rank = RANK if name == "loha" else 1
        yield name, case(kind, ends, method.change, name, method.scale, method.make, r=rank, alpha=3)
    outputs, inputs = torch.rand(OUT, 1) + 0.5, torch.rand(1, IN) + 0.5
    yield (
        "ia3",
        case("IA3", {"ia3_l": outputs}, lambda weight: weight * outputs, "ia3", None, no_bias, feedforward_modules=[]),
    )
    yield (
        "ia3 of the input",
        case("IA3", {"ia3_l": inputs}, lambda weight: weight * inputs, "ia3", feedforward_modules=["b"]),
    )
    upper = random(2, 3) * 0.3
    yield "oft", case("OFT", {"oft_R.weight": upper}, on_inputs(series(upper).mT), "oft", oft_block_size=3, r=0)
    vera_a, vera_b, on_rank, on_out = random(RANK, IN + 1), random(OUT + 2, RANK), random(RANK), random(OUT)
    vera = (on_out.view(-1, 1) * vera_b[:OUT]) @ (on_rank.view(-1, 1) * vera_a[:, :IN])
    bank = {"base_model.vera_A": vera_a[:, :IN].contiguous(), "base_model.vera_B": vera_b[:OUT].contiguous()}
    yield (
        "vera",
        case("VERA", {"vera_lambda_d": on_rank, "vera_lambda_b": on_out}, plus(vera), "vera", shared=bank, r=RANK),
    )
    hira = {"hira_A": a, "hira_B": b}
    yield "hira", case("HIRA", hira, lambda weight: weight * (1 + b @ a), "hira", r=RANK)
    saved = {"base_model.model.a.n.weight": random(OUT), "base_model.model.a.n.bias": random(OUT)}
    with_norm = case("LORA", lora, plus(b @ a, 1.5), "lora", 1.5, modules_to_save=["n"], **numbers)
    yield (
        "modules_to_save",
        replace(
            with_norm,
            tensors={**with_norm.tensors, **saved},
            layers={**with_norm.layers, "a.n": ("copy", None), "a.n.bias": ("copy", None)},
            modules={**with_norm.modules, "a.n": norm},
            changes={
                **with_norm.changes,
                "a.n.weight": lambda weight: saved["base_model.model.a.n.weight"],
                "a.n.bias": lambda bias: saved["base_model.model.a.n.bias"],
            },
        ),
    )
    bias = {"base_model.model.a.b.base_layer.bias": random(OUT)}
    with_bias = case("LORA", lora, plus(b @ a, 1.5), "lora", 1.5, bias="lora_only", **numbers)
    yield (
        "lora_only",
        replace(
            with_bias,
            tensors={**with_bias.tensors, **bias},
            layers={**with_bias.layers, "a.b.bias": ("copy", None)},
            changes={**with_bias.changes, "a.b.bias": lambda old: bias["base_model.model.a.b.base_layer.bias"]},
        ),
    )
    own = random(OUT)
    biased = case("LORA", {**lora, "lora_B.bias": own}, plus(b @ a, 1.5), "lora", 1.5, lora_bias=True, **numbers)
    yield "lora_bias", replace(biased, changes={**biased.changes, "a.b.bias": plus(own, 1.5)})
    weight = random(OUT)
    tuned = case("LN_TUNING", {"ln_tuning_layers.weight": weight}, lambda old: weight, "norm", None, norm)
    yield "ln_tuning", tuned
    delta = random(2, OUT)
    yield (
        "trainable_tokens",
        case(
            "TRAINABLE_TOKENS",
            {"trainable_tokens_delta": delta},
            lambda old: old.index_copy(0, torch.tensor([1, 4]), delta),
            "trainable_tokens",
            None,
            embedding,
            token_indices=[1, 4],
        ),
    )
    # torchtune's export is an ordinary folder.
    yield (
        "torchtune export",
        replace(
            case("LORA", lora, plus(b @ a, 1.5), "lora", 1.5, **numbers),
            config={"peft_type": "LORA", "target_modules": ["b"], **numbers, "base_model_name_or_path": "meta-llama/x"},
        ),
    )


def other_cases() -> Iterator[tuple[str, Case]]:
    torch.manual_seed(3)
    up, down, up2, down2 = random(OUT, RANK), random(RANK, IN), random(3 * IN, RANK), random(RANK, IN)
    delta, lengths = up @ down, torch.rand(OUT) + 0.5
    parts = (up2 @ down2).split(IN)
    stem = "double_blocks.0.processor"
    tensors = {f"{stem}.proj_lora1.up.weight": up, f"{stem}.proj_lora1.down.weight": down}
    tensors |= {f"{stem}.qkv_lora2.up.weight": up2, f"{stem}.qkv_lora2.down.weight": down2}
    tensors |= {
        "single_blocks.0.processor.qkv_lora.up.weight": up2,
        "single_blocks.0.processor.qkv_lora.down.weight": down2,
    }
    paths = [f"{stem}.proj_lora1", f"{stem}.qkv_lora2", "single_blocks.0.processor.qkv_lora"]
    places = [f"transformer_blocks.0.attn.add_{x}_proj" for x in "qkv"]
    places += [f"single_transformer_blocks.0.attn.to_{x}" for x in "qkv"]
    xlabs = Case(
        "xlabs",
        tensors,
        dict.fromkeys(paths, ("lora", 1.0)),
        {"transformer_blocks.0.attn.to_out.0": linear, **dict.fromkeys(places, lambda: nn.Linear(IN, IN))},
        {"transformer_blocks.0.attn.to_out.0.weight": plus(delta)}
        | {f"{place}.weight": plus(part) for place, part in zip(places, parts * 2, strict=True)},
    )
    yield "xlabs", xlabs
    yield "xlabs in ComfyUI", replace(xlabs, tensors={f"diffusion_model.{key}": t for key, t in xlabs.tensors.items()})
    lengths_of_q, bias = random(OUT), random(OUT)
    at = "double_blocks.0.img_attn"
    control = {f"{at}.proj.lora_A.weight": down, f"{at}.proj.lora_B.weight": up, f"{at}.proj.lora_B.bias": bias}
    control |= {f"{at}.norm.query_norm.scale": lengths_of_q}
    yield (
        "bfl",
        Case(
            "bfl",
            control,
            {f"{at}.proj": ("lora", 1.0), f"{at}.norm.query_norm.scale": ("copy", None)},
            {"transformer_blocks.0.attn.to_out.0": linear, "transformer_blocks.0.attn.norm_q": lambda: nn.RMSNorm(OUT)},
            {
                "transformer_blocks.0.attn.to_out.0.weight": plus(delta),
                "transformer_blocks.0.attn.to_out.0.bias": plus(bias),
                "transformer_blocks.0.attn.norm_q.weight": lambda old: lengths_of_q,
            },
        ),
    )
    simo = {"unet:0:up": up, "unet:0:down": down, "text_encoder:0:up": up, "text_encoder:0:down": down}
    says = {"unet": '["Attention"]', "text_encoder": '["Attention"]', "unet:0:rank": "2", "text_encoder:0:rank": "2"}
    for name, more in (("cloneofsimo", {}), ("cloneofsimo with a token", {"<s1>": torch.ones(4)})):
        yield (
            name,
            Case(
                "cloneofsimo",
                simo | more,
                {"unet.0": ("lora", 1.0), "text_encoder.0": ("lora", 1.0)},
                {"unet.a.b": linear, "text_encoder.a.b": linear},
                {"unet.a.b.weight": plus(delta), "text_encoder.a.b.weight": plus(delta)},
                ("text_encoder", "unet"),
                tuple(more),
                metadata=says | dict.fromkeys(more, "<embed>"),
            ),
        )
    tune = {"a.b.lora_a.weight": down, "a.b.lora_b.weight": up}
    numbers = {"r": RANK, "lora_alpha": 3, "target_modules": ["b"]}
    for name, key, tensors, change in (
        ("torchtune", "lora", tune, plus(delta, 1.5)),
        ("torchtune dora", "dora", {**tune, "a.b.magnitude": lengths}, decomposed(delta, lengths, 1.5)),
    ):
        yield (
            name,
            Case("torchtune", tensors, {"a.b": (key, 1.5)}, {"a.b": linear}, {"a.b.weight": change}, config=numbers),
        )
    mlx = {"a.b.lora_a": down.T.contiguous(), "a.b.lora_b": up.T.contiguous()}
    for name, key, tensors, change in (
        ("mlx", "lora", mlx, plus(delta, 20.0)),
        ("mlx dora", "dora", {**mlx, "a.b.m": lengths}, decomposed(delta, lengths, 20.0)),
    ):
        settings = {
            "fine_tune_type": key,
            "num_layers": 4,
            "lora_parameters": {"rank": RANK, "scale": 20.0, "dropout": 0.0},
        }
        yield (
            name,
            Case(
                "mlx",
                tensors,
                {"a.b": (key, 20.0)},
                {"a.b": linear},
                {"a.b.weight": change},
                file="adapters.safetensors",
                config=settings,
            ),
        )
    table, features = random(RANK, 10), random(OUT, RANK)
    settings = {
        "fine_tune_type": "lora",
        "num_layers": 4,
        "lora_parameters": {"rank": RANK, "scale": 2.0, "dropout": 0.0},
    }
    yield (
        "mlx embedding",
        Case(
            "mlx",
            {"a.embed_tokens.lora_a": table.T.contiguous(), "a.embed_tokens.lora_b": features.T.contiguous()},
            {"a.embed_tokens": ("lora", 2.0)},
            {"a.embed_tokens": embedding},
            {"a.embed_tokens.weight": plus((features @ table).T, 2.0)},
            file="adapters.safetensors",
            config=settings,
        ),
    )
    for alpha, scale in ((3.0, 1.5), (0.0, 1.0)):
        layer = "model.layers.0.mlp.down_proj"
        tensors = {"blk.0.ffn_down.weight.lora_a": down, "blk.0.ffn_down.weight.lora_b": up}
        tensors |= {"token_embd.weight.lora_a": table.T.contiguous(), "token_embd.weight.lora_b": features}
        yield (
            f"gguf alpha {alpha}",
            Case(
                "gguf",
                {},
                {layer: ("lora", scale), "model.embed_tokens": ("lora", scale)},
                {layer: linear, "model.embed_tokens": embedding},
                {f"{layer}.weight": plus(delta, scale), "model.embed_tokens.weight": plus((features @ table).T, scale)},
                file="file.gguf",
                whole=gguf_bytes(tensors, alpha),
            ),
        )
    native = {"a.b/lora_A": down, "a.b/lora_B": up}
    about = {
        "version": 1,
        "base_model": None,
        "layers": {"a.b": {"method": "lora", "hyperparameters": {"rank": RANK, "alpha": 3.0}}},
    }
    yield (
        "native",
        Case(
            "fluxion",
            native,
            {"a.b": ("lora", 1.5)},
            {"a.b": linear},
            {"a.b.weight": plus(delta, 1.5)},
            metadata={"fluxion_adapter": json.dumps(about)},
        ),
    )


def gguf_bytes(tensors: Tensors, alpha: float) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.gguf")
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, tensor in tensors.items():
            writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


@cache
def corpus() -> dict[str, Case]:
    """All cases, by the name of the format and their own."""
    kinds = {
        "lycoris": kohya_cases,
        "comfyui": comfyui_cases,
        "diffusers": diffusers_cases,
        "peft": peft_cases,
        "": other_cases,
    }
    return {f"{kind} {name}".strip(): case for kind, make in kinds.items() for name, case in make()}
