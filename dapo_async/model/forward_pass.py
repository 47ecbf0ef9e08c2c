"""How the learner computes its forward pass: attention, layout of a microbatch, and whether the fused pass is used.

Owned here: the decision, made once from the settings, the device and the model's configuration, without weights and
without the device at hand, so that what is checked, estimated and run is the same. Not owned: the passes themselves
(``policy``, ``cpu.fused_forward``), and the proof on a model's weights that the fused one needs (``cpu.proof``).
"""

from typing import Literal, NamedTuple

import torch
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available

from dapo_async.config import settings as config
from dapo_async.errors import ConfigError
from dapo_async.model.batching import Layout
from dapo_async.model.cpu.shared_attention import LONGEST
from dapo_async.model.family import architecture_obstacle
from dapo_async.model.varlen import VARLEN

FLASH = "flash_attention_2"
PACKING_CAPABILITY = (8, 0)  # of a CUDA device that has kernels of variable-length attention


class Hardware(NamedTuple):
    """What the decision depends on of the learner's device, which need not be here."""

    device_type: str  # "cpu" or "cuda"
    packs: bool = False  # CUDA of ``PACKING_CAPABILITY`` or newer
    flash_attn: bool = False  # the package is installed


class ForwardPass(NamedTuple):
    """The learner's forward pass, as decided."""

    device_type: str
    attention: str  # name of the module's attention function in transformers; the fused pass has its own
    layout: Layout  # shared: the fused pass; else the module's own
    obstacle: str = ""  # what speaks against the fused pass; empty: it is used
    wish: Literal["auto", "fused", "module"] = "auto"  # model.forward

    @property
    def fused(self) -> bool:
        """Whether it is the fused pass."""
        return self.layout == "shared"

    def unfused(self, obstacle: str) -> "ForwardPass":
        """The module's own pass in its place. Raises ``ConfigError`` if model.forward = "fused"."""
        if self.wish == "fused":
            raise ConfigError(f'model.forward = "fused": {obstacle}; use "auto"')
        # The fused pass is for CPUs, where the module's own has padded rows.
        return self._replace(layout="padded" if self.fused else self.layout, obstacle=obstacle)


# The module's own pass on a CPU: for weights that are only read, or compared with.
PLAIN = ForwardPass("cpu", "sdpa", "padded", 'model.forward is "module"', "module")


def hardware_of(device: torch.device) -> Hardware:
    """Of a device of this machine."""
    packs = device.type == "cuda" and torch.cuda.get_device_capability(device) >= PACKING_CAPABILITY
    return Hardware(device.type, packs, is_flash_attn_2_available())


def resolve_forward_pass(
    settings: config.Config, hardware: Hardware, architecture: PreTrainedConfig | None = None
) -> ForwardPass:
    """The forward pass that ``settings`` choose for a model of ``architecture`` on ``hardware``.

    Attention ``auto`` is packed variable-length attention on CUDA in bfloat16 (flash-attn when installed, else
    PyTorch's own) and SDPA on padded rows elsewhere. Forward ``auto`` is the fused pass where nothing is known to speak
    against it; without ``architecture`` (a demo's model is made later) that of the model is not. Raises
    ``ConfigError`` for a choice that cannot work.
    """
    attention, layout = _attention(settings.model, hardware)
    of_module = ForwardPass(hardware.device_type, attention, layout, wish=settings.model.forward)
    obstacle = _settings_obstacle(settings, hardware.device_type)
    if not obstacle and architecture is not None:
        obstacle = architecture_obstacle(architecture)
    return of_module.unfused(obstacle) if obstacle else of_module._replace(layout="shared")


def _attention(model_cfg: config.Model, hardware: Hardware) -> tuple[str, Layout]:
    """The module's attention function, and the layout that it reads."""
    choice, obstacle = model_cfg.attention, _packing_obstacle(model_cfg, hardware)
    if choice in ("sdpa", "eager"):
        return choice, "padded"
    if choice == "auto":
        if obstacle:
            return "sdpa", "padded"
        return (FLASH if hardware.flash_attn else VARLEN), "packed"
    if obstacle:
        raise ConfigError(f'model.attention = "{choice}" {obstacle}; use "auto" or "sdpa"')
    if choice == "varlen":
        return VARLEN, "packed"
    if not hardware.flash_attn:
        raise ConfigError('model.attention = "flash" needs the flash-attn package; install it, or use "auto"')
    return FLASH, "packed"


def _packing_obstacle(model_cfg: config.Model, hardware: Hardware) -> str:
    """Why variable-length attention cannot run on ``hardware``; empty: it can."""
    if hardware.device_type != "cuda":
        return f"needs a CUDA device, the learner is on {hardware.device_type}"
    if model_cfg.precision != "bfloat16":
        return f'needs model.precision = "bfloat16", not "{model_cfg.precision}"'
    if not hardware.packs:
        return f"needs a CUDA device of compute capability {'.'.join(map(str, PACKING_CAPABILITY))} or newer"
    return ""


def _settings_obstacle(settings: config.Config, device_type: str) -> str:
    """What in the settings speaks against the fused pass; empty: nothing."""
    model, longest = settings.model, settings.longest_sequence_tokens
    obstacles = {
        'model.forward is "module"': model.forward == "module",
        f"the learner is on {device_type}, the fused pass is for CPUs": device_type != "cpu",
        f'model.precision is "{model.precision}", the fused pass computes in float32': model.precision != "float32",
        f'model.attention is "{model.attention}"': model.attention not in ("auto", "sdpa"),
        "model.gradient_checkpointing is on": model.gradient_checkpointing,
        f"sequences of up to {longest} tokens, the fused pass is for {LONGEST}": longest > LONGEST,
    }
    return next((what for what, is_so in obstacles.items() if is_so), "")
