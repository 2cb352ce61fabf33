"""The models the promises are tried on, and a picture of everything about a model that must not change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

import fluxion as fl


@dataclass
class Case:
    """A model in evaluation mode, the inputs of a batch of four, and how to run it."""

    name: str
    model: nn.Module
    inputs: Tensor
    run: Callable[[nn.Module, Tensor], Tensor]

    def __call__(self) -> Tensor:
        with torch.no_grad():
            return self.run(self.model, self.inputs)


def _chain() -> Case:
    model = fl.Chain(
        fl.Residual(fl.Conv2d(4, 4, 3, padding=1, groups=2), fl.ReLU()),
        fl.Conv2d(4, 6, (3, 2), stride=2, dilation=2, padding=(1, 2), padding_mode="circular"),
        fl.Flatten(1),
        fl.Linear(6 * 3 * 5, 8),
        fl.ReLU(),
        fl.Linear(8, 5),
    )
    return Case("chain", model.eval(), torch.randn(4, 4, 8, 8), lambda m, x: m(x))


class _Plain(nn.Module):
    """Ordinary torch code: a block used twice, a layer under two names, a child that is None, a module list."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(6, 8)
        self.block = nn.Sequential(nn.Linear(8, 8), nn.GELU())
        self.again = self.block
        self.nothing = None
        self.steps = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(2)])
        self.alias = self.steps[0]
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.again(self.block(self.stem(x)))
        for step in (*self.steps, self.alias):
            x = torch.tanh(step(x))
        return self.head(x)


def _plain() -> Case:
    return Case("plain", _Plain().eval(), torch.randn(4, 6), lambda m, x: m(x))


def _encoder() -> Case:
    layer = nn.TransformerEncoderLayer(16, 2, dim_feedforward=24, batch_first=True)
    model = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)
    return Case("encoder", model.eval(), torch.randn(4, 5, 16), lambda m, x: m(x))


def _bert() -> Case:
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=16,
    )
    tokens = torch.randint(0, 50, (4, 7))

    def run(model: nn.Module, x: Tensor) -> Tensor:
        output = model(x)
        return torch.cat([output.last_hidden_state, output.pooler_output.unsqueeze(1)], dim=1)

    return Case("bert", BertModel(config).eval(), tokens, run)


BUILDERS = {"chain": _chain, "plain": _plain, "encoder": _encoder, "bert": _bert}


def build(name: str, seed: int = 0) -> Case:
    torch.default_generator.manual_seed(seed)
    return BUILDERS[name]()


def perturb(patch: Any, seed: int = 1, std: float = 0.2) -> None:
    """Give a patch values, so that it does something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in patch.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * std)


_HOOKS = [name for name in vars(nn.Linear(1, 1)) if "hooks" in name]


def snapshot(model: nn.Module) -> list[Any]:
    """Everything promised to be as before: objects, slots, order, values, flags, hooks, attribute names."""
    seen: list[Any] = [list(model.state_dict())]
    for path, module in model.named_modules(remove_duplicate=False):
        slots = [(key, id(child)) for key, child in module._modules.items()]
        hooks = {name: list(getattr(module, name)) for name in _HOOKS}
        seen.append((path, id(module), module.training, slots, sorted(vars(module)), hooks))
    for name, tensor in (*model.named_parameters(remove_duplicate=False), *model.named_buffers()):
        data = tensor.detach().contiguous()
        data = data.view(torch.uint8) if data.dim() else data
        place = (tensor.data_ptr(), tensor.shape, tensor.stride())
        seen.append((name, id(tensor), place, tensor.requires_grad, tensor.grad is None, data.numpy().tobytes()))
    return seen
