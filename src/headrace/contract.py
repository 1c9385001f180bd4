"""The documented name of `headrace.lab.cases`: the cases that every engine has to pass."""

from headrace.lab.cases import *  # noqa: F403 - its public names, and no others
from headrace.lab.cases import __all__ as __all__
