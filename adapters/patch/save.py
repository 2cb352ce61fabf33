"""Writing a patch to files."""

from __future__ import annotations

from pathlib import Path

from torch import nn

import weights


def write_file(file: weights.AdapterFile, path: Path, format: str | None) -> str:
    """Write an adapter, by default in PEFT's format, or where that cannot hold it in this library's. Returns which."""
    if format is None:
        try:
            weights.write_adapter(file, path, format="peft")
        except weights.FileFormatError:
            format = "fluxion"
        else:
            return "peft"
    weights.write_adapter(file, path, format=format)
    return format


def _base_model_name(model: nn.Module) -> str | None:
    """Where a transformers or diffusers model says it came from."""
    for holder in (model, getattr(model, "config", None)):
        name = getattr(holder, "name_or_path", None) or getattr(holder, "_name_or_path", None)
        if isinstance(name, str) and name:
            return name
    return None


_TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def _task(model: nn.Module) -> str | None:
    """What a transformers model is for, by the end of its class's name."""
    name = type(model).__name__
    return next((task for end, task in _TASKS.items() if name.endswith(end)), None)
