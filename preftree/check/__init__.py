"""`preftree check`: what in preference data would spoil training, counted, with row numbers.

`read` passes once over the rows and keeps numbers, not texts; `rows`, `sets` and `tokens` hold the measures, each a
function and a line in a dict; `report` judges them by the limits that stand beside each measure; `views`, `html`
and `fix` show the report or repair the data.
"""

import sys

from preftree import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
