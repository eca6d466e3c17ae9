"""Every error a user can meet: one line that names pass, node and value, and says what to do."""

from __future__ import annotations


class GraphoptError(Exception):
    """Base of all errors graphopt raises on purpose; the command line prints it in one line and exits with `exit_code`."""

    exit_code = 1

    def __init__(self, message: str = "") -> None:
        super().__init__(" ".join(message.split()))  # one line, whatever is in the names it quotes


class ModelError(GraphoptError):
    """The model file or graph is broken or cannot be represented."""


class DataError(GraphoptError):
    """Calibration or evaluation data does not fit the model."""


class OptionError(GraphoptError):
    """An unknown pass, option, preset, target or metric; lists the valid names."""


class PassError(GraphoptError):
    """A pass cannot run on this model."""

    def __init__(self, pass_name: str, message: str, *, node: str = "") -> None:
        where = f"{pass_name}: node '{node}'" if node else pass_name
        super().__init__(f"{where}: {message}")
        self.pass_name, self.node = pass_name, node


class CheckError(GraphoptError):
    """A check failed: the result is not equal to the original within its tolerance."""

    exit_code = 2
