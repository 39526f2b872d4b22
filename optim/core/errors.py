"""The error for factors that cannot be inverted and steps that cannot be taken."""


class NumericalError(RuntimeError):
    """A factor could not be inverted, or steps had to be skipped, several times in a row.

    The message names the layer and what to change. Its own class, so that whoever compares settings
    can count it as a bad setting, and a full memory as what it is.
    """
