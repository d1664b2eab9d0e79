"""BERT and RoBERTa text classifiers without a deep-learning framework, with tokens really removed layer by layer.

Importing this loads NumPy and the standard library only.
"""

from .api import Classifier, Prediction, load
from .calibration import Calibration, calibrate
from .engine import Forward
from .errors import (
    BackendError,
    CalibrationError,
    DependencyError,
    InputError,
    MinilptError,
    MinilptWarning,
    ModelFileError,
    PruningError,
    TokenizerError,
    UnknownModelError,
    UnsupportedModelError,
    WeightsError,
)

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Calibration",
    "CalibrationError",
    "Classifier",
    "DependencyError",
    "Forward",
    "InputError",
    "MinilptError",
    "MinilptWarning",
    "ModelFileError",
    "Prediction",
    "PruningError",
    "TokenizerError",
    "UnknownModelError",
    "UnsupportedModelError",
    "WeightsError",
    "calibrate",
    "load",
]
