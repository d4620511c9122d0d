"""`learn-embed` beside sentence-transformers on the CPU, the same MiniLM and the same texts: one line of JSON.

    python bench/python/embed.py --bin target/release [--texts 4000] [--precision f32|bf16] [--threads 2] [--rounds 3]

Makes a catalogue of seeded titles, categories and brands (words of the model's own vocabulary; lengths like those of
product titles), prepares it, and takes the texts to be embedded from `learn-embed --show`, so both read the same prompts.
First the vectors are compared: the smallest cosine of a text's two vectors has to exceed 0.9999 in f32 and 0.999 in bf16.
Then both run in turn, A B A B. Ours is the whole process: start, loading, tokens, vectors, files on disk. Theirs is
`SentenceTransformer.encode` alone, at the best of the batch sizes of `--batches`, texts sorted by length, without imports and
loading. The ratio is our items a second over theirs, pair by pair.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

import measured

try:
    import numpy
    import polars as pl
    import pyarrow.ipc
    import sentence_transformers
    import torch
except ImportError as error:
    sys.exit(f"{error}; install what bench/python/requirements.txt names, or run `cargo xtask bench`, which does")

HERE = pathlib.Path(__file__).parent


def words_of(model):
    """Whole words of the tokenizer, in its order: frequent ones first."""
    vocabulary = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    ordered = sorted(vocabulary, key=vocabulary.get)
    return [word for word in ordered if word.isascii() and word.isalpha() and len(word) > 2]


def catalogue(model, count):
    """Items with a title, a category and a brand: Zipf-like words, sizes and numbers, log-normal lengths."""
    random = numpy.random.default_rng(384)
    words = words_of(model)
    lengths = numpy.clip(numpy.exp(random.normal(2.6, 0.6, count)), 2, 120).astype(int)

    def drawn(length):
        # ranks with density 1 / rank
        ranks = numpy.exp(random.random(length) * numpy.log(len(words))).astype(int) - 1
        parts = [words[rank].capitalize() for rank in ranks]
        if random.random() < 0.5:
            parts.append(f"{random.integers(1, 100)}-{random.choice(['pack', 'inch', 'oz', 'piece'])}")
        if random.random() < 0.3:
            parts.append(f"({''.join(random.choice(list('ABCDEFGHKLMNPRSTX0123456789'), 8))})")
        return " ".join(parts)

    return pl.DataFrame({
        "item_id": [f"I{number:07}" for number in range(count)],
        "title": [drawn(length) for length in lengths],
        "category": [drawn(2 + number % 3) for number in range(count)],
        "brand": [drawn(1) for _ in range(count)],
    })


def interactions(items):
    """Enough interactions for a dataset: every item in one of a few users' histories."""
    rows = [(f"U{number % 50}", item, number) for number, item in enumerate(items)]
    return pl.DataFrame(rows, schema=["user_id", "item_id", "timestamp"], orient="row")


def vectors(dataset):
    """Our rows, in order of items."""
    parts = sorted((dataset / "embeddings").glob("part-*.arrow"))
    batches = [batch for part in parts for batch in pyarrow.ipc.open_file(part.as_posix()).read_all().to_batches()]
    rows = [batch.column(0).flatten().to_numpy().reshape(batch.num_rows, -1) for batch in batches]
    return numpy.concatenate(rows).astype(numpy.float32)


