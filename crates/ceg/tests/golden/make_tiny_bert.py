"""Writes the tiny random encoders of the golden tests, and what Hugging Face transformers makes of some texts.

Run: python make_tiny_bert.py   (transformers, tokenizers, safetensors; a second run writes the same files)
Output beside this file: tiny-bert/, tiny-roberta/ {config.json, tokenizer.json, model.safetensors, expected.safetensors,
texts.json}. Expected rows are the mean over tokens of the last hidden state, L2-normalised, in float64 arithmetic.
"""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

HERE = Path(__file__).parent
LONGEST = 40
WORDS = (
    "the item information is given as follows title this belongs to and brand price key words of items supports "
    "red blue green small large lamp chair table phone case cable a in on with for pack set light ##s ##ing ##ed"
)
TEXTS = [
    'The item information is given as follows. Item title is "Red Lamp".',
    'The item information is given as follows. Item title is "Phone cables". The brand is "Blue".',
    "",
    "a",
    "Lamps, chairs & tables: größer and 大きい",
    " ".join(["small red chair with blue table"] * 30),
    "large " * 37 + "lamp",
]


def tokenizer(roberta):
    special = ["<s>", "<pad>", "</s>", "<unk>"] if roberta else ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    unknown, first, last = ("<unk>", "<s>", "</s>") if roberta else ("[UNK]", "[CLS]", "[SEP]")
    pieces = special + WORDS.split() + list("abcdefghijklmnopqrstuvwxyz0123456789.,:\"&")
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    result = Tokenizer(models.WordPiece(vocabulary, unk_token=unknown))
    result.normalizer = normalizers.BertNormalizer(lowercase=True)
    result.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    result.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}", special_tokens=[(name, vocabulary[name]) for name in (first, last)]
    )
    result.add_special_tokens(special)
    # A model's own settings, which the encoder has to replace.
    result.enable_truncation(8)
    result.enable_padding(length=8, pad_id=vocabulary[special[1 if roberta else 0]], pad_token=special[1 if roberta else 0])
    return result


def write(name, config, model_class):
    torch.manual_seed(7)
    model = model_class(config, add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    roberta = config.model_type == "roberta"
    words = tokenizer(roberta)
    words.save(str(folder / "tokenizer.json"))
    config.architectures = [model_class.__name__]
    (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=1, default=str) + "\n")
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / "model.safetensors")

    words.no_padding()
    words.enable_truncation(LONGEST)
    exact = model.double()
    rows = []
    with torch.no_grad():
        for text in TEXTS:
            ids = torch.tensor([words.encode(text).ids])
            hidden = exact(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            rows.append(torch.nn.functional.normalize(hidden.mean(1), dim=-1)[0])
    save_file({"rows": torch.stack(rows).float()}, folder / "expected.safetensors")
    (folder / "texts.json").write_text(json.dumps(TEXTS, ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    size = len(tokenizer(False).get_vocab())
    shape = dict(
        vocab_size=size, hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=48,
        attn_implementation="eager",
    )
    write("tiny-bert", BertConfig(max_position_embeddings=LONGEST, layer_norm_eps=1e-6, **shape), BertModel)
    write(
        "tiny-roberta",
        RobertaConfig(
            max_position_embeddings=LONGEST + 2, layer_norm_eps=1e-5, type_vocab_size=1, pad_token_id=1, **shape
        ),
        RobertaModel,
    )
