"""Writes the tiny random decoders of the golden tests, and what Hugging Face transformers makes of some texts.

Run: python make_tiny_decoders.py   (torch 2.11, transformers 4.57, tokenizers, sentencepiece, safetensors)
Output beside this file: tiny-{llama,mistral,qwen2,qwen3,baichuan}/ with config.json, weights, tokenizer, texts.json and
expected.safetensors {ids.N, hidden.N: last hidden state of text N, rows: its mean, L2-normalised}, in float64
arithmetic; tiny-{mistral,baichuan}/sentencepiece.json: texts and the ids of the sentencepiece library.
Baichuan is no class of transformers: its expectations come from a Llama of the same numbers whose query, key and value
matrices are then packed into one. A second run writes the same files.
"""

import json
import random
from pathlib import Path

import sentencepiece
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, Qwen2Config, Qwen2ForCausalLM, Qwen3Config,
    Qwen3ForCausalLM,
)

HERE = Path(__file__).parent
LONGEST = 40
OPENING = "The item information is given as follows."
TEXTS = [
    f'{OPENING} Item title is "Red Lamp".',
    f'{OPENING} Item title is "Phone cables". The brand is "Blue".',
    "a",
    "  two spaces  and one at the end ",
    "Lamps, chairs & tables: größer und 大きい赤いランプ 🔴💡",
    " ".join(["small red chair with blue table"] * 12),
    "lamp " * 37 + "lamp",
]
CORPUS = [
    OPENING, "Item title is", "This item belongs to", "and brand is", "The brand is", "The price is",
    "The key words of items are", "The item supports", "small red chair with blue table", "large green lamp for phones",
    "phone case and cable set 1995 2024", "大きい赤いランプ", "红色台灯 适合卧室", "light  and   lamp    light",
]
HARD = [
    "", " ", "  ", "   a", "a  b", "a ", "\n", "a\nb", "\t", "<s>", "</s>", "<unk>", "a<s>b", "<0x41>", "▁", "▁▁a",
    "\u00a0x", "ﬁne", "①②", "e\u0301", "🔴💡", "👩‍👩‍👧 family", "lamp<sep>lamp <sep>", "<sep>", "<sep><sep>", "<se",
    "lamp" * 40, "ababababa", "aaaaaaaa", "大きい 大きい大きい", "红色红色台灯", "1995 2024 199520241995", "\x00\x7f\u200b",
    "naïve café, Ünïcödé", "한국어", "مصباح مكتب", "Бесплатная доставка",
]


def byte_level(first=None, last=None):
    """A byte-level BPE, as Llama 3 and Qwen have it, with these special tokens around each text."""
    result = Tokenizer(models.BPE())
    result.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    result.decoder = decoders.ByteLevel()
    special = [token for token in (first, last) if token]
    result.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(
            vocab_size=300, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    if special:
        around = " ".join(([first] if first else []) + ["$A"] + ([last] if last else []))
        result.post_processor = processors.TemplateProcessing(
            single=around, special_tokens=[(token, result.token_to_id(token)) for token in special]
        )
    return result


def pieces(folder, symbols, dummy_prefix):
    """A SentencePiece BPE as Llama's and Baichuan's: byte fallback, no normalisation, all spaces kept."""
    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(CORPUS * 3))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=380,
        byte_fallback=True, add_dummy_prefix=dummy_prefix, remove_extra_whitespaces=False,
        normalization_rule_name="identity", split_digits=True, allow_whitespace_only_pieces=True,
        user_defined_symbols=symbols, minloglevel=2,
    )
    corpus.unlink()
    (folder / "tokenizer.vocab").unlink()
    # What the trainer notes about its own run says where it ran.
    path = folder / "tokenizer.model"
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    del proto.trainer_spec.input[:]
    proto.trainer_spec.model_prefix = "tokenizer"
    # One piece that is not used: sentencepiece takes it apart again.
    unused = max((piece for piece in proto.pieces if piece.type == 1), key=lambda piece: piece.score * (len(piece.piece) > 3) or -1e9)
    unused.type = 5
    path.write_bytes(proto.SerializeToString())
    words = sentencepiece.SentencePieceProcessor(model_file=str(path))
    random.seed(3)
    letters = "aeblmp 大红🔴▁\n" + "".join(symbols)
    texts = TEXTS + HARD + ["".join(random.choices(letters, k=random.randint(1, 30))) for _ in range(100)]
    texts += [" ".join(random.choices(CORPUS, k=3))[random.randint(0, 9) :] for _ in range(30)]
    cases = [[text, words.encode(text)] for text in texts]
    (folder / "sentencepiece.json").write_text(json.dumps(cases, ensure_ascii=False) + "\n")
    return words


def randomized(model_class, config, kind):
    torch.manual_seed(7)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.25)
            # What is computed with is what is stored.
            parameter.copy_(parameter.to(kind))
    return model


