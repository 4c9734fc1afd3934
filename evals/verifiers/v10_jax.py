"""Adam in JAX, checked against its formula; the skill has nothing to say here."""

from pathlib import Path

from evals.common import copy_of, expect, must_run, need, no_pytorch

# Where JAX is not installed, this much of it is enough for the task.
STAND_IN = """
import sys, types, numpy
jax = types.ModuleType("jax")
def tree_map(f, tree, *rest):
    if isinstance(tree, dict):
        return {k: tree_map(f, tree[k], *(r[k] for r in rest)) for k in tree}
    if isinstance(tree, (list, tuple)):
        return type(tree)(tree_map(f, *items) for items in zip(tree, *rest))
    return f(tree, *rest)
jax.numpy = numpy
jax.tree_map = tree_map
jax.tree = types.SimpleNamespace(map=tree_map)
jax.tree_util = types.ModuleType("jax.tree_util")
jax.tree_util.tree_map = tree_map
jax.jit = lambda f=None, **_: f if f else (lambda g: g)
jax.Array = numpy.ndarray
sys.modules["jax"] = jax
sys.modules["jax.numpy"] = numpy
sys.modules["jax.tree_util"] = jax.tree_util
"""
PROBE = """
try:
    import jax
except ImportError:
    exec(open("stand_in.py").read())
import numpy as np
import jax.numpy as jnp
from adam import init, update

draw = np.random.default_rng(0)
params = {"w": draw.normal(size=(3, 2)), "b": draw.normal(size=(2,))}
mine = {k: v.astype("float32") for k, v in params.items()}
params = {k: jnp.asarray(v.astype("float32")) for k, v in params.items()}
state = init(params)
m = {k: 0.0 for k in mine}
v = {k: 0.0 for k in mine}
for t in range(1, 6):
    grads = {k: draw.normal(size=p.shape).astype("float32") for k, p in mine.items()}
    params, state = update(params, {k: jnp.asarray(g) for k, g in grads.items()}, state,
                           lr=0.1, b1=0.8, b2=0.9, eps=1e-6)
    for k, g in grads.items():
        m[k] = 0.8 * m[k] + 0.2 * g
        v[k] = 0.9 * v[k] + 0.1 * g * g
        mine[k] = mine[k] - 0.1 * (m[k] / (1 - 0.8**t)) / (
            np.sqrt(v[k] / (1 - 0.9**t)) + 1e-6)
print(max(np.abs(np.asarray(params[k]) - mine[k]).max() for k in mine))
"""


def check_is_adam(answer: Path) -> None:
    """Five updates equal the formula with bias correction, within 1e-4."""
    need(answer, "adam.py")
    with copy_of(answer) as folder:
        (folder / "stand_in.py").write_text(STAND_IN, encoding="utf-8")
        (folder / "probe.py").write_text(PROBE, encoding="utf-8")
        worst = float(must_run(["probe.py"], folder).split()[-1])
    expect(worst < 1e-4, f"off by {worst:.2g}")


def check_no_pytorch(answer: Path) -> None:
    """Nothing of PyTorch and nothing of the generator is in the answer."""
    need(answer, "adam.py")
    no_pytorch(answer)
