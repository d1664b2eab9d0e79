"""One family of exceptions. Each message says what was wanted, what was found, where, and what to do."""

from __future__ import annotations


class MinilptError(Exception):
    """Base of every error that minilpt raises on purpose."""


class UnknownModelError(MinilptError, LookupError):
    """A name that is neither a folder, a bundled model nor a repository of the hub, or a revision it does not have."""


class HubError(MinilptError):
    """A hub that refuses access or cannot be reached, or a model wanted offline that was never downloaded."""


class ModelFileError(MinilptError):
    """A file of a model folder is missing, damaged, hostile, or of a kind that is never opened."""


class UnsupportedModelError(MinilptError):
    """config.json asks for mathematics that minilpt does not run."""


class WeightsError(MinilptError):
    """Tensors are missing, unexpected, doubled, of the wrong shape or dtype, or hold values that are not finite."""


class PruningError(MinilptError, ValueError):
    """ltp.json or the `pruning=` argument is not valid for this model."""


class CalibrationError(MinilptError, ValueError):
    """A calibration that cannot do what was asked: too few texts, or a target out of reach."""


class InputError(MinilptError, ValueError):
    """A text, a pair or a token id sequence that the model cannot take."""


class NumbersError(MinilptError, ArithmeticError):
    """An answer that is not finite, though the weights are: activations of a text outgrew the floating-point type."""


class TokenizerError(MinilptError):
    """The folder holds no tokenizer, or one that cannot be read."""


class BackendError(MinilptError):
    """The device or precision asked for is not available here."""


class DependencyError(MinilptError, ImportError):
    """An optional package is not installed."""


class MinilptWarning(UserWarning):
    """Category of every warning that minilpt gives."""
