"""Throughput of DecoderLM beside a model in the style of GPT-2 of the same size.

    python benchmarks/lm.py                    # on this CPU, one thread
    python benchmarks/lm.py --device cuda --compile

The other model is what nanoGPT-style scripts train: learned positions, LayerNorm, one
matrix for query, key and value, scaled_dot_product_attention, GELU, tied embeddings.
Both run the same steps in turn (forward, loss, backward, fused AdamW), so that whatever
else the machine does slows both alike: compare the ratio, not the tokens a second.
"""

import argparse
import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from templates.builtin_models import DecoderLM

# name: (vocabulary, width, depth, heads, tokens of a row, rows)
SIZES = {
    "tiny": (257, 128, 4, 4, 128, 16),
    "small": (8192, 384, 6, 6, 256, 4),
    "124M": (50304, 768, 12, 12, 1024, 16),
}


class GPT2Block(nn.Module):
    """LayerNorm, attention and a GELU layer of 4 D, as in GPT-2."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        split = self.qkv(self.attention_norm(x_BTD)).split(x_BTD.shape[-1], dim=2)
        heads = [x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in split]
        y_BHTD = F.scaled_dot_product_attention(*heads, is_causal=True)
        x_BTD = x_BTD + self.out(y_BHTD.transpose(1, 2).flatten(2))
        return x_BTD + self.down(F.gelu(self.up(self.mlp_norm(x_BTD))))


class GPT2(nn.Module):
    """Tokens (B, T) to logits (B, T, V), output weights tied to the embedding."""

    def __init__(
        self, vocab_size: int, width: int, depth: int, heads: int, length: int
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, width)
        self.position = nn.Embedding(length, width)
        self.blocks = nn.ModuleList(GPT2Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        place_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        x_BTD = self.embed(tokens_BT) + self.position(place_T)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return F.linear(self.norm(x_BTD), self.embed.weight)


def make_step(
    model: nn.Module, tokens: torch.Tensor, autocast: Callable[[], object]
) -> Callable[[], None]:
    """A training step on the same batch each time."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with autocast():
            logits_BTV = model(tokens[:, :-1])
            targets_BT = tokens[:, 1:]
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())
        loss.backward()
        optimizer.step()
        if tokens.is_cuda:
            torch.cuda.synchronize()

    return step


def compare(size: str, device: torch.device, compiled: bool, seconds: float) -> None:
    """Run both models in turn and print their tokens a second and the ratio."""
    vocab_size, width, depth, heads, length, rows = SIZES[size]
    torch.manual_seed(0)
    tokens = torch.randint(vocab_size, (rows, length + 1), device=device)
    models = {
        "DecoderLM": DecoderLM(vocab_size, width, depth, heads),
        "GPT-2 style": GPT2(-(-vocab_size // 64) * 64, width, depth, heads, length),
    }
    autocast = contextlib.nullcontext
    if device.type == "cuda":
        autocast = lambda: torch.autocast("cuda", torch.bfloat16)  # noqa: E731
    steps, times = {}, {name: [] for name in models}
    for name, model in models.items():
        model.to(device)
        if compiled:
            model.compile()
        steps[name] = make_step(model, tokens, autocast)
        for _ in range(3):
            steps[name]()
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - start)
    ours, other = (times[name] for name in models)
    for name, model in models.items():
        count = sum(parameter.numel() for parameter in model.parameters())
        speed = rows * length / statistics.median(times[name])
        print(f"{size:6} {name:12} {count / 1e6:7.2f} M  {speed:9.0f} tokens/s")
    ratio = statistics.median(b / a for a, b in zip(ours, other, strict=True))
    print(f"{size:6} ratio {ratio:.3f} (median of {len(ours)} pairs of steps)")


def main() -> None:
    """Compare at the sizes that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--seconds", type=float, default=40)
    parser.add_argument("--sizes", nargs="+", choices=SIZES)
    words = parser.parse_args()
    device = torch.device(words.device)
    cpu = f"{platform.machine()}, {torch.get_num_threads()} thread(s)"
    where = torch.cuda.get_device_name() if device.type == "cuda" else cpu
    print(f"torch {torch.__version__}, {where}, compiled: {words.compile}")
    default = ["124M"] if device.type == "cuda" else ["tiny", "small"]
    for size in words.sizes or default:
        compare(size, device, words.compile, words.seconds)


if __name__ == "__main__":
    main()
