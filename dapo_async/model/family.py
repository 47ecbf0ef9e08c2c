"""Which architectures our own forward passes compute: the Llama family with full attention and static rotary positions.

Owned here: the rule, read off a model's configuration; one for the learner's pass (``cpu.fused_forward``) and for the
embedded engine's (``fused_decoder``), so that neither takes a model that the other would not. Not owned: the proof on a
model's weights, which each pass has besides. Imports no torch.
"""

from typing import Any

FAMILY = ("llama", "qwen2", "qwen3")
STATIC_ROPE = ("default", "linear", "llama3", "yarn")  # kinds whose angles do not depend on the sequence's length


def architecture_obstacle(architecture: Any) -> str:
    """What in a model's transformers configuration our formulas do not fit; empty: nothing."""
    kind, activation = architecture.model_type, getattr(architecture, "hidden_act", None)
    rope = (getattr(architecture, "rope_parameters", None) or {}).get("rope_type", "default")
    layers = set(getattr(architecture, "layer_types", None) or ["full_attention"])
    obstacles = {
        f"{kind} is not of the Llama family ({', '.join(FAMILY)})": kind not in FAMILY,
        f"its activation is {activation}, not silu": activation != "silu",
        f"its rotary positions are of the kind {rope}": rope not in STATIC_ROPE,
        "not all its layers have full attention": layers != {"full_attention"},
    }
    return next((what for what, is_so in obstacles.items() if is_so), "")
