"""Writes shards/NUMBER.parquet: 16 uneven files, 280,000 rows of 20 features, a label.

Each feature has a scale of its own. Six of them make the label, by no linear rule.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

draw = np.random.default_rng(0)
folder = Path("shards")
folder.mkdir(exist_ok=True)
scales = (10.0 ** draw.integers(-2, 4, 20)).astype(np.float32)
edges = np.rint(280_000 * np.cumsum([0, *draw.dirichlet(np.full(16, 5.0))]))
for number, count in enumerate(np.diff(edges.astype(int))):
    x = draw.standard_normal((count, 20), dtype=np.float32)
    first, second = x[:, 0] + x[:, 1] - x[:, 2], 2 * np.abs(x[:, 3]) + x[:, 4] - x[:, 5]
    label = np.where(first + second < 0, 0, np.where(first > second, 1, 2))
    columns = {f"f{i:02}": c for i, c in enumerate(((x + 1) * scales).T.copy())}
    pq.write_table(
        pa.table({**columns, "label": label}),
        folder / f"{number:02}.parquet",
        row_group_size=10_000,
        use_dictionary=["label"],
    )
