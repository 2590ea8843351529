"""What goes wrong with an objective or an image file, by type."""


class AttackError(ValueError):
    """The objective cannot be attacked as it is; the message says why and what to do."""


class ObjectiveShapeError(AttackError):
    """The objective (or ``stop``) did not return one value per image."""


class NonFiniteError(AttackError):
    """The objective or its gradient is NaN or infinite."""


class ZeroGradientError(AttackError):
    """No pixel of any image changes the objective, so that every step would stand still."""


class ResumeError(AttackError):
    """A saved state belongs to another attack."""


class ImageFileError(ValueError):
    """An image file cannot be used; the message names the file and the reason."""
