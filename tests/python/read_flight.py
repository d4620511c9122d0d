"""Reads a job's data service with pyarrow alone: read_flight.py GRPC_URL SECRET_FILE [WORLD_SIZE]

Lists the flights, reads the batches of every rank of one whole epoch, checks that each training user comes exactly once,
fetches content embeddings with DoExchange, as f16 and as int8, and prints JSON:
{"flights": [...], "users": N, "rows": N, "dim": N}.
"""

import json
import sys

import pyarrow as pa
import pyarrow.flight as flight


def connect(url, secret_file):
    with open(secret_file, encoding="ascii") as file:
        secret = file.read().strip()
    options = flight.FlightCallOptions(headers=[(b"authorization", f"Bearer {secret}".encode())])
    return flight.connect(url.replace("http://", "grpc+tcp://", 1)), options


def fact(schema, key):
    return schema.metadata[f"learn.{key}".encode()].decode()


def ticket(**fields):
    return flight.Ticket(json.dumps({"version": 1, **fields}).encode())


def epoch_users(client, options, steps, world_size):
    """Users of the first `steps` steps, over all ranks; checks what the messages say of each step."""
    users, global_users, items = [], {}, set()
    for rank in range(world_size):
        stream = client.do_get(
            ticket(kind="batches", rank=rank, world_size=world_size, from_step=0, steps=steps), options
        )
        for chunk in stream:
            meta = json.loads(chunk.app_metadata.to_pybytes())
            if global_users.setdefault(meta["step"], meta["global_users"]) != meta["global_users"]:
                raise SystemExit(f"the ranks do not agree on step {meta['step']}")
            batch = chunk.data
            users += batch.column("user").to_pylist()
            for name in ("history", "targets"):
                items.update(batch.column(name).flatten().to_pylist())
    if sum(global_users.values()) != len(users):
        raise SystemExit(f"{len(users)} rows, but the steps have {sum(global_users.values())} users")
    return users, sorted(items)


def column(batch, value, dim):
    found = batch.column("embedding")
    if found.type != pa.list_(pa.field("item", value, nullable=False), dim):
        raise SystemExit(f"unexpected type {found.type}")
    return found.to_pylist()


def read_f16(batch, dim):
    """Vectors."""
    return column(batch, pa.float16(), dim)


def read_int8(batch, dim):
    """Pairs of a vector and its scale."""
    scales = batch.column("scale").to_pylist()
    rows = zip(column(batch, pa.int8(), dim), scales)
    return [([value * scale for value in values], scale) for values, scale in rows]


def fetch_rows(client, options, items, dim, columns=read_f16, **more):
    """Content embeddings of `items`, in their order, as `columns` reads them; in two requests."""
    command = json.dumps({"version": 1, "kind": "rows", **more}).encode()
    writer, reader = client.do_exchange(flight.FlightDescriptor.for_command(command), options)
    schema = pa.schema([pa.field("item", pa.uint32(), nullable=False)])
    requests = [items[: len(items) // 2], items[len(items) // 2 :]]
    vectors = []
    with writer:
        writer.begin(schema)
        for number, wanted in enumerate(requests):
            writer.write_batch(pa.record_batch([pa.array(wanted, pa.uint32())], schema=schema))
            part, parts = 0, 1
            while part < parts:
                chunk = reader.read_chunk()
                meta = json.loads(chunk.app_metadata.to_pybytes())
                if (meta["request"], meta["part"]) != (number, part):
                    raise SystemExit(f"part {part} of request {number} expected, got {meta}")
                part, parts = part + 1, meta["parts"]
                vectors += columns(chunk.data, dim)
        writer.done_writing()
    return vectors


def main(url, secret_file, world_size="2"):
    client, options = connect(url, secret_file)
    flights = {info.descriptor.path[0].decode(): info for info in client.list_flights(options=options)}
    schema = flights["train"].schema
    steps, wanted = int(fact(schema, "steps_per_epoch")), int(fact(schema, "users"))
    users, items = epoch_users(client, options, steps, int(world_size))
    if sorted(users) != list(range(wanted)):
        raise SystemExit(f"an epoch should have each of {wanted} users once; it has {len(users)} rows")
    dim = int(fact(schema, "dim"))
    vectors = fetch_rows(client, options, items, dim)
    if len(vectors) != len(items) or any(not any(vector) for vector in vectors):
        raise SystemExit(f"{len(items)} rows wanted, {len(vectors)} got, or some are zero")
    rounded = fetch_rows(client, options, items, dim, read_int8, format="int8")
    near = (
        abs(exact - value) <= 0.5001 * scale
        for vector, (values, scale) in zip(vectors, rounded)
        for exact, value in zip(vector, values)
    )
    if len(rounded) != len(items) or not all(near):
        raise SystemExit("int8 rows are not those of f16, rounded")
    print(json.dumps({"flights": list(flights), "users": len(users), "rows": len(vectors), "dim": dim}))


if __name__ == "__main__":
    main(*sys.argv[1:])
