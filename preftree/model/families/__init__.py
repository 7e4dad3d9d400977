"""How a family of models runs its body over a forest.

Most go through transformers' attention interface (`interface`). A family that bypasses it gets a file here
and a line in `FAMILIES`, keyed by `config.model_type`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from transformers import PreTrainedModel

from preftree.forest import Forest
from preftree.model.attention import Attend
from preftree.model.families import bloom, interface, mpt, own_attention
from preftree.model.patch import Patches

#: body(forest, attend) -> hidden states (T, D) after the final norm.
Body = Callable[[Forest, Attend], Tensor]

FAMILIES: dict[str, Callable[[PreTrainedModel, Patches], Body]] = {
    "bloom": bloom.prepare,
    "codegen": own_attention.prepare_attn,
    "falcon": own_attention.prepare_sdpa,
    "gpt_neo": own_attention.prepare_attn,
    "gptj": own_attention.prepare_attn,
    "mpt": mpt.prepare,
}


def prepare(model: PreTrainedModel, patches: Patches) -> Body:
    """Make `model` (a causal language model, LoRA layers injected or not) able to run forests.

    What is replaced in it for that is recorded in `patches`.
    """
    return FAMILIES.get(model.config.model_type, interface.prepare)(model, patches)


__all__ = ["FAMILIES", "Body", "prepare"]
