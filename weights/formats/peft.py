"""The format of the PEFT library: a folder with `adapter_config.json` and `adapter_model.safetensors`.

Tensors are named `base_model.model.<path>.lora_A.weight` and `.lora_B.weight`; every number is in the JSON file.
Format: https://huggingface.co/docs/peft/developer_guides/checkpoint.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from weights.adapter_file import AdapterFile, LayerWeights
from weights.atomic import write_files
from weights.card import model_card
from weights.errors import FileFormatError, SourceNotFoundError
from weights.files import TensorFiles, encode, open_tensors

CONFIG = "adapter_config.json"
TENSORS = "adapter_model.safetensors"
FILES = (CONFIG, TENSORS)

_KEY = re.compile(r"base_model\.model\.(?P<path>.+)\.(?P<tensor>lora_[AB])\.weight")

# The settings that are read: their neutral value, and what they must be.
_READ = {"base_model_name_or_path", "peft_type", "r", "lora_alpha", "lora_dropout", "use_rslora"} | {
    "rank_pattern",
    "alpha_pattern",
}
# Settings that do not change what the saved tensors compute: how they were found, trained and initialised, and how
# the base model's layers were laid out and chosen, which the tensors' names say better.
_INERT = {
    "auto_mapping",
    "corda_config",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
# Other initialisations (PiSSA, OLoRA, CorDA, ...) change the base model's weights as well when PEFT loads the file.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
