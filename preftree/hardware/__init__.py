"""The machine: device, precision, memory, and a report of all three."""

import os

#: torch keeps a compiled oneDNN product for each shape that it has met, 1,024 of them, and oneDNN keeps as many below,
#: unless these say otherwise before the first product. Forests differ in size, so nearly each brings new shapes: 35
#: steps of a model of 13 million weights in bfloat16 grew by 0.5 GB. 64 hold what the passes of one forest need.
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
    os.environ.setdefault(_cache, "64")
