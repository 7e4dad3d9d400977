"""The machine: device, precision, memory, and a report of all three."""

import os

#: oneDNN keeps a compiled product for each shape that it has met, 1,024 of them unless this says otherwise before its
#: first product. Forests differ in size, so there is a new shape for each: 0.9 GB in 75 steps of a model of 13 million
#: weights. 64 is what one forest's passes need.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
