"""The report of a review: what surgery changed in a model, from two graphs or folders, without their weights."""

from surgery.diff.comparison import Comparison
from surgery.diff.sides import Side, of_pair, open_side
from surgery.diff.two import compare

__all__ = ["Comparison", "Side", "compare", "of_pair", "open_side"]