class Contest:
    def __init__(self, arguments, folder):
        self.arguments, self.folder = arguments, folder
        self.dataset = folder / "dataset"
        self.cores = set(sorted(measured.os.sched_getaffinity(0))[: arguments.threads])
        table = catalogue(arguments.model, arguments.texts)
        table.write_parquet(folder / "items.parquet")
        interactions(table["item_id"]).write_parquet(folder / "interactions.parquet")
        settings = folder / "bench.toml"
        settings.write_text(
            f'[data]\ndataset = "{self.dataset}"\n'
            f'[prepare.interactions]\nfiles = ["{folder / "interactions.parquet"}"]\n'
            f'[prepare.items]\nfiles = ["{folder / "items.parquet"}"]\n'
            f'[embed]\nmodel = "{arguments.model.absolute()}"\nprecision = "{arguments.precision}"\n'
            f'device = "cpu"\nmax_tokens = {arguments.max_tokens}\nthreads = {arguments.threads}\n'
        )
        launch = arguments.bin / "learn-launch"
        measured.run([launch, "prepare", settings], self.cores)
        _, shown = measured.run([launch, "config", "show", settings, "--json"], self.cores)
        self.config = folder / "config.json"
        self.config.write_text(shown)
        embed = [arguments.bin / "learn-embed", "--config", self.config]
        _, prompts = measured.run([*embed, "--show", str(arguments.texts)], self.cores)
        texts = [line.split("\t", 1)[1] for line in prompts.splitlines()]
        self.texts = folder / "texts.json"
        self.texts.write_text(json.dumps(texts))
        self.embed = [*embed, "--threads", str(arguments.threads)]

    def ours(self):
        shutil.rmtree(self.dataset / "embeddings", ignore_errors=True)
        return self.said("learn-embed", measured.run(self.embed, self.cores)[0])

    def theirs(self, batch, out=None):
        arguments = self.arguments
        command = [
            sys.executable, HERE / "embed_st.py", arguments.model, self.texts, "--precision", arguments.precision,
            "--max-tokens", str(arguments.max_tokens), "--batch", str(batch), "--threads", str(arguments.threads),
        ]
        figures, told = measured.run([*command, *(["--out", out] if out else [])], self.cores)
        told = json.loads(told.splitlines()[-1])
        # peak memory is the process's; the clock ran for `encode` alone
        return self.said(f"sentence-transformers, {batch}", {**figures, **{name: told[name] for name in ("seconds", "processor_seconds")}})

    def said(self, name, figures):
        figures["items_per_second"] = self.arguments.texts / figures["seconds"]
        print(f"{name}: {figures['items_per_second']:.0f} items/s", file=sys.stderr)
        return figures

    def compare(self):
        """The smallest cosine of two vectors of a text."""
        self.ours()
        out = self.folder / "theirs.npy"
        self.theirs(self.arguments.batches[0], out)
        a, b = vectors(self.dataset), numpy.load(out)
        cosines = (a * b).sum(1) / numpy.linalg.norm(a, axis=1) / numpy.linalg.norm(b, axis=1)
        limit = 0.9999 if self.arguments.precision == "f32" else 0.999
        if a.shape != b.shape or not cosines.min() > limit:
            sys.exit(f"the vectors differ: smallest cosine {cosines.min()}, text {int(cosines.argmin())}")
        return float(cosines.min())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default="target/release", help="folder of learn-launch and learn-embed")
    parser.add_argument("--model", type=pathlib.Path, default=".deps/minilm")
    parser.add_argument("--texts", type=int, default=4000)
    parser.add_argument("--precision", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(measured.os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", type=lambda text: [int(part) for part in text.split(",")], default=[32, 64, 128])
    parser.add_argument("--folder", type=pathlib.Path, help="where data lies while this runs [default: the system's temporary folder]")
    parser.add_argument("--json", action="store_true", help="the default; accepted so that all benchmarks take it")
    parser.add_argument("--out", type=pathlib.Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        contest = Contest(arguments, pathlib.Path(folder))
        cosine = contest.compare()
        print(f"smallest cosine: {cosine}", file=sys.stderr)
        tried = {batch: contest.theirs(batch)["seconds"] for batch in arguments.batches}
        batch = min(tried, key=tried.get)
        a, b = zip(*[(contest.ours(), contest.theirs(batch)) for _ in range(arguments.rounds)])
    result = {
        "bench": "embed",
        "machine": measured.machine(),
        "model": arguments.model.name,
        "texts": arguments.texts,
        "precision": arguments.precision,
        "threads": arguments.threads,
        "rounds": arguments.rounds,
        "smallest_cosine": cosine,
        "versions": {"sentence-transformers": sentence_transformers.__version__, "torch": torch.__version__},
        "their_batch": batch,
        "ours": measured.summary(a),
        "sentence_transformers": measured.summary(b),
        "ratio": {"items_per_second": measured.ratios(b, a, "items_per_second")},
    }
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
