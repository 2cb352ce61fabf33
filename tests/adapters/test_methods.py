"""Every promise, for every method on every kind of layer."""

from __future__ import annotations

import copy
import gc
import math
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import adapters
import fluxion as fl
from adapters import (
    BOFT,
    C3A,
    HRA,
    IA3,
    OFT,
    AdaLoRA,
    Bat,
    BitFit,
    Bottleneck,
    Copy,
    DeLoRA,
    DiagOFT,
    DoHa,
    DoKr,
    DoRA,
    FourierFT,
    Full,
    GLoRA,
    GraLoRA,
    HiRA,
    LoHa,
    LoKr,
    LoRA,
    LycorisGLoRA,
    Method,
    MiSS,
    NormTuning,
    OutputBOFT,
    RandLoRA,
    RoAd,
    SHiRA,
    TargetError,
    TrainableTokens,
    VBLoRA,
    VeRA,
)
from tests.adapters.models import snapshot
from tests.adapters.support import ADAPTED, MAIN, UNTRIED
from tests.adapters.test_layers import KINDS as LAYERS
from tests.adapters.test_layers import floats, wrapped
from tests.thinned import one_in

NORMS: dict[str, Any] = {
    "layer normalisation": (lambda: wrapped(nn.LayerNorm((3, 4))), floats(4, 3, 4), None),
    "group normalisation": (lambda: wrapped(nn.GroupNorm(2, 4)), floats(4, 4, 5), None),
    "batch normalisation": (lambda: wrapped(nn.BatchNorm2d(4)), floats(4, 4, 3, 2), None),
    "instance normalisation": (lambda: wrapped(nn.InstanceNorm1d(4, affine=True)), floats(4, 4, 5), None),
    "root mean square normalisation": (lambda: wrapped(nn.RMSNorm(4)), floats(4, 3, 4), None),
}
KINDS = {**LAYERS, **NORMS}


@dataclass
class Variant:
    """A method with numbers, and what is particular about it.

    Attributes:
        method: The method.
        starts_at: How far the start may be off the identity, 0 for not a bit, infinity where it is not meant to be it.
        targets: What to adapt, where `KINDS` does not say.
    """

    method: Method
    starts_at: float = 1e-12
    targets: Any = None


def called(path: str, module: nn.Module) -> bool:
    """Layers, torch's attention among them, but no containers."""
    return isinstance(module, nn.MultiheadAttention) or not list(module.children())


