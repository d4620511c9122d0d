"""Embeds texts with sentence-transformers on the CPU, as a careful user would: `embed_st.py MODEL TEXTS.json`.

The model is the folder that `learn-embed` reads; mean pooling and unit length as there. Texts are sorted by length (which
`SentenceTransformer.encode` does), the batch size is given, and gradients are off. Prints one line of JSON: seconds of
`encode` (best case: loading and imports are left out), and with `--out` writes the vectors as .npy.
"""

import argparse
import json
import time

import numpy
import torch
from sentence_transformers import SentenceTransformer, models


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("texts")
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    kind = {"f32": torch.float32, "bf16": torch.bfloat16}[arguments.precision]
    words = models.Transformer(
        arguments.model, max_seq_length=arguments.max_tokens, model_args={"dtype": kind, "attn_implementation": "sdpa"}
    )
    pooling = models.Pooling(words.get_word_embedding_dimension(), pooling_mode="mean")
    model = SentenceTransformer(modules=[words, pooling, models.Normalize()], device="cpu")
    with open(arguments.texts) as file:
        texts = json.load(file)
    # the first passes allocate memory and choose kernels
    model.encode(texts[: 2 * arguments.batch], batch_size=arguments.batch)
    start, processor = time.perf_counter(), time.process_time()
    with torch.inference_mode():
        # numpy has no bf16: vectors stay tensors until the clock stands
        rows = model.encode(texts, batch_size=arguments.batch, show_progress_bar=False, convert_to_tensor=True)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    if arguments.out:
        numpy.save(arguments.out, rows.float().numpy())
    print(json.dumps({"texts": len(texts), "seconds": seconds, "processor_seconds": processor, "batch": arguments.batch}))


if __name__ == "__main__":
    main()
