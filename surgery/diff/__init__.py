"""The report of a review: what surgery changed in a model, from two graphs, pairs or folders, without their weights."""

from surgery.diff.comparison import Comparison
from surgery.diff.evidence import Evidence, of_validation, witnessed
from surgery.diff.sides import Side, of_pair, of_plan, open_side, open_sides
from surgery.diff.two import compare

__all__ = [
    "Comparison",
    "Evidence",
    "Side",
    "compare",
    "of_pair",
    "of_plan",
    "of_validation",
    "open_side",
    "open_sides",
    "witnessed",
]
