"""What a reader of the algorithms may skip: command line, run directories, ranks, saved states, steps of training."""


class InputError(ValueError):
    """What was given cannot be used. The message says what it is and what to do; scripts print it and stop."""