VARIANTS: dict[str, Variant] = {
    "lora": Variant(LoRA(rank=2, alpha=3)),
    "rslora": Variant(LoRA(rank=3, alpha=2, rslora=True)),
    "lora with bias": Variant(LoRA(rank=2, bias=True)),
    "pissa": Variant(LoRA(rank=2, alpha=3, init="pissa")),
    "olora": Variant(LoRA(rank=2, alpha=3, init="olora")),
    "orthogonal": Variant(LoRA(rank=2, alpha=3, init="orthogonal")),
    "gaussian": Variant(LoRA(rank=2, init="gaussian")),
    "eva": Variant(LoRA(rank=2, alpha=3, init="eva")),
    "lora_ga": Variant(LoRA(rank=2, alpha=3, init="lora_ga")),
    "dora": Variant(DoRA(rank=2, alpha=3)),
    "rsdora": Variant(DoRA(rank=3, alpha=2, rslora=True)),
    "dora of inputs": Variant(DoRA(rank=2, alpha=3, on_inputs=True)),
    "dora from pissa": Variant(DoRA(rank=2, alpha=3, init="pissa")),
    "adalora": Variant(AdaLoRA(rank=3, alpha=5)),
    "pruned adalora": Variant(AdaLoRA(rank=12, alpha=30, kept=2)),
    "loha": Variant(LoHa(rank=2, alpha=3)),
    "loha with cores": Variant(LoHa(rank=3, alpha=2, tucker=True)),
    "doha": Variant(DoHa(rank=2, alpha=3)),
    "lokr": Variant(LoKr(rank=1, alpha=2)),
    "lokr of full factors": Variant(LoKr(rank=8, alpha=4)),
    "lokr of two decomposed factors": Variant(LoKr(rank=1, factor=4, decompose_both=True)),
    "lokr with a core": Variant(LoKr(rank=1, alpha=2, factor=2, tucker=True)),
    "dokr": Variant(DoKr(rank=1, alpha=2)),
    "dokr of inputs": Variant(DoKr(rank=1, alpha=2, on_inputs=True)),
    "copy": Variant(Copy(), targets=nn.Module),
    "oft": Variant(OFT(block_size=2)),
    "oft of blocks": Variant(OFT(blocks=2, num_terms=2)),
    "oft, exact": Variant(OFT(block_size=3, cayley_neumann=False)),
    "oft, shared": Variant(OFT(block_size=2, block_share=True, num_terms=3)),
    "coft": Variant(OFT(block_size=2, coft=True, eps=0.5)),
    "diag-oft": Variant(DiagOFT(block_size=2, rescale=True)),
    "diag-oft, one block": Variant(DiagOFT(blocks=1)),
    "diag-oft, constrained": Variant(DiagOFT(block_size=3, constraint=0.1)),
    "boft": Variant(BOFT(block_size=2)),
    "boft of one block": Variant(BOFT(blocks=1)),
    "boft of two factors": Variant(BOFT(block_size=2, factors=2)),
    "output boft": Variant(OutputBOFT(block_size=2, rescale=True)),
    "output boft, constrained": Variant(OutputBOFT(blocks=2, constraint=0.1, factors=1)),
    "hra": Variant(HRA(rank=4)),
    # No odd number of reflections, and no orthogonal ones, are the identity.
    "hra of odd rank": Variant(HRA(rank=3), starts_at=math.inf),
    "hra, orthogonal": Variant(HRA(rank=2, gram_schmidt=True), starts_at=math.inf),
    "c3a": Variant(C3A(block_size=2)),
    "c3a of ones": Variant(C3A(block_size=1)),
    "miss": Variant(MiSS(rank=3)),
    "mini miss": Variant(MiSS(rank=2, mini_r=2)),
    "bat": Variant(Bat(rank=2)),
    "ia3": Variant(IA3()),
    "ia3 that leaves the bias": Variant(IA3(bias=False)),
    "ia3 of the input": Variant(IA3(feedforward=True)),
    "road_1": Variant(RoAd(group_size=2)),
    "road_2": Variant(RoAd("road_2", group_size=4)),
    "road_4": Variant(RoAd("road_4", group_size=2)),
    "glora": Variant(GLoRA(rank=2)),
    "glora of vectors": Variant(GLoRA(config_a_b="vector", config_c="vector", config_d_e="vector")),
    "glora of constants": Variant(GLoRA(config_a_b="constant", config_c="none", config_d_e="constant")),
    "glora of biases": Variant(GLoRA(rank=2, config_a_b="none")),
    "lycoris-glora": Variant(LycorisGLoRA(rank=2, alpha=3)),
    "hira": Variant(HiRA(rank=2)),
    "delora": Variant(DeLoRA(rank=2, boundary=3)),
    "vera": Variant(VeRA(rank=3, d_initial=0.5)),
    "vera from another seed": Variant(VeRA(rank=1, seed=5)),
    "randlora": Variant(RandLoRA(rank=3, alpha=60)),
    "sparse randlora": Variant(RandLoRA(rank=3, alpha=20, sparse=True, seed=4)),
    "very sparse randlora": Variant(RandLoRA(rank=2, alpha=20, very_sparse=True, seed=3)),
    # The bank cannot start at zero, see its class.
    "vblora": Variant(VBLoRA(rank=3, num_vectors=5, vector_length=2), starts_at=0.02),
    "vblora of pieces of one": Variant(VBLoRA(rank=2, num_vectors=7, vector_length=1, topk=3), starts_at=0.02),
    "fourierft": Variant(FourierFT(n_frequency=6)),
    "fourierft of one frequency": Variant(FourierFT(n_frequency=1, scaling=30.0, seed=1)),
    "gralora": Variant(GraLoRA(rank=2, alpha=3, blocks=1)),
    "gralora of blocks": Variant(GraLoRA(rank=4, alpha=3)),
    "hybrid gralora": Variant(GraLoRA(rank=2, hybrid_rank=1)),
    "shira": Variant(SHiRA(rank=1)),
    "shira from a seed": Variant(SHiRA(rank=1, seed=4)),
    "full": Variant(Full()),
    "full with bias": Variant(Full(bias=True)),
    "bitfit": Variant(BitFit()),
    "norm": Variant(NormTuning()),
    "tokens": Variant(TrainableTokens((3, 0, 1)), targets=lambda _, layer: isinstance(layer, nn.Embedding | nn.Linear)),
    "bottleneck": Variant(Bottleneck(size=3, activation="gelu"), targets=called),
    "parallel bottleneck": Variant(
        Bottleneck(reduction=2, activation="tanh", parallel=True, scaling=2.0, norm=True), targets=called
    ),
}


