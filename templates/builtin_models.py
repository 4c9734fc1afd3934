"""The models that generated scripts bring: one Transformer block, two other networks.

    model = DecoderLM(vocab_size=50257, width=768, depth=12, heads=12)
    logits_BTV = model(tokens_BT)

DecoderLM, TextClassifier and TextEmbedder are made of the same block (RMSNorm, rotary
positions, scaled_dot_product_attention, SwiGLU); ResidualImageNet is for images of any
size, TabularMLP for rows of numbers. The repeated blocks are in an nn.ModuleList called
`blocks`, where activation checkpointing, sharding and compiling by block find them. No
control flow depends on data.

Sizes in names: B batch, T tokens, H heads, D width, V vocabulary, C classes or
channels, F features.
"""

import torch
import torch.nn.functional as F
from torch import nn

_TOKEN_STD = 0.02  # of the initial weights, as in GPT-2


def rotary_angles(
    length: int, head_width: int, device: torch.device, base: float = 10000.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of shape (length, 1, 1, head_width / 2), for rotate_pairs.

    Position t turns pair i by t / base ** (2 i / head_width) (arXiv:2104.09864). They
    are computed anew each time, in fp32: no buffer to keep in half precision, and no
    longest length.
    """
    exponent = torch.arange(0, head_width, 2, device=device) / head_width
    position_T = torch.arange(length, device=device, dtype=torch.float32)
    angle_TP = position_T[:, None] * base**-exponent
    return angle_TP.cos()[:, None, None], angle_TP.sin()[:, None, None]


def rotate_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs (i, i + half) of the last dimension of x, (..., T, N, H, D)."""
    left, right = x.chunk(2, dim=-1)
    cos, sin = cos.to(x.dtype), sin.to(x.dtype)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1)


