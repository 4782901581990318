"""The report of a review: what surgery changed in a model, from two graphs, pairs or folders, without their weights."""

from surgery.compare.comparing import compare
from surgery.compare.comparison import Comparison
from surgery.compare.provenance import Evidence, of_validation, witnessed
from surgery.compare.subjects import Side, of_pair, of_plan, open_side, open_sides

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
