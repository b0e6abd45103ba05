"""The few exceptions of the project; each message says what was found, where, and what to do next."""


class VisionLowRankError(Exception):
    """Base of all errors that a user can mend; entries print its message as one line without a traceback."""


class DataError(VisionLowRankError):
    """A data file, a dataset card or a value in one is missing, damaged or contradicts the card."""


class DownloadError(DataError):
    """A file could not be fetched, or what arrived is not what the card promises."""


class SplitError(VisionLowRankError):
    """A division into training, validation and test pixels cannot be made as asked."""


class ConfigError(VisionLowRankError):
    """An option is misspelt, out of range or contradicts another."""


class TrainingError(VisionLowRankError):
    """Training went astray: its loss is no longer a number."""


class AdapterError(VisionLowRankError):
    """An adapter cannot be injected, merged, saved or loaded as asked."""


class CheckpointError(VisionLowRankError):
    """A file of weights is damaged, holds code, or belongs to another model."""
