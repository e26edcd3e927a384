"""Dynamic Boosted Annealing: fine-tune on domain data alone, boosted by one stored gradient of the general data."""

from .backends import use_backend
from .collect import GlobalGradientCollector, collect_global_gradient
from .global_gradient import GlobalGradient
from .optim import DBAAdamW
from .saved_state import fp32_state_dict, load_fp32_state_dict
from .schedule import annealing_schedule

__version__ = "0.1.0"
__all__ = [
    "DBAAdamW",
    "GlobalGradient",
    "GlobalGradientCollector",
    "annealing_schedule",
    "collect_global_gradient",
    "fp32_state_dict",
    "load_fp32_state_dict",
    "use_backend",
]
