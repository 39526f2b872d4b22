"""What an optimizer raises when the numbers themselves do not let it go on."""


class NumericalError(RuntimeError):
    """A factor could not be inverted, or steps had to be skipped, several times in a row.

    The message names the layer and what to change. Its own class, so that whoever compares settings
    can count it as a bad setting, and a full memory as what it is.
    """
