"""Hold some entries of a weight while the rest of the network trains."""

from ._errors import (
    DriftError,
    FreezeError,
    FrozenValueError,
    OptimizerMismatchError,
    ParameterChangedError,
    RegionError,
    RuleConflictError,
    RuleSyntaxError,
    SpecError,
    StateMismatchError,
    TargetError,
    UnsupportedOptimizerError,
    UnsupportedParameterError,
)
from ._expressions import Region, border, center, cross, diagonal, entries, nm, smallest, tril, triu, zeros
from ._frozen import FrozenPart, Violation
from ._grammar import parse_region, parse_rule
from ._guard import Guard
from ._handle import FrozenEntries, freeze_entries
from ._optimizer import MaskedOptimizer
from ._rules import Rule, keep, tied

__all__ = [
    "DriftError",
    "FreezeError",
    "FrozenEntries",
    "FrozenPart",
    "FrozenValueError",
    "Guard",
    "MaskedOptimizer",
    "OptimizerMismatchError",
    "ParameterChangedError",
    "Region",
    "RegionError",
    "Rule",
    "RuleConflictError",
    "RuleSyntaxError",
    "SpecError",
    "StateMismatchError",
    "TargetError",
    "UnsupportedOptimizerError",
    "UnsupportedParameterError",
    "Violation",
    "border",
    "center",
    "cross",
    "diagonal",
    "entries",
    "freeze_entries",
    "keep",
    "nm",
    "parse_region",
    "parse_rule",
    "smallest",
    "tied",
    "tril",
    "triu",
    "zeros",
]
