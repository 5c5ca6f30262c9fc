"""The errors that a user can act on. Each message names what, where, the value got, and the remedy."""


class TftrainError(Exception):
    """Base of every error that is the input's fault; the command line prints it as one line and exits with 2."""


class RecipeError(TftrainError):
    """A recipe has an unknown key, a wrong type, a contradiction, or does not match the run it would continue."""


class CellsError(TftrainError):
    """A file or store of cells, genes or protein vectors cannot be used as it is."""


class CheckpointError(TftrainError):
    """A checkpoint is missing, unfinished, or does not belong to what is asked of it."""


class TrainingError(TftrainError):
    """A run cannot go on as it is: its loss is no longer a number, or a worker failed for good."""
