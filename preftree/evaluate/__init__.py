"""`preftree evaluate` and `preftree compare`: lm-eval's tasks and held-out preferences over token trees."""

import sys

from preftree import CallablePackage

sys.modules[__name__].__class__ = CallablePackage
