"""What `learn-launch prepare` does from Parquet, in Polars: `prepare_polars.py INTERACTIONS.parquet OUT --k-core K`.

Reads user, item and time; drops exact repeats, then users and items with fewer than K interactions until none is left,
then users shorter than `--min-length`; orders each user's interactions by time (input order where times are equal);
numbers items in order of their ids and users in order of theirs; divides leave-one-out; and writes what a dataset
holds: `items.parquet`, `users.parquet`, `train.arrow`, `valid.arrow`, `test.arrow` (uncompressed Arrow IPC with lists
of item numbers and times) and `facts.json` with counts and the files' SHA-256. Files are synced, as a dataset's are.

Ids become 32-bit numbers once, through Polars' categories; counting and filtering then works on numbers, with NumPy's
`bincount` where that is faster than a group-by.
"""

import argparse
import hashlib
import json
import os
import pathlib

import numpy
import polars as pl


def read(path):
    """User and item as numbers from 0, time, and the ids by number."""
    table = pl.read_parquet(path, columns=["user_id", "item_id", "timestamp"])
    names, columns = {}, {}
    for short, name in (("user", "user_id"), ("item", "item_id")):
        ids = table.get_column(name)
        if ids.dtype == pl.String:
            # each column has categories of its own, so numbers are dense
            coded = ids.cast(pl.Categorical(pl.Categories(f"learn-{short}")))
            columns[short] = coded.to_physical().cast(pl.UInt32)
            names[short] = by_number(coded.unique())
        else:
            unique = ids.unique().sort()
            columns[short] = pl.DataFrame({"id": ids}).join(
                pl.DataFrame({"id": unique, "number": numpy.arange(len(unique), dtype=numpy.uint32)}),
                on="id", how="left", maintain_order="left",
            ).get_column("number")
            names[short] = unique.cast(pl.String)
    return pl.DataFrame({**columns, "time": table.get_column("timestamp")}), names


def by_number(categories):
    """The texts of all categories in the order of their numbers."""
    frame = pl.DataFrame({"number": categories.to_physical(), "id": categories.cast(pl.String)})
    return frame.sort("number").get_column("id")


def counts(numbers, size):
    return numpy.bincount(numbers.to_numpy(), minlength=size)


def without_repeats(table):
    """The first of equal rows, which lie among neighbours of equal user and time."""
    user, time = table["user"].to_numpy(), table["time"].to_numpy()
    tied = numpy.zeros(len(table) + 1, dtype=bool)
    tied[1:-1] = (user[1:] == user[:-1]) & (time[1:] == time[:-1])
    places = numpy.flatnonzero(tied[1:] | tied[:-1])
    keep = numpy.ones(len(table), dtype=bool)
    keep[places] = table[places].select(pl.struct(pl.all()).is_first_distinct()).to_series().to_numpy()
    return table.filter(pl.Series(keep))


def k_core(table, names, k):
    """Keeps users and items with at least `k` interactions."""
    while True:
        before = len(table)
        for column in ("user", "item"):
            enough = counts(table[column], len(names[column])) >= k
            if not enough[table[column].to_numpy()].all():
                table = table.filter(pl.Series(enough[table[column].to_numpy()]))
        if len(table) == before:
            return table


def in_order_of_ids(numbers, ids):
    """The numbers that occur renumbered in the order of their ids, and those ids."""
    occurring = numpy.flatnonzero(counts(numbers, len(ids)))
    named = pl.DataFrame({"number": occurring.astype(numpy.uint32), "id": ids.gather(occurring)}).sort("id")
    renumbered = numpy.zeros(len(ids), dtype=numpy.uint32)
    renumbered[named["number"].to_numpy()] = numpy.arange(len(named), dtype=numpy.uint32)
    return pl.Series(renumbered[numbers.to_numpy()]), named["id"]


def write(out, name, put):
    """Writes a file durably and describes it."""
    path = out / name
    put(path)
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        while piece := file.read(1 << 20):
            digest.update(piece)
    return {"path": name, "sha256": digest.hexdigest(), "bytes": path.stat().st_size}


def prepare(source, out, k, min_length):
    table, names = read(source)
    facts = {"read": len(table)}
    # a user's rows side by side, in order of time; two stable sorts of one column are faster than one of two
    table = without_repeats(table.sort("time", maintain_order=True).sort("user", maintain_order=True))
    if k > 1:
        table = k_core(table, names, k)
    short = counts(table["user"], len(names["user"])) < min_length
    table = table.filter(pl.Series(~short[table["user"].to_numpy()]))
    item, item_ids = in_order_of_ids(table["item"], names["item"])
    user, user_ids = in_order_of_ids(table["user"], names["user"])
    table = pl.DataFrame({"user": user, "item": item, "time": table["time"]})
    rows = table.group_by("user", maintain_order=True).agg("item", "time").sort("user")
    files = [
        write(out, "items.parquet", lambda path: pl.DataFrame({"id": item_ids}).write_parquet(path)),
        write(out, "users.parquet", lambda path: pl.DataFrame({"id": user_ids}).write_parquet(path)),
    ]

    length = pl.col("item").list.len().cast(pl.Int64)

    def held_out(ago):
        """History, and the target `ago` places from the end."""
        history = [pl.col(name).list.head(length - ago) for name in ("item", "time")]
        target = [pl.col(name).list.slice(length - ago, 1) for name in ("item", "time")]
        return rows.select(
            "user",
            history=history[0], targets=target[0], history_times=history[1], target_times=target[1],
        )

    train = rows.filter(length >= 4).select(
        "user", items=pl.col("item").list.head(length - 2), times=pl.col("time").list.head(length - 2)
    )
    for name, part in (("train", train), ("valid", held_out(2)), ("test", held_out(1))):
        files.append(write(out, f"{name}.arrow", part.write_ipc))
    facts |= {"users": len(rows), "items": len(item_ids), "interactions": len(table), "train_users": len(train), "files": files}
    (out / "facts.json").write_text(json.dumps(facts, indent=2))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("interactions")
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--k-core", type=int, default=5)
    parser.add_argument("--min-length", type=int, default=3)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    prepare(arguments.interactions, arguments.out, arguments.k_core, arguments.min_length)


if __name__ == "__main__":
    main()
