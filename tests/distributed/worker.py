"""Scenarios that `test_distributed.py` runs on several processes, and a table of what came out.

Each process computes the same on its own too: that is what training on several has to be equal to. Called with a folder
and the names of scenarios; after them comes the one of `elastic.py`, if it is named.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import CommDebugMode
from torch.distributed.tensor.parallel import parallelize_module
from torch.nn.parallel import DistributedDataParallel

import adapters
import fluxion as fl
from adapters import LoRA, Patch

STEPS, BATCH, WIDTH = 20, 8, 16
Model = Any


def chain() -> nn.Module:
    torch.default_generator.manual_seed(0)
    return fl.Chain(fl.Chain(fl.Linear(WIDTH, 32), fl.GeLU(), fl.Linear(32, WIDTH)) for _ in range(2))


def llama() -> nn.Module:
    import transformers  # Which takes seconds, and not every process needs it.

    torch.default_generator.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        attn_implementation="sdpa",
    )
    return transformers.LlamaForCausalLM(config)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    """The same for models of both kinds; a mean over rows, of which every process has as many."""
    if x.is_floating_point():
        return (model(x) - x.roll(1, -1)).square().mean()
    logits = model(input_ids=x, use_cache=False).logits
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def batch(step: int, words: bool) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    if words:
        return torch.randint(0, 64, (BATCH, 6), generator=generator)
    return torch.randn(BATCH, WIDTH, generator=generator, dtype=torch.float64)


KINDS: dict[str, tuple[Callable[[], nn.Module], bool, list[str]]] = {
    "chain": (chain, False, ["Linear_1", "Linear_2"]),
    "llama": (llama, True, ["q_proj", "v_proj", "gate_proj", "up_proj", "down_proj"]),
}


def plan_of(model: Model) -> Any:
    """How it is divided; a model of transformers says so itself."""
    return model.tp_plan if hasattr(model, "tp_plan") else {"*.Linear_1": "colwise", "*.Linear_2": "rowwise"}


# What several methods do, with as many steps as show that all of them train what they should.
METHODS: dict[str, adapters.Method] = {
    "adalora": adapters.AdaLoRA(rank=4),
    "dora": adapters.DoRA(rank=2),
    "lokr": adapters.LoKr(rank=2, factor=4),
    "oft": adapters.OFT(block_size=4),
    "full": adapters.Full(),
}
FEW = 4


def patched(kind: str, method: adapters.Method | None = None) -> tuple[nn.Module, Patch]:
    make, _, targets = KINDS[kind]
    model = make().double()  # Sums of parts differ from those of the whole by rounding alone.
    return model, adapters.inject(model, method or LoRA(rank=4, alpha=6), targets, name="style", seed=1)


def blocks(model: nn.Module) -> list[nn.Module]:
    return list(model) if isinstance(model, fl.Chain) else list(model.model.layers)


def train(
    model: nn.Module,
    patch: Patch,
    words: bool,
    mesh: DeviceMesh | None = None,
    steps: Iterable[int] = range(STEPS),
    optimizer: Any = None,
) -> list[float]:
    """Train, with a part of each batch for each process of a mesh. Returns the losses, of the whole batch."""
    optimizer = torch.optim.Adam(patch.parameters(), lr=1e-2) if optimizer is None else optimizer
    adaptive = isinstance(patch.attachments[0].branch.method, adapters.AdaLoRA)
    allocator = adapters.RankAllocator(patch, STEPS, target_rank=2) if adaptive else None
    losses = []
    for step in steps:
        x = batch(step, words)
        if mesh is not None:
            x = x.chunk(mesh.size())[mesh.get_local_rank()]
        loss = loss_of(model, x)
        loss.backward()
        optimizer.step()
        if allocator is not None:
            allocator.step(step)
        optimizer.zero_grad()
        losses.append(mean(loss, mesh))
    return losses


def trained(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    """What a checkpoint of the training holds."""
    state, moments = get_state_dict(model, optimizer)
    return {"model": state, "optimizer": moments}


def mean(loss: Tensor, mesh: DeviceMesh | None) -> float:
    value = loss.detach().clone()
    if mesh is not None:
        dist.all_reduce(value, group=mesh.get_group())
        value /= mesh.size()
    return float(value)


def nodes(model: nn.Module) -> list[adapters.AdaptedLayer]:
    return [module for module in model.modules() if isinstance(module, adapters.AdaptedLayer)]


UNITS: dict[str, Callable[[nn.Module], list[nn.Module]]] = {
    "root": lambda model: [],
    "block": blocks,
    "adapted layer": nodes,
    "inner layer": lambda model: [node.base for node in nodes(model)],
    "branch": lambda model: [branch for node in nodes(model) for branch in node.branches],
}


def shard(model: nn.Module, mesh: DeviceMesh, units: str = "block") -> None:
    for unit in UNITS[units](model):
        fully_shard(unit, mesh=mesh)
    fully_shard(model, mesh=mesh)


class Scenarios:
    """All of them, and what came out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.found = folder, {}
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.mesh = init_device_mesh("cpu", (self.world,))
        # Two processes are enough to try each way with each model.
        self.kinds = KINDS if self.world == 2 else {"chain": KINDS["chain"]}
        self.expected: dict[str, list[float]] = {}
        self.saved: dict[str, bytes] = {}
        for kind, (_, words, _) in KINDS.items():
            model, patch = patched(kind)
            self.expected[kind] = train(model, patch, words)
            self.saved[kind] = self.bytes_of(patch, f"{kind}-alone-{self.rank}")
            patch.eject()

    def bytes_of(self, patch: Patch, name: str) -> bytes:
        path = patch.save_pretrained(self.folder / name)
        return (path / "adapter_model.safetensors").read_bytes()

    def off(self, kind: str, losses: list[float]) -> float:
        return max(abs(one - other) for one, other in zip(losses, self.expected[kind], strict=True))

    def divide(self, model: nn.Module, mesh: DeviceMesh | None = None) -> None:
        parallelize_module(model, mesh or self.mesh, adapters.parallel_plan(model, plan_of(model)))

    def run(self, names: Sequence[str]) -> None:
        for name in names:
            try:
                outcome: Any = getattr(self, f"check_{name}")()
            except Exception:
                outcome = {"fault": traceback.format_exc()}
            gathered: list[Any] = [None] * self.world
            dist.all_gather_object(gathered, outcome)
            self.found[name] = gathered
        if self.rank == 0:
            (self.folder / "found.json").write_text(json.dumps(self.found))

    # Training

    def check_fsdp(self) -> dict[str, float]:
        return {kind: self.sharded(kind, "block") for kind in self.kinds}

    def check_units(self) -> dict[str, float]:
        """Each way of cutting a model into units, small ones and large ones."""
        return {units: self.sharded("chain", units) for units in UNITS}

    def check_units_of_llama(self) -> dict[str, float]:
        return {units: self.sharded("llama", units) for units in UNITS}

    def sharded(self, kind: str, units: str) -> float:
        model, patch = patched(kind)
        shard(model, self.mesh, units)
        return self.off(kind, train(model, patch, KINDS[kind][1], self.mesh))

    def check_ddp(self) -> dict[str, float]:
        found = {}
        for kind, (_, words, _) in self.kinds.items():
            model, patch = patched(kind)
            found[kind] = self.off(kind, train(DistributedDataParallel(model), patch, words, self.mesh))
        return found

    def check_tensor_parallel(self) -> dict[str, float]:
        found = {}
        for kind, (_, words, _) in self.kinds.items():
            model, patch = patched(kind)
            self.divide(model)
            found[kind] = self.off(kind, train(model, patch, words))
        return found

    def check_both(self) -> dict[str, float]:
        found = {}
        mesh = init_device_mesh("cpu", (self.world // 2, 2), mesh_dim_names=("data", "tensor"))
        for kind, (_, words, _) in KINDS.items():
            model, patch = patched(kind)
            self.divide(model, mesh["tensor"])
            shard(model, mesh["data"])
            found[kind] = self.off(kind, train(model, patch, words, mesh["data"]))
        return found

    def check_messages(self) -> dict[str, list[int]]:
        """How many there are in `forward` and in `backward` of the model alone, and with adapters."""
        found = {}
        for name, with_adapters in (("alone", False), ("adapted", True)):
            model = chain().double()
            if with_adapters:
                adapters.inject(model, LoRA(rank=4), KINDS["chain"][2], seed=1)
            x = batch(0, False).requires_grad_()
            self.divide(model)
            with CommDebugMode() as forward:
                loss = loss_of(model, x)
            with CommDebugMode() as backward:
                loss.backward()
            found[name] = [forward.get_total_counts(), backward.get_total_counts()]
        return found

    def check_checkpoint(self) -> dict[str, bool]:
        """What torch's checkpoints save of a model in parts is loaded into one in other parts, and training goes on."""
        found = {}
        model, patch = patched("chain")
        shard(model, self.mesh)
        whole_run = train(model, patch, False, self.mesh)
        for units in ("block", "root"):
            model, patch = patched("chain")
            shard(model, self.mesh)
            optimizer = torch.optim.Adam(patch.parameters(), lr=1e-2)
            first = train(model, patch, False, self.mesh, range(10), optimizer)
            path = self.folder / f"checkpoint-{units}"
            checkpoint.save(trained(model, optimizer), checkpoint_id=path)
            model, patch = patched("chain")
            shard(model, self.mesh, units)
            optimizer = torch.optim.Adam(patch.parameters(), lr=1e-2)
            state = trained(model, optimizer)
            checkpoint.load(state, checkpoint_id=path)
            set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
            rest = train(model, patch, False, self.mesh, range(10, STEPS), optimizer)
            found[units] = max(abs(a - b) for a, b in zip(first + rest, whole_run, strict=True)) < 1e-12
        return found

    def check_accelerate(self) -> bool:
        """`prepare`, `save_state` and `load_state` of accelerate, which wraps the model in DDP here."""
        import accelerate

        runs = []
        for resumed in (False, True):
            accelerator = accelerate.Accelerator(cpu=True)
            model, patch = patched("chain")
            optimizer = torch.optim.Adam(patch.parameters(), lr=1e-2)
            prepared, optimizer = accelerator.prepare(model, optimizer)
            if resumed:
                accelerator.load_state(str(self.folder / "accelerate"))
                runs.append(train(prepared, patch, False, self.mesh, range(10, STEPS), optimizer))
            else:
                train(prepared, patch, False, self.mesh, range(10), optimizer)
                accelerator.save_state(str(self.folder / "accelerate"))
                runs.append(train(prepared, patch, False, self.mesh, range(10, STEPS), optimizer))
        return runs[0] == runs[1] and max(map(abs, map(float.__sub__, runs[0], self.expected["chain"][10:]))) < 1e-9

    def check_methods(self) -> dict[str, bool]:
        """Each trains as in one process, and is merged and taken back to the bit."""
        found = {}
        x = batch(7, False)
        for name, method in METHODS.items():
            alone, own = patched("chain", method)
            model, patch = patched("chain", method)
            shard(model, self.mesh)
            losses = [train(*one, steps=range(FEW)) for one in ((alone, own, False), (model, patch, False, self.mesh))]
            found[f"{name}: trained"] = max(map(abs, map(float.__sub__, *losses))) < 1e-6
            found[f"{name}: changed"] = losses[0][0] != losses[0][-1]
            with torch.no_grad():
                before = {key: whole(tensor).clone() for key, tensor in model.state_dict().items()}
                expected = alone(x)
                patch.merge()
                found[f"{name}: merged"] = torch.allclose(model(x), expected, rtol=1e-6, atol=1e-6)
                patch.unmerge()
                after = {key: whole(tensor) for key, tensor in model.state_dict().items()}
                found[f"{name}: unmerged"] = all(torch.equal(after[key], tensor) for key, tensor in before.items())
        return found

    def check_combined(self) -> dict[str, bool]:
        """Patches are combined on a model in parts, as on a whole one."""
        x = batch(9, False)
        outputs = []
        for sharded in (False, True):
            model, first = patched("chain")
            second = adapters.inject(model, LoRA(rank=2), KINDS["chain"][2], name="other", seed=2)
            for number, (_, parameter) in enumerate([*first.named_parameters(), *second.named_parameters()]):
                parameter.data.normal_(generator=torch.Generator().manual_seed(number))
            if sharded:
                shard(model, self.mesh)
            both = {"style": 0.5, "other": 0.7}
            adapters.combine(model, both, name="exact")
            adapters.combine(model, both, name="svd", how="svd", rank=3)
            adapters.combine(model, both, name="ties", how="ties", density=0.5)
            with torch.no_grad():
                for how in ("exact", "svd", "ties"):
                    with adapters.use(model, how):
                        outputs.append((how, model(x)))
        return {
            how: torch.allclose(one, other) for (how, one), (_, other) in zip(outputs[:3], outputs[3:], strict=True)
        }

    def check_ignored(self) -> str:
        """Parameters that FSDP was told to leave out are not trained unnoticed."""
        model, patch = patched("chain")
        fully_shard(model, mesh=self.mesh, ignored_params={*patch.parameters()})
        try:
            patch.parameters()
        except adapters.PatchStateError as error:
            return str(error)
        return "done"

    def check_compiled(self) -> bool:
        """A model in parts, compiled, computes the same."""
        model, patch = patched("chain")
        patch.load_state_dict({key: torch.ones_like(tensor) for key, tensor in patch.state_dict().items()})
        x = batch(8, False)
        with torch.no_grad():
            expected = model(x)
            self.divide(model)
            return torch.allclose(torch.compile(model, backend="eager")(x), expected)

    # After sharding

    def check_too_late(self) -> dict[str, str]:
        """What would train wrong is refused, and nothing is changed."""
        found = {}

        def attempt(name: str, model: nn.Module, act: Callable[[], object]) -> None:
            before = [(key, id(module)) for key, module in model.named_modules()]
            try:
                act()
                found[name] = "done"
            except adapters.TargetError as error:
                same = before == [(key, id(module)) for key, module in model.named_modules()]
                found[name] = f"{error}{'' if same else ' (changed)'}"

        path = self.folder / f"chain-alone-{self.rank}"
        for name in ("fsdp", "fsdp after a step", "ddp", "tensor"):
            model: nn.Module = chain().double()
            if name == "tensor":
                self.divide(model)
            elif name == "ddp":
                model = DistributedDataParallel(model)
            else:
                shard(model, self.mesh, "root")
            if name == "fsdp after a step":
                loss_of(model, batch(0, False)).backward()
            attempt(name, model, lambda model=model: adapters.inject(model, LoRA(rank=2)))  # type: ignore[misc]
            inner = model.module if name == "ddp" else model
            attempt(f"{name}, loaded to train", model, lambda m=inner: adapters.load(m, path, trainable=True))  # type: ignore[misc]
        return found

    def check_loaded_after_sharding(self) -> bool:
        """An adapter that is not trained may come later."""
        model, patch = patched("chain")
        path = self.folder / f"chain-alone-{self.rank}"
        patch.eject()
        adapters.load(model, path)
        x = batch(3, False)
        with torch.no_grad():
            expected = model(x)
            other = chain().double()
            shard(other, self.mesh)
            adapters.load(other, path)
            return torch.equal(other(x), expected)

    def check_used(self) -> dict[str, bool]:
        """Switching, weighing, merging, saving, loading and ejecting, each as in one process."""
        found: dict[str, bool] = {}
        x = batch(5, False)
        alone, own = patched("chain")
        with torch.no_grad():
            for number, (_, parameter) in enumerate(own.named_parameters()):
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number)))
        path = self.folder / "values"
        if self.rank == 0:
            own.save_pretrained(path)
        dist.barrier()
        bare = chain().double()

        def close(one: Tensor, other: Tensor) -> bool:
            return torch.allclose(one, other, rtol=1e-9, atol=1e-9)

        for way in ("fsdp", "tensor"):
            model, patch = patched("chain")
            patch.load_state_dict(own.state_dict())
            if way == "tensor":
                self.divide(model)
            else:
                shard(model, self.mesh)
            with torch.no_grad():
                found[f"{way}: the same"] = close(model(x), alone(x))
                patch.scale = own.scale = 0.5
                found[f"{way}: scaled"] = close(model(x), alone(x))
                with adapters.use(model), adapters.use(alone):
                    found[f"{way}: none"] = close(model(x), bare(x))
                name = f"{way}-{self.world}"
                found[f"{way}: saved"] = self.bytes_of(patch, name) == (path / "adapter_model.safetensors").read_bytes()
                weights = {key: whole(tensor).clone() for key, tensor in model.state_dict().items()}
                patch.merge()
                found[f"{way}: merged"] = close(model(x), alone(x))
                found[f"{way}: saved while merged"] = self.bytes_of(patch, f"{name}-merged") == self.bytes_of(
                    patch, name
                )
                if way == "fsdp":
                    with adapters.use(model):
                        found[f"{way}: none while merged"] = close(model(x), bare(x))
                patch.unmerge()
                after = {key: whole(tensor) for key, tensor in model.state_dict().items()}
                found[f"{way}: unmerged, every bit"] = all(torch.equal(weights[key], after[key]) for key in weights)
                zeros = {key: torch.zeros_like(tensor) for key, tensor in own.state_dict().items()}
                patch.load_state_dict(zeros)
                found[f"{way}: other values"] = close(model(x), bare(x))
                patch.load_state_dict(own.state_dict())
                found[f"{way}: the values again"] = close(model(x), alone(x))
                patch.eject()
                found[f"{way}: ejected"] = close(model(x), bare(x)) and not nodes(model)
                keys = [*model.state_dict()] == [*bare.state_dict()]
                found[f"{way}: the keys of the base"] = keys
                patch.inject()
                found[f"{way}: back"] = close(model(x), alone(x))
                patch.scale = own.scale = 1.0
                patch.merge_and_eject()
                found[f"{way}: for good"] = close(model(x), alone(x)) and not nodes(model)
        return found

    def check_units_that_cannot_leave(self) -> str:
        model, patch = patched("chain")
        shard(model, self.mesh, "adapted layer")
        try:
            patch.eject()
        except adapters.PatchStateError as error:
            return f"{error}{'' if patch.injected else ' (ejected)'}"
        return "done"

    def check_an_error_of_the_one_that_writes(self) -> str:
        model, patch = patched("chain")
        shard(model, self.mesh)
        file = self.folder / "file"
        file.write_text("")
        try:
            patch.save_pretrained(file / "inside")
        except Exception as error:
            return type(error).__name__
        return "done"


def whole(tensor: Any) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def main(folder: Path, *names: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    if not (folder / "found.json").exists():  # After a process was killed, all start again.
        Scenarios(folder).run([name for name in names if name != "elastic"])
    dist.barrier()
    if "elastic" in names:
        from tests.distributed import elastic

        elastic.run(folder / "elastic")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
