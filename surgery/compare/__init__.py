"""The report of a review: what surgery changed in a model, from two graphs, pairs or folders, without their weights."""

from surgery.compare.comparing import compare
from surgery.compare.comparison import Comparison
from surgery.compare.provenance import Provenance, of_validation, witnessed
from surgery.compare.subjects import Subject, open_subject, open_subjects, subject_of_pair, subject_of_plan

__all__ = [
    "Comparison",
    "Provenance",
    "Subject",
    "compare",
    "of_validation",
    "open_subject",
    "open_subjects",
    "subject_of_pair",
    "subject_of_plan",
    "witnessed",
]
