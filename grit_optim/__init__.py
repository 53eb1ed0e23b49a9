"""A drop-in torch.optim wrapper: any base optimizer, with the curvature of the LoRA adapters it trains."""

from grit_optim import presets
from grit_optim.export.adapter import export_adapter
from grit_optim.integrations.factory import for_trainer
from grit_optim.lora.by_modality import modality_groups
from grit_optim.lora.site import Site
from grit_optim.optimizer import GritOptimizer

__version__ = "0.1.0"
__all__ = ["GritOptimizer", "Site", "export_adapter", "for_trainer", "modality_groups", "presets"]