class RMSNorm(nn.RMSNorm):
    """RMSNorm (arXiv:1910.07467) in the precision of its weight.

    Under autocast that is fp32, and without it no kernel exists for a half-precision
    input beside an fp32 weight.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.to(self.weight.dtype))


class SelfAttention(nn.Module):
    """Attention over the tokens of a row, with rotary positions."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % (2 * heads):
            raise ValueError(f"{width=} must be a multiple of 2 * heads, {2 * heads}")
        self.heads, self.dropout = heads, dropout
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask_B11T: torch.Tensor | None,
    ) -> torch.Tensor:
        qkv = self.qkv(x_BTD).unflatten(-1, (3, self.heads, -1))  # (B, T, 3, H, D / H)
        query_key, value = qkv[:, :, :2], qkv[:, :, 2]
        query, key = rotate_pairs(query_key, cos, sin).unbind(2)
        x_BHTD = F.scaled_dot_product_attention(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            attn_mask=mask_B11T,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask_B11T is None,
        )
        return self.out(x_BHTD.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """Gated feed-forward layer (arXiv:2002.05202), as many weights as one of 4 D."""

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = -(-width * 8 // (3 * 64)) * 64  # 8/3 D, a multiple of 64
        self.gate_up = nn.Linear(width, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_up(x_BTD).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class TransformerBlock(nn.Module):
    """Attention and feed-forward layer, each normalised before and added to its input.

    Without a mask each token sees those before it; with one, True for real tokens, all
    of these.
    """

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, eps=1e-6)
        self.attention = SelfAttention(width, heads, dropout)
        self.mlp_norm = RMSNorm(width, eps=1e-6)
        self.mlp = SwiGLU(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x_BTD: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        mask_B11T: torch.Tensor | None = None,
    ) -> torch.Tensor:
        seen_BTD = self.attention(self.attention_norm(x_BTD), cos, sin, mask_B11T)
        x_BTD = x_BTD + self.dropout(seen_BTD)
        return x_BTD + self.dropout(self.mlp(self.mlp_norm(x_BTD)))


def initialize_transformer(model: nn.Module) -> None:
    """Weights as in GPT-2: N(0, 0.02), smaller where a block adds to its input.

    Those are divided by the square root of how many such layers there are, so that the
    sum over a deep network starts out no larger than over a flat one.
    """
    depth = sum(isinstance(module, TransformerBlock) for module in model.modules())
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            std = _TOKEN_STD
            if name.endswith(("attention.out", "mlp.down")):
                std /= (2 * depth) ** 0.5
            nn.init.normal_(module.weight, std=std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


class TransformerStack(nn.Module):
    """Embedding, blocks and a last norm: tokens of shape (B, T) to (B, T, D).

    Args:
        vocab_size: embeddings.
        width: D, a multiple of 2 * heads.
        depth: number of blocks.
        dropout: share of what is dropped, of embeddings, attention weights and what a
            block adds.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        depth: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_width = width // heads
        self.embed = nn.Embedding(vocab_size, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(
            TransformerBlock(width, heads, dropout) for _ in range(depth)
        )
        self.norm = RMSNorm(width, eps=1e-6)
        initialize_transformer(self)

    def forward(
        self, tokens_BT: torch.Tensor, mask_B11T: torch.Tensor | None = None
    ) -> torch.Tensor:
        length, device = tokens_BT.shape[1], tokens_BT.device
        cos, sin = rotary_angles(length, self.head_width, device)
        x_BTD = self.dropout(self.embed(tokens_BT))
        for block in self.blocks:
            x_BTD = block(x_BTD, cos, sin, mask_B11T)
        return self.norm(x_BTD)


class DecoderLM(TransformerStack):
    """Causal language model: tokens of shape (B, T) to logits of shape (B, T, V).

    Output weights are those of the embedding. V is vocab_size rounded up to a multiple
    of 64, which matrix kernels are faster for; no target ever names the rest.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        depth: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(-(-vocab_size // 64) * 64, width, depth, heads, dropout)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return F.linear(super().forward(tokens_BT), self.embed.weight)


def mean_over_tokens(x_BTD: torch.Tensor, real_BT: torch.Tensor) -> torch.Tensor:
    """The mean vector of each row's real tokens (True in real_BT); 0 without any."""
    weight_BT1 = real_BT.unsqueeze(-1).to(x_BTD.dtype)
    return (x_BTD * weight_BT1).sum(1) / weight_BT1.sum(1).clamp(min=1)


class TextEncoder(TransformerStack):
    """Bidirectional: tokens of shape (B, T), 0 for padding, to their mean, (B, D)."""

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        real_BT = tokens_BT != 0
        x_BTD = super().forward(tokens_BT, real_BT[:, None, None])
        return mean_over_tokens(x_BTD, real_BT)


class TextClassifier(nn.Module):
    """TextEncoder and a linear layer: tokens (B, T), 0 for padding, to (B, C)."""

    def __init__(
        self,
        vocab_size: int,
        classes: int,
        width: int,
        depth: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = TextEncoder(vocab_size, width, depth, heads, dropout)
        self.head = nn.Linear(width, classes)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return self.head(self.encoder(tokens_BT))


class TextEmbedder(nn.Module):
    """TextEncoder to vectors of length 1: tokens (B, T), 0 for padding, to (B, D)."""

    def __init__(
        self,
        vocab_size: int,
        width: int,
        depth: int,
        heads: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = TextEncoder(vocab_size, width, depth, heads, dropout)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        return F.normalize(self.project(self.encoder(tokens_BT)), dim=-1)


class ImageBlock(nn.Module):
    """Two convolutions beside a shortcut; group norm does not depend on the batch.

    With another width or `stride` 2 the shortcut is a convolution of 1 x 1.
    """

    def __init__(self, inputs: int, width: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, inputs),
            nn.GELU(),
            nn.Conv2d(inputs, width, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, width),
            nn.GELU(),
            nn.Dropout2d(dropout),
            nn.Conv2d(width, width, 3, padding=1, bias=False),
        )
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != width:
            self.shortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        return self.shortcut(x_BDHW) + self.layers(x_BDHW)


class ResidualImageNet(nn.Module):
    """Residual convolutions: images of shape (B, 3, H, W), any size, to logits (B, C).

    Args:
        widths: channels of each stage, multiples of 16. The stem and every stage after
            the first halve the resolution: three stages take 16 pixels to 2, five take
            224 to 7.
        depth: blocks of a stage.
    """

    def __init__(
        self,
        classes: int,
        widths: tuple[int, ...],
        depth: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 5, stride=2, padding=2)
        self.blocks = nn.ModuleList()
        inputs = widths[0]
        for stage, width in enumerate(widths):
            for number in range(depth):
                stride = 2 if stage and not number else 1
                self.blocks.append(ImageBlock(inputs, width, stride, dropout))
                inputs = width
        self.norm = nn.GroupNorm(8, inputs)
        self.head = nn.Linear(inputs, classes)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        x_BDHW = self.stem(images_BCHW)
        for block in self.blocks:
            x_BDHW = block(x_BDHW)
        return self.head(F.gelu(self.norm(x_BDHW)).mean((2, 3)))


class ResidualMLPBlock(nn.Module):
    """Feed-forward layer beside a shortcut."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(dropout),
            nn.Linear(2 * width, width),
        )

    def forward(self, x_BD: torch.Tensor) -> torch.Tensor:
        return x_BD + self.layers(x_BD)


class TabularMLP(nn.Module):
    """Residual layers over standardised features: (B, F) to (B, outputs).

    A missing value (NaN) counts as the mean.

    Args:
        mean, std: of each feature over the training rows, (F,). All four are saved with
            the weights; a std of 0 (always the same value) counts as 1.
        output_mean, output_std: of the labels of a regression: what the model gives is
            in their unit. None for logits.
    """

    def __init__(
        self,
        mean: torch.Tensor,
        std: torch.Tensor,
        outputs: int,
        width: int,
        depth: int,
        dropout: float = 0.0,
        output_mean: torch.Tensor | None = None,
        output_std: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        if output_mean is None or output_std is None:
            output_mean, output_std = torch.zeros(()), torch.ones(())
        self.register_buffer("mean", mean.clone())
        self.register_buffer("std", std.masked_fill(std == 0, 1))
        self.register_buffer("output_mean", output_mean.clone())
        self.register_buffer("output_std", output_std.masked_fill(output_std == 0, 1))
        self.stem = nn.Linear(len(mean), width)
        self.blocks = nn.ModuleList(
            ResidualMLPBlock(width, dropout) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, outputs)

    def forward(self, features_BF: torch.Tensor) -> torch.Tensor:
        x_BF = (features_BF - self.mean) / self.std
        x_BD = self.stem(x_BF.masked_fill(x_BF.isnan(), 0))
        for block in self.blocks:
            x_BD = block(x_BD)
        return self.head(self.norm(x_BD)) * self.output_std + self.output_mean
