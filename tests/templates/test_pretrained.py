"""Models of transformers and timm, from small folders: nothing is downloaded."""

import sys
import types

import pytest
import torch
from torch import nn

from templates.pretrained import (
    LogitsModel,
    MeanPooledModel,
    ModelError,
    load_hf_base,
    load_hf_tokenizer,
    load_timm_model,
)

transformers = pytest.importorskip("transformers")

SIZES = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
}


def save_tokenizer(folder, **special):
    tokenizers = pytest.importorskip("tokenizers")
    words = ["[PAD]", "[SEP]", "[UNK]", "one", "two", "three", "four", "five"]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    fast.save_pretrained(folder)
    return str(folder)


def bert(folder, **settings):
    config = transformers.BertConfig(vocab_size=8, **SIZES, **settings)
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch.manual_seed(0)


def classifier(folder, report=print):
    name = "AutoModelForSequenceClassification"
    return load_hf_base(name, bert(folder), classes=["no", "yes", "so"], report=report)


def test_a_folder_without_weights_starts_untrained_and_says_so(tmp_path):
    said = []
    base = classifier(tmp_path, said.append)
    assert said == [f"{tmp_path} has no weights: the model starts untrained"]
    assert base.training
    assert base.config.id2label == {0: "no", 1: "yes", 2: "so"}
    assert base.config.label2id == {"no": 0, "yes": 1, "so": 2}
    assert LogitsModel(base, 0)(torch.ones(4, 5, dtype=torch.int64)).shape == (4, 3)


def test_saved_weights_come_back_in_fp32_with_a_head_of_our_classes(tmp_path):
    saved = classifier(tmp_path)
    saved.to(torch.bfloat16).save_pretrained(tmp_path)
    said = []
    auto, name = "AutoModelForSequenceClassification", str(tmp_path)
    same = load_hf_base(auto, name, classes=["no", "yes", "so"], report=said.append)
    assert said == []
    assert same.training
    for key, value in same.state_dict().items():
        assert value.dtype in (torch.float32, torch.int64)
        assert torch.equal(value, saved.state_dict()[key].to(value.dtype)), key
    other = load_hf_base(auto, name, classes=["a", "b"])
    assert other.classifier.weight.shape[0] == 2
    assert torch.equal(
        other.bert.embeddings.word_embeddings.weight,
        same.bert.embeddings.word_embeddings.weight,
    )
    fresh = load_hf_base(auto, name, pretrained=False, classes=["a", "b"])
    assert not torch.equal(
        fresh.bert.embeddings.word_embeddings.weight,
        same.bert.embeddings.word_embeddings.weight,
    )


@pytest.mark.parametrize("kind", ["classifier", "embedder"])
def test_padding_changes_nothing(kind, tmp_path):
    if kind == "classifier":
        model = LogitsModel(classifier(tmp_path), 0).eval()
    else:
        model = MeanPooledModel(load_hf_base("AutoModel", bert(tmp_path)), 0).eval()
    tokens = torch.randint(1, 8, (3, 5))
    padded = nn.functional.pad(tokens, (0, 4))
    assert torch.allclose(model(tokens), model(padded), atol=1e-5)
    assert not torch.allclose(model(tokens), model(tokens.flip(1)), atol=1e-4)


def test_the_pooled_vector_is_the_mean_and_every_parameter_learns(tmp_path):
    model = MeanPooledModel(load_hf_base("AutoModel", bert(tmp_path)), 0).eval()
    tokens = torch.tensor([[3, 4, 5, 0], [6, 0, 0, 0]])
    vectors = model(tokens)
    states = model.model(tokens, attention_mask=tokens != 0).last_hidden_state
    means = torch.stack([states[0, :3].mean(0), states[1, 0]])
    assert torch.allclose(vectors, nn.functional.normalize(means, dim=-1), atol=1e-6)
    (vectors * torch.randn_like(vectors)).sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name


def test_a_causal_model_gives_logits_without_a_mask(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=11, num_key_value_heads=2, max_position_embeddings=32, **SIZES
    )
    config.save_pretrained(tmp_path)
    base = load_hf_base("AutoModelForCausalLM", str(tmp_path), use_cache=False)
    model = LogitsModel(base).eval()
    tokens = torch.randint(0, 11, (2, 6))
    before = model(tokens)
    assert before.shape == (2, 6, 11)
    tokens[:, 4:] = 1
    assert torch.allclose(before[:, :4], model(tokens)[:, :4], atol=1e-6)


