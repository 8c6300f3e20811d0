"""The errors that a user can mend. The command line prints them as one line and exits with 2."""


class FewstepError(Exception):
    """What was expected, what came, and what to do."""


class InputError(FewstepError, ValueError):
    """A tensor, name, option or file that cannot be used as it is."""


class DivergenceError(FewstepError, ArithmeticError):
    """Training met a value that is not finite."""
