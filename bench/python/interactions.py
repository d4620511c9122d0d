"""Synthetic interactions as Parquet, the same bytes for the same numbers: `interactions.py OUT.parquet [ROWS]`.

Users have lengths like those of Amazon's product reviews after 5-core (10 % have 5 items, the median 7, 90 % 15, 99 % 40),
items are drawn with Zipf-like popularity, some rows are exact repeats and some users and items fall below 5, so that
every stage of `prepare` has work. Rows are ordered by time, as dumps by date are, so a user's rows lie anywhere.
Ids are texts of Amazon's shape (28 and 10 characters) or, with `--ids integer`, numbers.
"""

import argparse

import numpy
import polars

USERS_PER_ROW = 0.115
ITEMS_PER_ROW = 1 / 100
BASE32 = numpy.frombuffer(b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567", dtype="S1")


def mixed(numbers, seed):
    """64 random-looking bits a number (SplitMix64's finisher)."""
    bits = numbers.astype(numpy.uint64) + numpy.uint64(seed * 0x9E3779B97F4A7C15 % 2**64)
    bits = (bits ^ (bits >> numpy.uint64(30))) * numpy.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> numpy.uint64(27))) * numpy.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> numpy.uint64(31))


def texts(count, prefix, length):
    """Ids of `length` characters, all different: the number itself in base 32, then characters mixed from it."""
    numbers = numpy.arange(count, dtype=numpy.uint64)
    text = numpy.empty((count, length), dtype="S1")
    text[:, : len(prefix)] = numpy.frombuffer(prefix, dtype="S1")
    places = length - len(prefix)
    own = min(places, 7)
    # an odd factor and a shift permute the numbers below 32^own, so ids of neighbours do not look alike
    bits = numpy.uint64(5 * own)
    permuted = (numbers * numpy.uint64(0x2545F4914F6CDD1D)) & ((numpy.uint64(1) << bits) - numpy.uint64(1))
    for place in range(own):
        text[:, len(prefix) + place] = BASE32[(permuted >> numpy.uint64(5 * place)) & numpy.uint64(31)]
    for place in range(own, places):
        text[:, len(prefix) + place] = BASE32[mixed(numbers, place) & numpy.uint64(31)]
    return polars.Series(numpy.ascontiguousarray(text).view(f"S{length}").reshape(count).astype(str))


def lengths(random, users):
    """Interactions of each user: 5 and a log-normal tail; one user in twenty has fewer."""
    drawn = 4.5 + numpy.exp(random.normal(1.0, 1.1, users))
    drawn = numpy.minimum(drawn, 400).astype(numpy.int64)
    short = random.random(users) < 0.05
    return numpy.where(short, random.integers(1, 5, users), drawn)


def interactions(rows, ids):
    random = numpy.random.default_rng(20240)
    users = max(int(rows * USERS_PER_ROW), 10)
    items = max(int(rows * ITEMS_PER_ROW), 10)
    user = numpy.repeat(numpy.arange(users), lengths(random, users))
    random.shuffle(user)
    user = numpy.resize(user, rows)
    # popularity falls with the rank to the power of -0.9, the ranks' first 10 flattened
    weights = (numpy.arange(items) + 10.0) ** -0.9
    edges = numpy.cumsum(weights) / weights.sum()
    item = random.permutation(items)[numpy.minimum(numpy.searchsorted(edges, random.random(rows)), items - 1)]
    time = 1_500_000_000_000 + numpy.sort(random.integers(0, 200_000_000_000, rows))
    # one row in a hundred repeats the one before it
    again = numpy.flatnonzero(random.random(rows) < 0.01)
    again = again[again > 0]
    for column in (user, item, time):
        column[again] = column[again - 1]
    if ids == "text":
        user, item = texts(users, b"AE", 28).gather(user), texts(items, b"B0", 10).gather(item)
    else:
        user, item = user * 7 + 1_000_003, item * 3 + 17
    return polars.DataFrame({"user_id": user, "item_id": item, "timestamp": time})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("rows", type=int, nargs="?", default=20_000_000)
    parser.add_argument("--ids", choices=["text", "integer"], default="text")
    arguments = parser.parse_args()
    interactions(arguments.rows, arguments.ids).write_parquet(arguments.out, row_group_size=1 << 20)


if __name__ == "__main__":
    main()