def test_an_image_model_gives_logits(tmp_path):
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    config.save_pretrained(tmp_path)
    name = "AutoModelForImageClassification"
    model = LogitsModel(load_hf_base(name, str(tmp_path), classes=["a", "b"]))
    assert model(torch.randn(3, 3, 16, 16)).shape == (3, 2)


# --- Tokenizers ----------------------------------------------------------------------


def test_the_tokenizer_has_tokens_for_padding_and_the_end(tmp_path):
    special = {"unk_token": "[UNK]"}
    both = save_tokenizer(
        tmp_path / "both", pad_token="[PAD]", eos_token="[SEP]", **special
    )
    assert load_hf_tokenizer(both).pad_token_id == 0
    assert load_hf_tokenizer(both).eos_token_id == 1
    end = save_tokenizer(tmp_path / "end", eos_token="[SEP]", **special)
    assert load_hf_tokenizer(end).pad_token_id == 1
    separator = save_tokenizer(
        tmp_path / "sep", sep_token="[SEP]", pad_token="[PAD]", **special
    )
    assert load_hf_tokenizer(separator).eos_token_id == 1
    none = save_tokenizer(tmp_path / "none", **special)
    with pytest.raises(ModelError, match=r"none has no token for padding.*eos_token"):
        load_hf_tokenizer(none)


# --- What can go wrong ---------------------------------------------------------------


def test_a_model_that_is_not_there_is_named(tmp_path):
    (tmp_path / "empty").mkdir()
    for load in (load_hf_tokenizer, lambda name: load_hf_base("AutoModel", name)):
        with pytest.raises(ModelError, match=r"cannot load the .* of .*empty: .*check"):
            load(str(tmp_path / "empty"))


def test_a_model_that_cannot_do_it_is_named(tmp_path):
    config = transformers.ViTConfig(image_size=16, patch_size=8, **SIZES)
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="Unrecognized configuration class"):
        load_hf_base("AutoModelForCausalLM", str(tmp_path))


@pytest.mark.parametrize(
    ("package", "load"),
    [
        ("transformers", lambda: load_hf_tokenizer("gpt2")),
        ("timm", lambda: load_timm_model("resnet18", ["a", "b"])),
    ],
)
def test_a_missing_package_is_named_with_its_remedy(package, load, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=f"needs {package}: pip install {package}"):
        load()


# --- timm, by a stand-in: it needs torchvision, which has no build for this torch ----


@pytest.fixture
def timm(monkeypatch):
    """What load_timm_model uses of timm, with the real signatures."""

    def create_model(model_name, pretrained=False, *, num_classes=1000):
        if pretrained and model_name == "offline_net":
            raise RuntimeError("cannot reach the hub")
        made.append((model_name, pretrained))
        return nn.Linear(3, num_classes)

    made = []
    stand_in = types.ModuleType("timm")
    stand_in.create_model = create_model
    stand_in.is_model = lambda name: name in ("offline_net", "small_net", "new_net")
    stand_in.is_model_pretrained = lambda name: name != "new_net"
    stand_in.list_models = lambda pattern: [pattern.replace("*", "") + "_9"]
    stand_in.made = made
    monkeypatch.setitem(sys.modules, "timm", stand_in)
    return stand_in


def test_a_timm_model_has_a_head_of_our_classes_and_its_weights_if_any(timm):
    said = []
    load_timm_model("small_net", ["a", "b"], report=said.append)
    load_timm_model("small_net", ["a", "b"], pretrained=False, report=said.append)
    model = load_timm_model("new_net", ["a", "b", "c"], report=said.append)
    assert model.out_features == 3
    assert timm.made == [("small_net", True), ("small_net", False), ("new_net", False)]
    assert said == ["timm has no weights for new_net: the model starts untrained"]


def test_what_timm_cannot_give_is_named(timm):
    with pytest.raises(ModelError, match=r"no model small_nit: there is small_9"):
        load_timm_model("small_nit", ["a", "b"])
    with pytest.raises(ModelError, match=r"offline_net: cannot reach .*pretrained=F"):
        load_timm_model("offline_net", ["a", "b"])
