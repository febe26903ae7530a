"""LARS, layer-wise adaptive rate scaling (arXiv 1708.03888), for PyTorch."""

from . import plots, recipes, schedules
from .check import check
from .convert import convert_state_dict
from .dialects import DIALECTS
from .functional import lars
from .groups import param_groups
from .optimizer import LARS

__all__ = ["DIALECTS", "LARS", "check", "convert_state_dict", "lars", "param_groups", "plots", "recipes", "schedules"]
__version__ = "0.1.0"
