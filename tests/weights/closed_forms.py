"""What one layer of a file may hold, by the ends of names in LyCORIS' files, and what becomes of its weight then.

Each is written as a closed form.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
Tensors = dict[str, Tensor]
IN, OUT, RANK = 6, 8, 2


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


def decomposed_on_inputs(delta: Tensor, lengths: Tensor, scale: float = 1.0) -> Change:
    """The columns of each input of the changed weight, of these lengths."""

    def change(weight: Tensor) -> Tensor:
        changed = weight + (scale * delta).view_as(weight)
        others = [dim for dim in range(weight.ndim) if dim != 1]
        shape = (1, -1, *(1 for _ in others[1:]))
        return lengths.view(shape) * changed / changed.square().sum(others, keepdim=True).sqrt()

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
    torch.default_generator.manual_seed(0)
    up, down, alpha = random(OUT, RANK), random(RANK, IN), torch.tensor(3.0)
    lora = {"lora_up.weight": up, "lora_down.weight": down}
    up4, down4 = random(OUT, RANK, 1, 1), random(RANK, IN, 3, 3)
    lora4 = {"lora_up.weight": up4, "lora_down.weight": down4}
    flat, core = random(RANK, IN, 1, 1), random(RANK, RANK, 3, 3)
    tuckered = tucker(core, up.T, flat.flatten(1))
    lengths, longer = torch.rand(OUT, 1) + 0.5, torch.rand(2 * OUT, 1) + 0.5
    of_inputs = torch.rand(1, IN) + 0.5
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
        "dora of inputs": Method(
            "dora",
            linear,
            {**lora, "dora_scale": of_inputs, "alpha": alpha},
            decomposed_on_inputs(up @ down, of_inputs, 1.5),
            1.5,
        ),
        "dora of inputs of a convolution": Method(
            "dora",
            conv,
            {**lora4, "dora_scale": of_inputs.view(1, IN, 1, 1)},
            decomposed_on_inputs(times(up4, down4), of_inputs),
            1.0,
        ),
        "doha of inputs": Method(
            "doha", linear, {**hada, "dora_scale": of_inputs}, decomposed_on_inputs(hada_delta, of_inputs), 1.0
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
