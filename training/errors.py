"""What all refusals of training have in common."""


class TrainingError(Exception):
    """What the caller can mend; the command line prints it and ends with status 2."""
