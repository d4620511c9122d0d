"""`learn-launch prepare` beside a Polars script that does the same, from Parquet: one line of JSON.

    python bench/python/prepare.py --bin target/release [--rows 20000000] [--ids text|integer] [--cores 1] [--rounds 3]

Makes synthetic interactions (`interactions.py`), lets both prepare them once and compares what they wrote: the same
users, items and interactions, and for every user the same sequences, histories, targets and times. Then both run in turn,
A B A B, each as a process of its own on the same cores, and what they wrote is removed in between. The ratio is Polars'
figure over ours, pair by pair.
"""

import argparse
import json
import pathlib
import shutil
import sys
import tempfile

import measured

try:
    import interactions
    import polars as pl
    import prepare_polars
except ImportError as error:
    sys.exit(f"{error}; install what bench/python/requirements.txt names, or run `cargo xtask bench`, which does")


def ours(folder):
    """Tables of a dataset, with ids for numbers."""
    users = pl.read_parquet(sorted((folder / "users").glob("*.parquet")))["id"]
    items = pl.read_parquet(sorted((folder / "items").glob("*.parquet")), columns=["id"])["id"]
    parts = {
        split: pl.concat([pl.read_ipc(file) for file in sorted((folder / "sequences").glob(f"{split}-*.arrow"))])
        for split in ("train", "valid", "test")
    }
    return users, items, parts


def theirs(folder):
    users, items = (pl.read_parquet(folder / f"{name}.parquet")["id"] for name in ("users", "items"))
    return users, items, {split: pl.read_ipc(folder / f"{split}.arrow") for split in ("train", "valid", "test")}


def compare(dataset, script):
    """Stops unless both hold the same."""
    (users, items, parts), (their_users, their_items, their_parts) = ours(dataset), theirs(script)
    if not items.equals(their_items):
        sys.exit("the items differ")
    if not users.sort().equals(their_users.sort()):
        sys.exit("the users differ")
    for split, part in parts.items():
        named, their_named = (
            table.with_columns(user=ids.gather(table["user"])).sort("user")
            for table, ids in ((part, users), (their_parts[split], their_users))
        )
        for column in named.columns:
            if not named[column].equals(their_named[column]):
                sys.exit(f"{split}: {column} differs")
    facts = json.loads((dataset / "dataset.json").read_text())["counts"]
    found = json.loads((script / "facts.json").read_text())
    for name in ("users", "items", "interactions", "train_users"):
        if facts[name] != found[name]:
            sys.exit(f"{name}: {facts[name]} and {found[name]}")
    return {name: facts[name] for name in ("users", "items", "interactions")}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bin", type=pathlib.Path, default="target/release", help="folder of learn-launch")
    parser.add_argument("--rows", type=int, default=20_000_000)
    parser.add_argument("--ids", choices=["text", "integer"], default="text")
    parser.add_argument("--k-core", type=int, default=5)
    parser.add_argument("--cores", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=pathlib.Path, help="where data lies while this runs [default: the system's temporary folder]")
    parser.add_argument("--json", action="store_true", help="the default; accepted so that all benchmarks take it")
    parser.add_argument("--out", type=pathlib.Path, help="also write the JSON to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        result = bench(arguments, pathlib.Path(folder))
    text = json.dumps(result)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    print(text)


def bench(arguments, folder):
    source = folder / "interactions.parquet"
    interactions.interactions(arguments.rows, arguments.ids).write_parquet(source, row_group_size=1 << 20)
    configuration = folder / "bench.toml"
    dataset, script = folder / "dataset", folder / "polars"
    configuration.write_text(
        f'[data]\ndataset = "{dataset}"\n[prepare]\nk_core = {arguments.k_core}\n[prepare.interactions]\nfiles = ["{source}"]\n'
    )
    cores = set(sorted(measured.os.sched_getaffinity(0))[: arguments.cores])
    prepare = [arguments.bin / "learn-launch", "prepare", configuration]
    polars = [sys.executable, prepare_polars.__file__, source, script, "--k-core", str(arguments.k_core)]
    threads = {"POLARS_MAX_THREADS": str(len(cores)), "RAYON_NUM_THREADS": str(len(cores))}

    def round_of(command, output):
        shutil.rmtree(output, ignore_errors=True)
        figures, _ = measured.run(command, cores, threads)
        print(f"{output.name}: {figures['seconds']:.1f} s, {figures['processor_seconds']:.1f} s of processor", file=sys.stderr)
        return figures

    round_of(prepare, dataset)
    round_of(polars, script)
    facts = compare(dataset, script)
    print(f"the same: {facts}", file=sys.stderr)
    runs = [(round_of(prepare, dataset), round_of(polars, script)) for _ in range(arguments.rounds)]
    a, b = zip(*runs)
    seconds = measured.spread([run["processor_seconds"] for run in a])
    return {
        "bench": "prepare",
        "machine": measured.machine(),
        "rows": arguments.rows,
        "ids": arguments.ids,
        "cores": len(cores),
        "rounds": arguments.rounds,
        "facts": facts,
        "versions": {"polars": pl.__version__},
        "ours": measured.summary(a),
        "polars": measured.summary(b),
        "interactions_per_processor_second": arguments.rows / seconds["median"],
        "ratio": {name: measured.ratios(a, b, name) for name in ("seconds", "processor_seconds", "peak_memory_bytes")},
    }


if __name__ == "__main__":
    main()
