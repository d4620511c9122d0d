"""Content embedding rows over Arrow Flight on loopback: ours and pyarrow's C++ server and client, in turn.

    python bench/pyarrow/flight.py compare --bin target/release --dataset /tmp/learn-bench-rows

The dataset is made on the first call (256 MiB). Each round measures, one after the other:
- ours: `learn-coordinator bench flight`, the service of a job and the client of a worker: 1,024 random rows a request,
  gathered from the mapped files, over DoExchange; the client writes them into one block of memory;
- shared: the same with one client, whose requests go over all connections at once, as those of a worker do;
- exchange: pyarrow doing the same: a server in C++ behind a Python handler that gathers with numpy from one array in
  memory, a client in C++ that reads the batches (and leaves them where they are);
- get: pyarrow sending batches that are ready, over DoGet, without any Python on the way. Nothing is gathered, so this is
  less work than ours.
All are two processes. Four streams are four clients in one process, a connection each, but for `shared`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time

import numpy as np
import pyarrow as pa
import pyarrow.flight as fl


def table(dataset):
    """All rows of a dataset, as one array in memory."""
    manifest = json.load(open(os.path.join(dataset, "dataset.json")))
    parts = []
    for entry in manifest["embeddings"]["files"]:
        batches = pa.ipc.open_file(pa.memory_map(os.path.join(dataset, entry["path"]))).read_all()
        for chunk in batches.column(0).chunks:
            parts.append(chunk.values.to_numpy().reshape(len(chunk), -1))
    return np.concatenate(parts)


def batch(values):
    count, dim = values.shape
    flat = pa.Array.from_buffers(pa.float16(), count * dim, [None, pa.py_buffer(values)])
    return pa.record_batch([pa.FixedSizeListArray.from_arrays(flat, dim)], names=["embedding"])


class Server(fl.FlightServerBase):
    def __init__(self, rows, part):
        super().__init__("grpc+tcp://127.0.0.1:0")
        self.rows = rows
        self.part = part
        self.ready = pa.Table.from_batches([batch(rows[at : at + part]) for at in range(0, len(rows), part)])

    def do_exchange(self, context, descriptor, reader, writer):
        writer.begin(self.ready.schema)
        for chunk in reader:
            items = chunk.data.column(0).to_numpy()
            for at in range(0, len(items), self.part):
                writer.write_batch(batch(np.take(self.rows, items[at : at + self.part], axis=0)))

    def do_get(self, context, ticket):
        return fl.RecordBatchStream(self.ready)


def serve(arguments):
    server = Server(table(arguments.dataset), arguments.part)
    print(server.port, flush=True)
    sys.stdin.read()
    os._exit(0)


def connect(port):
    # without this all clients of a process would share one connection
    return fl.connect(f"grpc+tcp://127.0.0.1:{port}", generic_options=[("grpc.use_local_subchannel_pool", 1)])


def read_exchange(client, arguments, number, ready):
    draws = np.random.default_rng(number)
    schema = pa.schema([pa.field("item", pa.uint32(), False)])
    writer, reader = client.do_exchange(fl.FlightDescriptor.for_command(b"rows"))
    total, started = 0, None
    with writer:
        writer.begin(schema)
        for request in range(1 << 60):
            if request == 2:
                ready.wait()
                total, started = 0, time.perf_counter()
            if started is not None and time.perf_counter() - started >= arguments.seconds:
                return total, time.perf_counter() - started
            items = draws.integers(0, arguments.items, arguments.rows, dtype=np.uint32)
            writer.write_batch(pa.record_batch([pa.array(items)], schema=schema))
            missing = arguments.rows
            while missing:
                values = reader.read_chunk().data.column(0).values
                total += 2 * len(values)
                missing -= len(values) // arguments.dim


def read_get(client, arguments, number, ready):
    total, started = 0, None
    for round_ in range(1 << 60):
        if round_ == 1:
            ready.wait()
            total, started = 0, time.perf_counter()
        reader = client.do_get(fl.Ticket(b"rows"))
        while True:
            try:
                total += 2 * len(reader.read_chunk().data.column(0).values)
            except StopIteration:
                break
            if started is not None and time.perf_counter() - started >= arguments.seconds:
                return total, time.perf_counter() - started


def read(arguments):
    ready = threading.Barrier(arguments.streams)
    read_one = {"exchange": read_exchange, "get": read_get}[arguments.how]
    results = []

    def run(number):
        results.append(read_one(connect(arguments.port), arguments, number, ready))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(arguments.streams)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    total, seconds = sum(bytes_ for bytes_, _ in results), max(seconds for _, seconds in results)
    print(json.dumps({"bytes": total, "seconds": seconds, "gigabytes_per_second": total / seconds / 1e9}), flush=True)
    os._exit(0)


def names(streams):
    """Who takes turns; one stream is shared by nobody."""
    return ["ours", *(["shared"] if streams > 1 else []), "exchange", "get"]


def summary(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def compare(arguments):
    ours = os.path.join(arguments.bin, "learn-coordinator")
    common = ["--dataset", arguments.dataset, "--rows", str(arguments.rows)]

    def run_ours(seconds, *flags):
        command = [ours, "bench", "flight", "--json", "--seconds", str(seconds), *flags, *common]
        quiet = dict(os.environ, RUST_LOG="warn")
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=quiet).stdout)

    first = run_ours(0.1)
    manifest = json.load(open(os.path.join(arguments.dataset, "dataset.json")))
    items, dim = manifest["counts"]["items"], first["dim"]
    me = [sys.executable, os.path.abspath(__file__)]
    part = ["--part", str(arguments.part)]
    server = subprocess.Popen(
        [*me, "serve", "--dataset", arguments.dataset, *part], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    port = server.stdout.readline().strip()

    def run_theirs(how, streams):
        command = [*me, "read", "--port", port, "--how", how, "--streams", str(streams), "--rows", str(arguments.rows)]
        command += ["--items", str(items), "--dim", str(dim), "--seconds", str(arguments.seconds)]
        return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)

    rates = {}
    try:
        for round_ in range(arguments.rounds):
            for streams in arguments.streams:
                measure = {
                    "ours": lambda: run_ours(arguments.seconds, "--clients", str(streams)),
                    "shared": lambda: run_ours(arguments.seconds, "--streams", str(streams)),
                    "exchange": lambda: run_theirs("exchange", streams),
                    "get": lambda: run_theirs("get", streams),
                }
                for name in names(streams):
                    result = measure[name]()
                    rates.setdefault((streams, name), []).append(result["gigabytes_per_second"])
                    print(f"round {round_}, {streams} streams, {name}: {rates[streams, name][-1]:.2f} GB/s", file=sys.stderr)
    finally:
        server.stdin.close()
        server.wait()
    out = {
        "command": " ".join(["python", *sys.argv]),
        "machine": {"cpus": os.cpu_count(), "model": cpu_model(), "kernel": platform.release()},
        "pyarrow": pa.__version__,
        "rows_per_request": arguments.rows,
        "dim": dim,
        "streams": {},
    }
    for streams in arguments.streams:
        of = {name: rates[streams, name] for name in names(streams)}
        out["streams"][streams] = {"gigabytes_per_second": {name: summary(values) for name, values in of.items()}}
        for mine in ["ours", "shared"]:
            if mine in of:
                over = {name: summary([a / b for a, b in zip(of[mine], of[name])]) for name in ["exchange", "get"]}
                out["streams"][streams][f"{mine}_over"] = over
    text = json.dumps(out, indent=2)
    if arguments.out:
        with open(arguments.out, "w") as file:
            file.write(text + "\n")
    print(text)


def cpu_model():
    with open("/proc/cpuinfo") as file:
        return next((line.split(":")[1].strip() for line in file if line.startswith("model name")), "")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    one = commands.add_parser("compare", help="ours and theirs in turn")
    one.add_argument("--bin", default="target/release", help="folder of learn-coordinator and learn-worker")
    one.add_argument("--dataset", required=True, help="made if it does not exist")
    one.add_argument("--rounds", type=int, default=5)
    one.add_argument("--streams", type=int, nargs="+", default=[1, 4])
    one.add_argument("--rows", type=int, default=1024, help="rows of a request")
    one.add_argument("--part", type=int, default=128, help="rows of a batch of pyarrow's server")
    one.add_argument("--seconds", type=float, default=3.0)
    one.add_argument("--out", help="a file for the result, too")
    one.set_defaults(run=compare)
    one = commands.add_parser("serve", help="pyarrow's server; prints its port")
    one.add_argument("--dataset", required=True)
    one.add_argument("--part", type=int, default=128)
    one.set_defaults(run=serve)
    one = commands.add_parser("read", help="pyarrow's client")
    one.add_argument("--port", required=True)
    one.add_argument("--how", choices=["exchange", "get"], required=True)
    one.add_argument("--streams", type=int, default=1)
    one.add_argument("--rows", type=int, default=1024)
    one.add_argument("--items", type=int, required=True)
    one.add_argument("--dim", type=int, required=True)
    one.add_argument("--seconds", type=float, default=3.0)
    one.set_defaults(run=read)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
