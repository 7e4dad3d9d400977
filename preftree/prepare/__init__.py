"""`preftree prepare`: preference pairs from an instruction set, as the Orca pairs were made.

    source → select → generate → write

Each stage is a function of its input and the settings. What it found is kept below OUTPUT_DIR/.prepare: the selection
as one file that is there whole or not at all, the answers as a journal that only grows. So a run that was
killed continues where it was, and its files are byte for byte those of an undisturbed run.
"""

import sys

from preftree import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
