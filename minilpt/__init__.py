"""BERT and RoBERTa text classifiers without a deep-learning framework, with tokens really removed layer by layer.

Importing this loads NumPy and the standard library only.
"""

from typing import TYPE_CHECKING, Any

from .api import Classifier, Prediction
from .engine import Forward
from .errors import (
    BackendError,
    CalibrationError,
    DependencyError,
    HubError,
    InputError,
    MinilptError,
    MinilptWarning,
    ModelFileError,
    NumbersError,
    PruningError,
    TokenizerError,
    UnknownModelError,
    UnsupportedModelError,
    WeightsError,
)
from .loading import load

if TYPE_CHECKING:
    from .calibration import Calibration, calibrate
    from .golden import export_golden
    from .ranges import Ranges, quantize_model

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Calibration",
    "CalibrationError",
    "Classifier",
    "DependencyError",
    "Forward",
    "HubError",
    "InputError",
    "MinilptError",
    "MinilptWarning",
    "ModelFileError",
    "NumbersError",
    "Prediction",
    "PruningError",
    "Ranges",
    "TokenizerError",
    "UnknownModelError",
    "UnsupportedModelError",
    "WeightsError",
    "calibrate",
    "export_golden",
    "load",
    "quantize_model",
]


_LATER = {
    "calibration": ("Calibration", "calibrate"),
    "golden": ("export_golden",),
    "ranges": ("Ranges", "quantize_model"),
}


def __getattr__(name: str) -> Any:
    """What few processes need is loaded when it is asked for: 14 of the import's 135 ms (Zen 5, 2026-11-25)."""
    from importlib import import_module

    for module, names in _LATER.items():
        if name in names:
            return getattr(import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
