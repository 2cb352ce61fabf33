"""Training patched models: by hand, by transformers' Trainer, in mixed precision, with gradient checkpointing."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

import adapters
from adapters import LoRA, Patch
from tests.adapters.models import Case, perturb, snapshot
from tests.adapters.pretrained import build
from tests.thinned import exhaustive


def patched(name: str, method: LoRA | None = None, **options: Any) -> tuple[Case, Patch]:
    case = build(name)
    patch = adapters.inject(case.model, method or LoRA(rank=2, alpha=4), **options)
    perturb(patch, std=0.1)
    return case, patch


def gradients(case: Case, patch: Patch) -> dict[str, Tensor]:
    for parameter in patch.parameters():
        parameter.grad = None
    torch.default_generator.manual_seed(0)
    case.run(case.model, case.inputs).float().square().mean().backward()
    return {name: parameter.grad for name, parameter in patch.named_parameters() if parameter.grad is not None}


# Trainer


class Sentences(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(3, 20, (16, 6), generator=generator)

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def trainer(folder: Path, case: Case, **options: Any) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        num_train_epochs=2,
        save_strategy="steps",
        save_steps=3,
        logging_steps=1,
        learning_rate=0.01,
        seed=1,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(model=case.model, args=arguments, train_dataset=Sentences())


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [("llama", True), ("gpt2", False), exhaustive("llama", False), exhaustive("gpt2", True)],
)
def test_trainer_trains_and_resumes(name: str, checkpointing: bool, tmp_path: Path) -> None:
    """A run that is resumed half way ends with the bits of one that was not, and the base has not moved."""
    method = LoRA(rank=2, dropout=0.2)
    case, patch = patched(name, method)
    with adapters.use(case.model):
        base = case()
    start = {key: value.clone() for key, value in patch.state_dict().items()}
    whole = trainer(tmp_path, case, gradient_checkpointing=checkpointing)
    whole.train()
    losses = [entry["loss"] for entry in whole.state.log_history if "loss" in entry]
    assert len(losses) == 8
    assert all(not torch.equal(value, start[key]) for key, value in patch.state_dict().items())
    case.model.eval()
    with adapters.use(case.model):
        assert torch.equal(case(), base)

    again, second = patched(name, method)
    resumed = trainer(tmp_path, again, gradient_checkpointing=checkpointing)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [entry["loss"] for entry in resumed.state.log_history if "loss" in entry] == losses
    for key, value in second.state_dict().items():
        assert torch.equal(value, patch.state_dict()[key]), key
    again.model.eval()
    assert torch.equal(again(), case())


# Gradients


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama", "t5", "vit", "whisper", "mixtral", "unet", "flux", "vae"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(name: str, reentrant: bool) -> None:
    case, patch = patched(name, LoRA(rank=2, dropout=0.2))
    case.model.train()
    expected = gradients(case, patch)
    if hasattr(case.model, "gradient_checkpointing_enable"):
        case.model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    else:  # diffusers takes the function.

        def checkpoint(function: Callable[..., Any], *args: Any) -> Any:
            return torch.utils.checkpoint.checkpoint(function, *args, use_reentrant=reentrant)

        case.model.enable_gradient_checkpointing(checkpoint)
    found = gradients(case, patch)
    assert found.keys() == expected.keys()
    assert len(found) >= len(list(patch.parameters())) - 2  # T5 does not use its `shared` layer.
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6, msg=key)


def test_choices_reach_the_second_forward_of_gradient_checkpointing() -> None:
    case, patch = patched("llama")
    other = adapters.inject(case.model, LoRA(rank=2), name="other")
    perturb(other, 3)
    case.model.train()
    with adapters.use(case.model, {"default": 0.5}):
        expected = gradients(case, patch)
        case.model.gradient_checkpointing_enable({"use_reentrant": False})
        found = gradients(case, patch)
    assert all(parameter.grad is None for parameter in other.parameters())
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["bert", "t5", "mixtral", "unet"])
def test_gradients_are_those_of_the_merged_weights(name: str) -> None:
    """By the chain rule: of `W + s B A`, `dA = s Bᵀ dW` and `dB = s dW Aᵀ`."""
    targets = nn.Linear if name != "mixtral" else [nn.Linear, "experts.gate_up_proj", "experts.down_proj"]
    case, patch = patched(name, targets=targets, exclude="lm_head" if name in ("t5", "mixtral") else None)
    values, found = patch.state_dict(), gradients(case, patch)
    paths = list(patch.targets)
    patch.merge_and_eject()
    plain = dict(case.model.named_parameters(remove_duplicate=False))
    weights = {path: plain.get(f"{path}.weight", plain.get(path)) for path in paths}
    torch.default_generator.manual_seed(0)
    loss = case.run(case.model, case.inputs).square().mean()
    updates = dict(zip(paths, torch.autograd.grad(loss, list(weights.values())), strict=True))
    for path, update in updates.items():
        down, up = (f"{path}.lora_{letter}.weight" for letter in "AB")
        close(found[down], 2 * values[up].mT @ update)
        close(found[up], 2 * update @ values[down].mT)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * expected.abs().max().item() + 1e-9)


# Precision


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "mixtral", "unet", "vae"])
@pytest.mark.parametrize("adapter", [None, torch.float32])
def test_autocast(name: str, adapter: torch.dtype | None) -> None:
    """Products are computed in half precision, parameters and their gradients stay in single precision."""
    case, patch = patched(name, dtype=adapter)
    exact, exact_gradients = case(), gradients(case, patch)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, found = [case()], gradients(case, patch)
        with adapters.use(case.model):
            base = case()
        patch.merge()
        outputs.append(case())
    size = exact.abs().mean()
    assert (exact - base).abs().mean() > 0.2 * size
    for output in outputs:  # A few roundings to eight bits, added up over the layers.
        assert (output - exact).abs().mean() < 0.05 * size
    assert {value.dtype for value in found.values()} == {torch.float32}
    for key, value in found.items():
        assert nn.functional.cosine_similarity(value.flatten(), exact_gradients[key].flatten(), dim=0) > 0.9, key


@pytest.mark.parametrize("name", ["bert", "llama", "t5", "whisper", "unet", "vae"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_wide_adapter_on_a_narrow_base(name: str, dtype: torch.dtype) -> None:
    case = build(name)
    case.model.to(dtype)
    if case.inputs.is_floating_point():
        case.inputs = case.inputs.to(dtype)
    before, whole = snapshot(case.model), case()
    patch = adapters.inject(case.model, LoRA(rank=2), dtype=torch.float32)
    with adapters.use(case.model):  # Torch rounds half-precision convolutions otherwise when they are frozen.
        base = case()
    assert torch.equal(case(), base)
    perturb(patch, std=0.1)
    output = case()
    assert output.dtype == base.dtype
    assert not torch.equal(output, base)
    optimizer = torch.optim.SGD(patch.parameters(), lr=1e-4)
    for value in gradients(case, patch).values():
        assert value.dtype == torch.float32
        assert value.isfinite().all()
    held = {key: value.clone() for key, value in patch.state_dict().items()}
    optimizer.step()  # A step that a bf16 or fp16 adapter would round away.
    assert any(not torch.equal(patch.state_dict()[key], value) for key, value in held.items())
    patch.eject()
    assert snapshot(case.model) == before
    assert torch.equal(case(), whole)


# Modes and optimizers


def test_dropout_acts_in_training_only() -> None:
    case, patch = patched("llama", LoRA(rank=2, dropout=0.5))
    plain, twin = patched("llama", LoRA(rank=2))
    twin.load_state_dict(patch.state_dict())
    assert torch.equal(case(), plain())
    case.model.train()
    plain.model.train()  # Llama has no dropout of its own.
    torch.default_generator.manual_seed(0)
    first = case()
    assert not torch.equal(first, case())
    torch.default_generator.manual_seed(0)
    assert torch.equal(first, case())
    assert torch.equal(plain(), plain())
    patch.merge()  # What is merged cannot be dropped.
    torch.testing.assert_close(case(), plain(), rtol=1e-4, atol=1e-5)
    patch.unmerge()
    case.model.eval()
    assert torch.equal(case(), plain())


def test_a_dropped_input_is_the_average_of_what_is_kept() -> None:
    model = nn.Sequential(nn.Linear(4, 3))
    patch = adapters.inject(model, LoRA(rank=2, dropout=0.5))
    perturb(patch, std=1.0)
    x = torch.randn(1, 4)
    expected = model.eval()(x)
    torch.default_generator.manual_seed(0)
    average = model.train()(x.expand(40_000, -1)).mean(0, keepdim=True)
    torch.testing.assert_close(average, expected, rtol=0.05, atol=0.05)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "adamw foreach": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, foreach=True),
    "adamw fused": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.5),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_any_optimizer(kind: str) -> None:
    case = build("bert")
    base = {key: value.clone() for key, value in case.model.state_dict().items()}
    patch = adapters.inject(case.model, LoRA(rank=2), seed=0)
    optimizer = OPTIMIZERS[kind](patch.parameters())
    target = torch.tensor([0, 1, 1, 0])
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(case.run(case.model, case.inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    assert all(torch.equal(value, case.model.state_dict()[key]) for key, value in base.items())
    assert all(parameter.grad is None for parameter in set(case.model.parameters()) - set(patch.parameters()))


def test_groups_of_parameters_have_rates_of_their_own() -> None:
    """LoRA+ trains B faster than A: the names say which is which."""
    case, patch = patched("bert")
    groups = {letter: [p for name, p in patch.named_parameters() if f".lora_{letter}." in name] for letter in "AB"}
    assert sum(map(len, groups.values())) == len(list(patch.parameters()))
    before = {letter: [p.detach().clone() for p in group] for letter, group in groups.items()}
    gradients(case, patch)
    rates = {"A": 0.001, "B": 0.016}
    torch.optim.SGD([{"params": groups[letter], "lr": rates[letter]} for letter in "AB"]).step()
    for letter, group in groups.items():
        for old, new in zip(before[letter], group, strict=True):
            assert new.grad is not None
            torch.testing.assert_close(new.detach(), old - rates[letter] * new.grad)


@pytest.mark.parametrize("tied", [False, True])
def test_each_layer_drops_inputs_in_its_own_mode(tied: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if tied:
        model[1].weight = model[0].weight
    patch = adapters.inject(model, LoRA(rank=2, dropout=0.5))
    for source in (patch, None):
        if source is None:
            patch.save_pretrained(tmp_path)
            patch.eject()
            adapters.load(model, tmp_path, trainable=True)
        for modes in ((True, False), (False, True)):
            for layer, mode in zip(model, modes, strict=True):
                layer.train(mode)
            dropouts = [[m.training for m in layer.modules() if isinstance(m, nn.Dropout)] for layer in model]
            assert dropouts == [[mode] for mode in modes]
