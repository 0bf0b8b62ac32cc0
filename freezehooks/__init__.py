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
from ._handle import FrozenEntries, freeze_entries, train_only
from ._held.parameter import FrozenParameter
from ._held.violation import Violation
from ._optim.guard import Guard
from ._optimizer import MaskedOptimizer
from ._report.status import Mechanisms
from ._report.table import PartReport, Report
from ._report.trainable import Trainable
from ._rules.parser import parse_region, parse_rule
from ._rules.patterns.kernels import border, center, cross
from ._rules.patterns.magnitudes import largest, nm, smallest, zeros
from ._rules.patterns.matrices import band, block_diagonal, diagonal, tril, triu
from ._rules.patterns.randomness import random
from ._rules.patterns.within import each
from ._rules.region import Region, entries
from ._rules.rule import Rule, keep
from ._rules.ties import mirrored, symmetric, tied

__all__ = [
    "CheckpointError",
    "DriftError",
    "FreezeError",
    "FrozenEntries",
    "FrozenParameter",
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
    "band",
    "block_diagonal",
    "border",
    "center",
    "cross",
    "diagonal",
    "each",
    "entries",
    "freeze_entries",
    "keep",
    "largest",
    "mirrored",
    "nm",
    "parse_region",
    "parse_rule",
    "random",
    "smallest",
    "symmetric",
    "tied",
    "train_only",
    "tril",
    "triu",
    "zeros",
]
