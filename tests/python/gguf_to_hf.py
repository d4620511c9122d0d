"""A model of the Llama family from GGUF to the Hugging Face layout that `embed.model` reads: gguf_to_hf.py FILE OUT

FILE is a .gguf of the architecture `llama` with a byte-level BPE tokenizer, as SmolLM2 and Llama 3 have it. Needs the
PyPI package `gguf`, which undoes the quantisation (what that has cost stays lost). Writes OUT/config.json,
OUT/tokenizer.json, OUT/tokenizer_config.json and OUT/model.safetensors (f32: 4 bytes a parameter), with one tensor in
memory at a time. What would change a vector and is not known here is refused by name.
"""

import json
import os
import pathlib
import re
import sys

# Names in GGUF and in transformers; `output` is missing where it is the embeddings once more.
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}
# Keys of `llama.` that are read, or say nothing about vectors; `expert_count` and the like are neither.
SHAPE = {
    "block_count": "num_hidden_layers", "context_length": "max_position_embeddings", "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size", "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads", "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps", "rope.freq_base": "rope_theta",
}
ALSO_READ = {"vocab_size", "rope.dimension_count", "attention.value_length"}
# How a text is cut before the merges, by `tokenizer.ggml.pre`; Llama 3 besides takes pieces of the vocabulary whole,
# and begins texts with a special token where the file does not say.
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CUTS = {
    "smollm": [{"type": "Digits", "individual_digits": True}, {**BYTES, "use_regex": True}],
    "llama-bpe": [
        {"type": "Split", "pattern": {"Regex": LLAMA_3}, "behavior": "Isolated", "invert": False},
        {**BYTES, "use_regex": False},
    ],
}
# `tokenizer.ggml.token_type`
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5


class Unknown(Exception):
    """Something that would change a vector and is not known here."""


def halves(rows, heads):
    """Where transformers' rows of queries or keys lie in GGUF: rotary positions turn pairs of numbers, which llama.cpp
    has side by side, and transformers half a head apart.

    >>> halves(8, 2)
    [0, 2, 1, 3, 4, 6, 5, 7]
    >>> halves(6, 1)
    [0, 2, 4, 1, 3, 5]
    """
    width = rows // heads
    return [head + place for head in range(0, rows, width) for half in (0, 1) for place in range(half, width, 2)]


def renamed(name):
    """A tensor's name in transformers.

    >>> renamed("blk.7.attn_q.weight"), renamed("output_norm.weight")
    ('model.layers.7.self_attn.q_proj.weight', 'model.norm.weight')
    """
    found = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    layer, part = found.groups() if found else (None, None)
    known = LAYER if layer else WHOLE
    if part not in known:
        remedy = "; take Llama 3.1 and later as safetensors" if part == "rope_freqs" else ""
        raise Unknown(f"the tensor {name}{remedy}")
    return f"model.layers.{layer}.{LAYER[part]}.weight" if layer else f"{WHOLE[part]}.weight"


def configuration(fields, tensors):
    """`config.json` from the metadata and the tensors' shapes by their names in transformers."""
    if fields.get("general.architecture") != "llama":
        raise Unknown(f"the architecture {fields.get('general.architecture')}; only llama is")
    own = {key.removeprefix("llama."): value for key, value in fields.items() if key.startswith("llama.")}
    for key in own.keys() - SHAPE.keys() - ALSO_READ:
        raise Unknown(f"llama.{key} = {own[key]}")
    config = {SHAPE[key]: value for key, value in own.items() if key in SHAPE}
    config.setdefault("num_key_value_heads", config["num_attention_heads"])
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    config.setdefault("rope_theta", 10000.0)
    for key in ("rope.dimension_count", "attention.value_length"):
        if own.get(key, config["head_dim"]) != config["head_dim"]:
            raise Unknown(f"llama.{key} = {own[key]}, which is not the width {config['head_dim']} of a head")
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "torch_dtype": "float32", "hidden_act": "silu",
        "vocab_size": tensors["model.embed_tokens.weight"][0], "tie_word_embeddings": "lm_head.weight" not in tensors,
        "attention_bias": False, "mlp_bias": False, **config,
    }


def tokenizer(fields):
    """`tokenizer.json` and `tokenizer_config.json`."""
    of = {key.removeprefix("tokenizer.ggml."): value for key, value in fields.items()}
    model, pre = of.get("model"), of.get("pre")
    if model != "gpt2":
        raise Unknown(f"the tokenizer {model}; only byte-level BPE (gpt2) is")
    if pre not in CUTS:
        raise Unknown(f"the way {pre} to cut texts before BPE; only {', '.join(CUTS)} are")
    tokens, kinds = of["tokens"], of["token_type"]
    if strange := set(kinds) - {NORMAL, CONTROL, USER_DEFINED, UNUSED}:
        raise Unknown(f"the token types {sorted(strange)}")
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    added = [
        {"id": number, "content": token, **plain, "special": kind == CONTROL}
        for number, (token, kind) in enumerate(zip(tokens, kinds, strict=True))
        if kind in (CONTROL, USER_DEFINED)
    ]
    first, last, special = [], [], {}
    for end, default in (("bos", pre == "llama-bpe"), ("eos", False)):
        if of.get(f"add_{end}_token", default):
            number = of[f"{end}_token_id"]
            special[tokens[number]] = {"id": tokens[number], "ids": [number], "tokens": [tokens[number]]}
            (first if end == "bos" else last).append({"SpecialToken": {"id": tokens[number], "type_id": 0}})
    one, two = ([*first, {"Sequence": {"id": text, "type_id": 0}}, *last] for text in "AB")
    template = {"type": "TemplateProcessing", "single": one, "pair": one + two, "special_tokens": special}
    files = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": CUTS[pre]},
        "post_processor": template if special else None,
        "decoder": {**BYTES, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": pre == "llama-bpe",
            "vocab": {token: number for number, token in enumerate(tokens)}, "merges": of["merges"],
        },
    }
    names = {f"{end}_token": tokens[of[f"{end}_token_id"]] for end in ("bos", "eos") if f"{end}_token_id" in of}
    return files, {"tokenizer_class": "PreTrainedTokenizerFast", **names}


def main(file, out):
    import numpy
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    # GGUF has the fastest dimension first
    shapes = {renamed(tensor.name): tensor.shape.tolist()[::-1] for tensor in reader.tensors}
    config = configuration(fields, shapes)
    words, settings = tokenizer(fields)

    out = pathlib.Path(out)
    out.mkdir(parents=True, exist_ok=True)
    for name, content in (("config.json", config), ("tokenizer.json", words), ("tokenizer_config.json", settings)):
        (out / name).write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * int(numpy.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    part = out / "model.safetensors.part"
    with open(part, "wb") as weights:
        weights.write(len(text).to_bytes(8, "little") + text)
        for tensor in reader.tensors:
            values = dequantize(tensor.data, tensor.tensor_type).astype("<f4", copy=False)
            kind = tensor.name.split(".")[-2]
            weights.write((values[halves(len(values), heads[kind])] if kind in heads else values).tobytes())
    os.replace(part, out / "model.safetensors")
    print(f"{out}: {end // 4:,} parameters, {len(words['model']['vocab']):,} tokens")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    try:
        main(*sys.argv[1:])
    except Unknown as unknown:
        sys.exit(f"{sys.argv[1]}: not known here: {unknown}")