def perturb(patch: adapters.Patch, seed: int) -> None:
    """Move every tensor that is trained by a little, whatever it is."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in patch.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            parameter.add_(noise * 0.3)


class Product:
    """A model with a layer of some kind, and a method that can adapt it."""

    def __init__(self, variant: str, kind: str) -> None:
        torch.default_generator.manual_seed(0)
        make, sample, targets = KINDS[kind]
        self.kind, self.variant = kind, VARIANTS[variant]
        self.model, self.x = make().double().eval(), sample()
        self.targets = self.variant.targets if targets is None else targets
        self.wide = self.x.is_floating_point()
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.endswith("bias"):  # Some start at zero, where multiplying them would do nothing.
                    parameter.normal_()
            self.model(self.x)  # An embedding with max_norm shortens its own rows when it first reads them.

    def inject(self, name: str = "a", **options: Any) -> adapters.Patch:
        return adapters.inject(self.model, self.variant.method, self.targets, name=name, **options)

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.model(self.x)


SUPPORTED = [(variant, kind) for variant in VARIANTS for kind in KINDS if kind in ADAPTED[variant]]
# LoRA on all kinds of layers, every method on the first kind that it adapts, and one in fifteen of all.
PAIRS = one_in(15, ((pair,) for pair in SUPPORTED), key=lambda case: case if case[0][0] == "lora" else case[0][0])


def named(pair: tuple[str, str]) -> str:
    return "-".join(pair)


@pytest.fixture(params=PAIRS, ids=named)
def product(request: pytest.FixtureRequest) -> Product:
    return Product(*request.param)


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_all_promises(product: Product) -> None:
    model, before = product.model, snapshot(product.model)
    keys = set(model.state_dict())
    whole = product()
    for parameter in model.parameters():  # Torch's attention rounds otherwise for parameters that need no gradient.
        parameter.requires_grad_(False)
    base = product()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    patches = [product.inject(name, seed=number) for number, name in enumerate("ab")]
    # At the start nothing has changed, and base keys are what they were.
    torch.testing.assert_close(product(), base, rtol=product.variant.starts_at, atol=product.variant.starts_at)
    assert keys <= set(model.state_dict())
    for number, patch in enumerate(patches):
        perturb(patch, number)
    outputs = {}
    for choice in ((), ("a",), ("b",), ("a", "b")):
        with adapters.use(model, *choice):
            outputs[choice] = product()
    assert torch.equal(outputs[()], base)
    for one in (("a",), ("b",)):
        assert not torch.allclose(outputs[one], base, rtol=1e-4, atol=1e-4)
    # Half a patch lies on the way, and scale 0 is the base to the bit.
    with adapters.use(model, {"a": 0.5}):
        half = product()
    assert not torch.allclose(half, base, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(half, outputs["a",], rtol=1e-4, atol=1e-4)
    patches[0].scale = patches[1].scale = 0.0
    assert torch.equal(product(), base)
    patches[0].scale = patches[1].scale = 1.0
    # Activation is local: each thread has its own.
    seen: dict[tuple[str, ...], Tensor] = {}

    def run(choice: tuple[str, ...]) -> None:
        torch.set_num_threads(1)  # A new thread has a number of its own, and products of matrices round by it.
        with adapters.use(model, *choice):
            seen[choice] = product()

    threads = [threading.Thread(target=run, args=(choice,)) for choice in outputs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(seen[choice], output) for choice, output in outputs.items())
    # Each row is what it is in a batch that has the same for all.
    with adapters.use(model, rows=["b", None, ("a", "b"), {"a": 0.5}]):
        if product.kind == "weight read by the model":
            with pytest.raises(adapters.AdapterError, match="read by its weight"):
                product()
        else:
            close(product(), torch.stack([outputs["b",][0], base[1], outputs["a", "b"][2], half[3]]))
    # Merged in either order they compute the same, and unmerged every bit is back.
    if product.variant.method.mergeable:
        for order in (patches, patches[::-1]):
            for patch in order:
                patch.merge()
                close(product(), outputs["a", "b"])
            for choice, output in outputs.items():
                with adapters.use(model, *choice):
                    close(product(), output)
            for patch in order:
                patch.unmerge()
            assert torch.equal(product(), outputs["a", "b"])
    else:
        for call in (patches[0].merge, patches[0].merge_and_eject):
            with pytest.raises(adapters.PatchStateError, match="is no change of weights"):
                call()
        assert torch.equal(product(), outputs["a", "b"])
    # A copy is a model of its own.
    twin = copy.deepcopy(model)
    with torch.no_grad():
        assert torch.equal(twin(product.x), outputs["a", "b"])
    for patch in patches:
        patch.eject()
    assert torch.equal(product(), whole)
    assert snapshot(model) == before
    patches[0].inject()
    assert torch.equal(product(), outputs["a",])
    patches[0].eject()
    assert snapshot(model) == before


def test_nothing_keeps_an_ejected_patch_alive(product: Product) -> None:
    gc.freeze()  # What was there before is not looked through.
    patch = product.inject()
    product()
    if product.variant.method.mergeable:
        patch.merge()
    patch.eject()
    gone = weakref.ref(patch)
    del patch
    gc.collect()
    gc.unfreeze()
    assert gone() is None


def test_gradients_reach_every_tensor(product: Product) -> None:
    patch = product.inject()
    perturb(patch, 1)
    output = product.model(product.x)
    (output * torch.randn_like(output)).sum().backward()  # Not its norm, which rotations leave as it is.
    for name, parameter in patch.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name
    assert all(parameter.grad is None for parameter in product.model.parameters() if not parameter.requires_grad)


def test_merged_for_good(product: Product) -> None:
    patch = product.inject()
    perturb(patch, 1)
    if not product.variant.method.mergeable or product.kind.endswith("norm") or product.kind == "orthogonal":
        return
    expected = product()
    patch.merge_and_eject()
    close(product(), expected)
    assert not list(fl.walk(product.model, adapters.AdaptedLayer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_narrow_dtypes(product: Product, dtype: torch.dtype) -> None:
    product.model.to(dtype)
    product.x = product.x.to(dtype) if product.wide else product.x
    patch = product.inject()
    perturb(patch, 1)
    expected = product()
    assert expected.dtype == dtype and expected.isfinite().all()
    if product.variant.method.mergeable:
        patch.merge()
        tolerance = 1e-4 if dtype == torch.float32 else 0.15
        torch.testing.assert_close(product(), expected, rtol=tolerance, atol=tolerance)


def test_state_comes_back(product: Product) -> None:
    """By the patch's own dict into another patch, and by the model's into another model, constants included."""
    patch = product.inject(seed=1)
    perturb(patch, 1)
    expected, state, whole = product(), patch.state_dict(), copy.deepcopy(product.model.state_dict())
    patch.eject()
    other = product.inject(seed=2)
    other.load_state_dict(state)
    assert torch.equal(product(), expected)
    other.eject()
    product.inject(seed=3)
    product.model.load_state_dict(whole)
    assert torch.equal(product(), expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_of_what_a_method_adapts_is_right(variant: str) -> None:
    """What is not in it is refused, with a reason, and the model stays as it was."""
    first = next(name for name, one in VARIANTS.items() if type(one.method) is type(VARIANTS[variant].method))
    for kind in KINDS:
        product = Product(variant, kind)
        before = snapshot(product.model)
        try:
            product.inject().eject()
            injected = True
        except TargetError as error:
            injected = False
            assert len(str(error)) > 20
        assert snapshot(product.model) == before
        if kind in ADAPTED[variant]:
            assert injected, kind
        elif variant == first or kind in MAIN:
            assert injected == (kind in UNTRIED.get(variant, ())), kind
