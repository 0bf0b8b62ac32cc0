"""Hold some entries of a weight while the rest of the network trains."""

from ._errors import (
    CheckpointError,
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
    UnguardedError,
    UnsupportedOptimizerError,
    UnsupportedParameterError,
)
from ._expressions import Region, border, center, cross, diagonal, entries, nm, smallest, tril, triu, zeros
from ._frozen import FrozenPart, Violation
from ._grammar import parse_region, parse_rule
from ._guard import Guard
from ._handle import FrozenEntries, freeze_entries
from ._mechanisms import Mechanisms
from ._optimizer import MaskedOptimizer
from ._report import PartReport, Report
from ._rules import Rule, keep, tied
from ._trainable import Trainable

__all__ = [
    "CheckpointError",
    "DriftError",
    "FreezeError",
    "FrozenEntries",
    "FrozenPart",
    "FrozenValueError",
    "Guard",
    "MaskedOptimizer",
    "Mechanisms",
    "OptimizerMismatchError",
    "ParameterChangedError",
    "PartReport",
    "Region",
    "RegionError",
    "Report",
    "Rule",
    "RuleConflictError",
    "RuleSyntaxError",
    "SpecError",
    "StateMismatchError",
    "TargetError",
    "Trainable",
    "UnguardedError",
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
