"""Labelled rows: reads them from files, folders and hubs, checks them, and gives each row its choices and its answer.

Tokenising them is in `evaluation.encoded`.
"""

from scalabl.evaluation.dataset.columns import Columns
from scalabl.evaluation.dataset.examples import Example, read_examples

__all__ = ["Columns", "Example", "read_examples"]
