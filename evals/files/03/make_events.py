"""Writes events.parquet: 8 features and a label for each of 20,011 events."""

import numpy
import pyarrow
import pyarrow.parquet

draw = numpy.random.default_rng(0)
rows = 20_011
table = {f"f{i}": draw.standard_normal(rows).astype("float32") for i in range(8)}
table["label"] = numpy.arange(rows) % 17
pyarrow.parquet.write_table(pyarrow.table(table), "events.parquet")