def write(folder, model, encode):
    config = model.config.to_dict()
    (folder / "config.json").write_text(json.dumps(config, indent=1, default=str) + "\n")
    exact = model.model.double()
    expected, rows = {}, []
    with torch.no_grad():
        for number, text in enumerate(TEXTS):
            ids = torch.tensor([encode(text)])
            hidden = exact(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
            expected[f"ids.{number}"] = ids[0]
            expected[f"hidden.{number}"] = hidden[0].float()
            rows.append(torch.nn.functional.normalize(hidden.mean(1), dim=-1)[0])
    save_file({"rows": torch.stack(rows).float(), **expected}, folder / "expected.safetensors")
    (folder / "texts.json").write_text(json.dumps(TEXTS, ensure_ascii=False, indent=1) + "\n")


def place(name):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    return folder


def with_template(folder, tokenizer):
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    return lambda text: tokenizer.encode(text).ids


SHAPE = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=40,
    max_position_embeddings=LONGEST, attn_implementation="eager", rms_norm_eps=1e-5,
)


def llama():
    """Sharded; Llama 3.1's rope, heads wider than hidden / heads, all biases, a BOS from the template."""
    folder, words = place("tiny-llama"), byte_level("<|begin|>")
    scaling = dict(
        rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
    )
    config = LlamaConfig(
        vocab_size=words.get_vocab_size(), head_dim=10, attention_bias=True, mlp_bias=True, rope_theta=500.0,
        rope_scaling=scaling, **SHAPE,
    )
    model = randomized(LlamaForCausalLM, config, torch.float32)
    state = {name: tensor.contiguous() for name, tensor in model.model.state_dict().items()}
    names = sorted(state)
    shards = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in shards.items():
        save_file({name: state[name] for name in held}, folder / file)
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    write(folder, model, with_template(folder, words))


def mistral():
    """bf16, a window of 8, tokenizer.model with BOS."""
    folder = place("tiny-mistral")
    words = pieces(folder, [], True)
    config = MistralConfig(vocab_size=words.get_piece_size(), head_dim=8, sliding_window=8, rope_theta=1e4, **SHAPE)
    model = randomized(MistralForCausalLM, config, torch.bfloat16)
    state = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    settings = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    write(folder, model, lambda text: ([words.bos_id()] + words.encode(text))[:LONGEST])


def qwen2():
    """f16, tied embeddings, biases of queries, keys and values, linear rope, a window in the last layer, no BOS."""
    folder, words = place("tiny-qwen2"), byte_level()
    config = Qwen2Config(
        vocab_size=words.get_vocab_size(), tie_word_embeddings=True, use_sliding_window=True, sliding_window=6,
        max_window_layers=1, rope_theta=1e4, rope_scaling=dict(rope_type="linear", factor=2.0), **SHAPE,
    )
    model = randomized(Qwen2ForCausalLM, config, torch.float16)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    save_file(state, folder / "model.safetensors")
    write(folder, model, with_template(folder, words))


def qwen3():
    """Norms of queries and keys, heads wider than hidden / heads, an end token from the template."""
    folder, words = place("tiny-qwen3"), byte_level(None, "<|end|>")
    config = Qwen3Config(vocab_size=words.get_vocab_size(), head_dim=12, rope_theta=1e6, **SHAPE)
    model = randomized(Qwen3ForCausalLM, config, torch.float16)
    save_file({name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors")
    write(folder, model, with_template(folder, words))


def baichuan():
    """One matrix for queries, keys and values; tokenizer.model with symbols of its own, no BOS, no space in front."""
    folder = place("tiny-baichuan")
    words = pieces(folder, ["<sep>", "<reserved_106>"], False)
    shape = {**SHAPE, "num_key_value_heads": 4}
    model = randomized(LlamaForCausalLM, LlamaConfig(vocab_size=words.get_piece_size(), **shape), torch.float16)
    state = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    for layer in range(SHAPE["num_hidden_layers"]):
        at = f"model.layers.{layer}.self_attn"
        packed = torch.cat([state.pop(f"{at}.{part}_proj.weight") for part in "qkv"])
        state[f"{at}.W_pack.weight"] = packed
    save_file(state, folder / "model.safetensors")
    settings = {"tokenizer_class": "BaichuanTokenizer", "add_bos_token": False, "add_eos_token": False}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings) + "\n")
    write(folder, model, lambda text: words.encode(text)[:LONGEST])
    # The keys that Baichuan2-7B's own file has.
    config = json.loads((folder / "config.json").read_text())
    kept = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_act",
        "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id", "tie_word_embeddings",
    )
    config = {
        "model_type": "baichuan", "architectures": ["BaichuanForCausalLM"], "torch_dtype": "float16",
        "model_max_length": LONGEST, **{key: config[key] for key in kept},
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    for family in (llama, mistral, qwen2, qwen3, baichuan):
        family()
