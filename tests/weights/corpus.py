"""One small file of every writer's kind, with what it says and what becomes of the weights of a model with it.

The names are those that the writers give: PEFT, diffusers, kohya's scripts, LyCORIS, ComfyUI, ai-toolkit, OneTrainer,
XLabs, Black Forest Labs, the trainer of Wan Fun, cloneofsimo/lora, torchtune, mlx-lm and llama.cpp. What becomes of a
weight is a closed form.
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
from torch import nn

import weights
from tests.weights.closed_forms import (
    IN,
    OUT,
    RANK,
    Change,
    Method,
    Tensors,
    conv,
    decomposed,
    embedding,
    linear,
    methods,
    no_bias,
    norm,
    on_inputs,
    plus,
    random,
    series,
    times,
)


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
        torch.default_generator.manual_seed(1)
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


def one(form: str, method: Method, place: str, key: str = "", path: str = "", **options: Any) -> Case:
    """A file with one layer.

    Args:
        form: The format.
        method: What is in it.
        place: The path of the layer in the model.
        key: What the names of its tensors begin with, by default the same.
        path: That of the layer in the file, by default the same, flattened where the format has it so.
        options: More of the case.
    """
    component, _, inside = place.partition(".") if place.startswith(COMPONENTS) else ("", "", place)
    path = path or (dotted(component, inside.replace(".", "_")) if form == "lycoris" else place)
    layers: dict[str, tuple[str, float | None]] = {path: (method.key, method.scale)}
    changes = {f"{place}.weight": method.change}
    if method.bias is not None:
        layers[f"{path}{'_' if form == 'lycoris' else '.'}bias"] = (method.key, None)
        changes[f"{place}.bias"] = plus(method.bias)
    tensors = {f"{key or place}.{end}": tensor for end, tensor in method.ends.items()}
    tensors |= options.pop("tensors", {})
    components = (path.partition(".")[0],) if path.startswith(COMPONENTS) else ()
    return Case(form, tensors, layers, {place: method.make}, changes, components, **options)


def dotted(*names: str) -> str:
    return ".".join(filter(None, names))


TEXT = ("text_encoder.", "text_encoder_2.", "text_encoder_3.")
PIPELINE = ("unet.", "transformer.", "transformer_2.", "prior.", *TEXT)
COMPONENTS = (*PIPELINE, "clip_l.", "clip_g.", "t5xxl.")
EMBEDDINGS = {"bundle_emb.<s1>.clip_l": torch.ones(2, 4), "bundle_emb.<s1>.clip_g_out": torch.ones(2, 4)}
WITH_EMBEDDINGS: Mapping[str, Any] = {"tensors": EMBEDDINGS, "others": tuple(EMBEDDINGS)}

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


def kohya_cases() -> Iterator[tuple[str, Case]]:
    known = methods()
    for name, method in known.items():
        if method.key != "copy":
            yield name, one("lycoris", method, "unet.down.0.to_q", "lora_unet_down_0_to_q")
    for prefix, component in KOHYA.items():
        method = known["diag-oft with a constraint" if prefix == "oft_unet" else "lora"]
        yield prefix, one("lycoris", method, dotted(component, "down.0.to_q"), f"{prefix}_down_0_to_q")
    # ai-toolkit
    yield "old lokr", one("lycoris", known["lokr"], "transformer_blocks.0.to_q", "lycoris_transformer_blocks_0_to_q")
    magnitude = spelled(known["dora"], "lora_up.weight", "magnitude")
    yield "magnitude", one("lycoris", magnitude, "unet.a.b", "lora_unet_a_b")
    # OneTrainer, whose KOHYA does not flatten one kind of name.
    dora = known["dora"]
    yield "OneTrainer LEGACY", one("lycoris", dora, "transformer.a.b", "lora_transformer_a_b", **WITH_EMBEDDINGS)
    yield "OneTrainer KOHYA", one("lycoris", dora, "text_encoder.a.b", "lora_te1_a_b", **WITH_EMBEDDINGS)
    scaled = dict(known["scaled oft"].ends)
    as_it_was = {"lora_unet.a.b.oft_R.scaled_oft": scaled.pop("oft_R.scaled_oft")}
    oft = replace(known["scaled oft"], ends=scaled)
    yield "OneTrainer KOHYA oft", one("lycoris", oft, "unet.a.b", "lora_unet_a_b", tensors=as_it_was)


def comfyui_cases() -> Iterator[tuple[str, Case]]:
    known, at = methods(), "diffusion_model.a.b"
    for name, method in known.items():
        yield name, one("comfyui", method, "unet.a.b", at)
    for prefix, (component, place) in COMFY.items():
        names = [dotted(front, "down.0.to_q") for front in (place, prefix, component)]
        yield f"prefix {prefix}", one("comfyui", known["lora"], *names)
    for spelling in SPELLINGS:
        yield spelling, one("comfyui", spelled(known["lora"], spelling), "unet.a.b", at)
    # `<layer>_lora.up.weight` is for the layer before it.
    plain = known["lora without alpha"]
    oldest = replace(plain, ends={end.removeprefix("lora_"): tensor for end, tensor in plain.ends.items()})
    yield "_lora.up.weight", one("comfyui", oldest, "unet.a.b", f"{at}_lora")
    for lengths in LENGTHS:
        yield f"dora {lengths}", one("comfyui", spelled(known["dora"], "lora_B.weight", lengths), "unet.a.b", at)
    flux = "double_blocks.0.img_attn.proj"
    yield "ai-toolkit", one("comfyui", spelled(plain, "lora_B.weight"), f"unet.{flux}", f"diffusion_model.{flux}")
    original, encoder = spelled(known["lora"], "lora_B.weight"), "text_encoders.clip_l.transformer.a.b"
    yield "OneTrainer ORIGINAL", one("comfyui", original, "a.b")
    yield "OneTrainer COMFY", one("comfyui", original, "text_encoder.a.b", encoder, "clip_l.a.b", **WITH_EMBEDDINGS)


def diffusers_cases() -> Iterator[tuple[str, Case]]:
    known = methods()
    plain = known["lora without alpha"]
    for component in PIPELINE:
        for spelling in ("lora_B.weight", "lora.up.weight", "lora_linear_layer.up.weight"):
            yield f"{component}{spelling}", one("diffusers", spelled(plain, spelling), f"{component}a.fc")
    lora, dora = (spelled(known[name], "lora_B.weight", "lora_magnitude_vector") for name in ("lora", "dora"))
    yield "with an alpha", one("diffusers", lora, "unet.a.b")
    for name, method in (("lora", lora), ("dora", dora)):
        # PEFT has alpha in the settings, and the lengths in one dimension.
        ends = {end: tensor for end, tensor in method.ends.items() if end != "alpha"}
        ends |= {end: ends[end].flatten() for end in ends if end == "lora_magnitude_vector"}
        for component in ("", "unet."):
            numbers = {"r": RANK, "lora_alpha": 3, "use_dora": name == "dora"}
            table = json.dumps({f"{component}{key}": value for key, value in numbers.items()})
            case = one("diffusers", replace(method, ends=ends), f"{component}a.b")
            yield f"{name} with metadata {component}", replace(case, metadata={"lora_adapter_metadata": table})
    for front in ("", "unet."):
        names = {"to_q": "to_q", "to_out.0": "to_out"}
        processors = {f"{front}a.attn1.{to}": f"{front}a.attn1.processor.{name}_lora" for to, name in names.items()}
        yield (
            f"processors {front}",
            Case(
                "diffusers",
                {
                    f"{stem}.{end.removeprefix('lora_')}": t
                    for stem in processors.values()
                    for end, t in plain.ends.items()
                },
                dict.fromkeys(processors, ("lora", 1.0)),
                dict.fromkeys(processors, linear),
                {f"{path}.weight": plain.change for path in processors},
                ("unet",) if front else (),
            ),
        )
    stem = "text_encoder.layers.0.self_attn"
    old = spelled(plain, "lora_linear_layer.up.weight")
    yield "old text encoder", one("diffusers", old, f"{stem}.q_proj", f"{stem}.to_q")
    folded = spelled(plain, "lora_B.weight")
    yield "OneTrainer DIFFUSERS", one("diffusers", folded, "transformer.a.b", **WITH_EMBEDDINGS)
    for name in ("loha", "lokr", "scaled oft"):
        yield f"OneTrainer DIFFUSERS {name}", one("diffusers", known[name], "unet.a.b")


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

    torch.default_generator.manual_seed(2)
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
    torch.default_generator.manual_seed(3)
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
