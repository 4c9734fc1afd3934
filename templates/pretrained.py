"""Models of transformers and timm that are called like any other: tensor to logits.

    tokenizer = load_hf_tokenizer("bert-base-uncased")
    base = load_hf_base("AutoModelForSequenceClassification", "bert-base-uncased")
    model = LogitsModel(base, tokenizer.pad_token_id)
    logits_BC = model(tokens_BT)

Names are those of the Hugging Face hub, or folders with a config.json. A folder without
weights gives an untrained model, which is said.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


class ModelError(ValueError):
    """A model that cannot be loaded; the message names it and the remedy."""


def _import_transformers(name: str) -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"the model {name} needs {error.name}: pip install transformers"
        ) from error
    return transformers


def load_hf_tokenizer(name: str) -> Any:
    """The tokenizer of a model, with a token for padding and one for the end of a text.

    Where one of the two is missing, the other (or the separator) stands in.

    Raises:
        ModelError: there is no such tokenizer, or it has no such token.
    """
    transformers = _import_transformers(name)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(_explain_loading(name, "tokenizer", error)) from error
    end = tokenizer.eos_token or tokenizer.sep_token or tokenizer.pad_token
    if end is None:
        raise ModelError(
            f"the tokenizer of {name} has no token for padding or the end of a text:"
            " set tokenizer.eos_token and save it with save_pretrained"
        )
    tokenizer.eos_token = end
    tokenizer.pad_token = tokenizer.pad_token or end
    return tokenizer


def _explain_loading(name: str, what: str, error: Exception) -> str:
    reason = " ".join(str(error).split())[:300]
    return (
        f"cannot load the {what} of {name}: {reason}: check the name, the network, or"
        " give a folder made by save_pretrained"
    )


def load_hf_base(
    auto_class: str,
    name: str,
    pretrained: bool = True,
    classes: Sequence[str] = (),
    report: Callable[[str], None] = print,
    **settings: Any,
) -> nn.Module:
    """A model of transformers, in fp32 and ready to train.

    Args:
        auto_class: such as "AutoModelForCausalLM".
        pretrained: False starts from random weights.
        classes: names of the classes; another head than the saved one is new.
        settings: of the model's configuration.

    Raises:
        ModelError: there is no such model, or it cannot do that.
    """
    transformers = _import_transformers(name)
    auto = getattr(transformers, auto_class)
    if classes:
        settings["id2label"] = dict(enumerate(map(str, classes)))
        settings["label2id"] = {str(c): number for number, c in enumerate(classes)}
    kinds = ("*.safetensors", "pytorch_model*.bin")
    files = [file for kind in kinds for file in Path(name).glob(kind)]
    if pretrained and Path(name).is_dir() and not files:
        report(f"{name} has no weights: the model starts untrained")
        pretrained = False
    try:
        config = transformers.AutoConfig.from_pretrained(name, **settings)
        if not pretrained:
            return auto.from_config(config, dtype=torch.float32).train()
        return auto.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,  # else what it was saved in, which may be bf16
            ignore_mismatched_sizes=bool(classes),
        ).train()
    except (OSError, ValueError) as error:
        raise ModelError(_explain_loading(name, "model", error)) from error


class LogitsModel(nn.Module):
    """A model of transformers that takes a tensor and gives its logits.

    Args:
        pad_token_id: tokens with this id are not attended to; None for no mask.
    """

    def __init__(self, model: nn.Module, pad_token_id: int | None = None) -> None:
        super().__init__()
        self.model, self.pad_token_id = model, pad_token_id
        if pad_token_id is not None:  # classifiers read the last token before it
            model.config.pad_token_id = pad_token_id

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        if self.pad_token_id is None:
            return self.model(inputs).logits
        return self.model(inputs, attention_mask=inputs != self.pad_token_id).logits


class MeanPooledModel(nn.Module):
    """A text model of transformers: tokens (B, T) to vectors of length 1, (B, D).

    They are the mean of the last hidden states over all tokens but padding.
    """

    def __init__(self, model: nn.Module, pad_token_id: int) -> None:
        super().__init__()
        self.model, self.pad_token_id = model, pad_token_id
        if getattr(model, "pooler", None) is not None:
            model.pooler = None  # unused here, it would never get a gradient

    def forward(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        mask_BT = tokens_BT != self.pad_token_id
        x_BTD = self.model(tokens_BT, attention_mask=mask_BT).last_hidden_state
        # The sum does: its length is scaled to 1.
        return F.normalize((x_BTD * mask_BT.unsqueeze(-1)).sum(1), dim=-1)


def load_timm_model(
    name: str,
    classes: Sequence[str],
    pretrained: bool = True,
    report: Callable[[str], None] = print,
) -> nn.Module:
    """A model of timm with a head for these classes.

    Args:
        pretrained: False starts from random weights; so does a model that timm has no
            weights for, which is said.

    Raises:
        ModelError: there is no such model, or its weights cannot be had.
    """
    try:
        import timm
    except ImportError as error:
        raise ImportError(
            f"the model {name} needs {error.name}: pip install timm"
        ) from error
    if not timm.is_model(name):
        similar = timm.list_models(f"*{name.partition('_')[0]}*")[:5]
        hint = f"there is {', '.join(similar)}" if similar else "see timm.list_models()"
        raise ModelError(f"timm has no model {name}: {hint}")
    if pretrained and not timm.is_model_pretrained(name):
        report(f"timm has no weights for {name}: the model starts untrained")
        pretrained = False
    try:
        return timm.create_model(name, pretrained, num_classes=len(classes))
    except (OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(
            f"cannot load the weights of {name}: {reason}: check the network, or pass"
            " pretrained=False"
        ) from error
