"""The errors that a user can mend; the command line prints them as one line and exits with 2. And a warning."""


class FewstepError(Exception):
    """What was expected, what came, and what to do."""


class InputError(FewstepError, ValueError):
    """A tensor, name, option or file that cannot be used as it is."""


class DivergenceError(FewstepError, ArithmeticError):
    """Training met a value that is not finite."""


class FallbackWarning(UserWarning):
    """A slower way that is taken by itself, announced once, because the usual one cannot give what was asked for."""
