"""Models of the package transformers: their masks, computed without torch.vmap, which torch.export cannot trace."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from torch import nn

NAME = "sdpa_without_vmap"


def without_vmap(module: nn.Module) -> None:
    """Have a model of transformers use the attention that the package has for export. Other modules do not change."""
    config: Any = getattr(module, "config", None)
    if not type(module).__module__.startswith("transformers.") or not hasattr(config, "_attn_implementation"):
        return
    masks = import_module("transformers.masking_utils").ALL_MASK_ATTENTION_FUNCTIONS
    attentions = import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS
    masks.register(NAME, import_module("transformers.integrations.executorch").sdpa_mask_without_vmap)
    attentions.register(NAME, attentions["sdpa"])
    config._attn_implementation = NAME
    config.use_cache = False
