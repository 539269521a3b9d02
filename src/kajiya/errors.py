"""What a user can do wrong, and how they are told: the field, the value, the remedy."""


class KajiyaError(Exception):
    """A mistake or a condition the user can mend; the command line prints it in one or two lines and exits with 2."""


class ConfigError(KajiyaError):
    """A setting that is unknown, of the wrong type, out of range, or at odds with another."""

    def __init__(self, field: str, problem: str, remedy: str = "") -> None:
        self.field = field
        self.problem = problem
        self.remedy = remedy
        super().__init__(f"{field}: {problem}" + (f"\n{remedy}" if remedy else ""))


class DataError(KajiyaError):
    """Input data that cannot be used as it is: names the file (and line), what is wrong, and what to do."""


class StoreError(KajiyaError):
    """An artifact, run folder or checkpoint that is missing, incomplete, or not what its manifest says."""


class RunBusyError(StoreError):
    """A run that another process works on right now."""


class MissingExtraError(KajiyaError):
    """An optional dependency that a verb needs; names the extra to install."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package '{package}'.\nInstall it with: pip install 'kajiya[{extra}]'")


class TrainingError(KajiyaError):
    """Training that must not go on: non-finite gradients past the limit, a full disk, a checkpoint of another run."""


class ProofError(KajiyaError):
    """A check before the first step that does not hold: what is wrong, and the remedy."""


class ParityError(KajiyaError):
    """A result that does not compute what its parent does, past the set tolerance; nothing of it is kept."""


class RequestError(KajiyaError):
    """A request to the serving engine that cannot be served; carries the API's own error code and HTTP status."""

    def __init__(self, message: str, code: str = "invalid_value", param: str | None = None, status: int = 400) -> None:
        self.code = code
        self.param = param
        self.status = status
        super().__init__(message)
