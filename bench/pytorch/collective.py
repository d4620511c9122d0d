"""gloo's collectives between processes of this machine, measured as `learn-worker bench collective` measures ours."""

import argparse
import json
import os
import statistics
import tempfile
import time

import torch
import torch.distributed as dist


def measure(rank, args, meeting):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=args.workers)
    elements = args.mib << 18
    whole = torch.ones(elements)
    parts = list(whole.tensor_split(args.workers))
    part = torch.ones_like(parts[rank])
    operations = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "all_gather": lambda: dist.all_gather(parts, part),
        "reduce_scatter": lambda: dist.reduce_scatter(part, parts),
    }
    times = {}
    for repetition in range(args.repetitions + 1):
        for name, operation in operations.items():
            whole.fill_(1.0)
            dist.barrier()
            started = time.perf_counter()
            try:
                operation()
            except (RuntimeError, ValueError):
                # this PyTorch's gloo does not have it
                continue
            dist.barrier()
            if repetition > 0:
                times.setdefault(name, []).append(time.perf_counter() - started)
    if rank == 0:
        gigabytes = 4 * elements / 1e9
        result = {
            "backend": "gloo", "workers": args.workers, "bytes": 4 * elements,
            "operations": {name: {"seconds": seconds, "median_gigabytes_per_second": gigabytes / statistics.median(seconds)}
                           for name, seconds in times.items()},
        }
        if args.json:
            print(json.dumps(result, indent=2))
        else:
            for name, operation in result["operations"].items():
                print(f"{name:<15} {operation['median_gigabytes_per_second']:.2f} GB/s")
    dist.destroy_process_group()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--mib", type=int, default=128)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (args, os.path.join(folder, "meeting")), args.workers)


if __name__ == "__main__":
    main()
