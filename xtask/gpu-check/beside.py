"""Our step beside the two PyTorch scripts, in turns on one device: users/s of each round.

Called by check.py. Needs a Python that imports torch; without one the parts are left out and say so.
"""

import statistics
import sys

# The official task and what differs in its shape from the benchmark's own.
OFFICIAL = ["--item-tower", "content", "--output-dim", "4096", "--targets", "10"]
# The official shape; smaller for a try without a GPU.
SHAPE = {"cuda": ["--batch", "1024"], "cpu": ["--batch", "8", "--layers", "1", "--hidden", "64", "--heads", "2",
                                              "--input-dim", "32"]}
STEPS = {"cuda": ["--repetitions", "20"], "cpu": ["--repetitions", "2"]}
PRECISIONS = {"cuda": ["bf16"], "cpu": ["f32"]}
ROUNDS = {"cuda": 3, "cpu": 2}


def contestants(here, worker, device, precision):
    """Their commands; dimensions of content embeddings are those of users and items too."""
    shape = SHAPE[device]
    width = shape[shape.index("--input-dim") + 1] if "--input-dim" in shape else "4096"
    flags = ["--device", device, "--precision", precision, *shape, *STEPS[device], "--json"]
    # compiling and choosing kernels is over before the steps that count
    warm = ["--warmup", "8"]
    return {
        "ours": [worker, "bench", "step", *[width if word == "4096" else word for word in OFFICIAL], *flags],
        "padded": [sys.executable, "-B", here / "pytorch" / "padded.py", *flags, *warm],
        "packed": [sys.executable, "-B", here / "pytorch" / "packed.py", *flags, *warm],
    }


def run(here, worker, device, part):
    """Parts by name, and the rounds of each precision: rates of everybody, and our share of the ceiling."""
    parts, rounds = {}, {}
    importable = part("torch_in_python", [sys.executable, "-c", "import torch; print(torch.__version__)"])
    if importable["rc"] != 0:
        reason = "this Python cannot import torch; run with one that can to have the scripts beside ours"
        return {"beside_pytorch": {"rc": 0, "left_out": reason}}, rounds
    for precision in PRECISIONS[device]:
        rates, shares = {}, []
        for number in range(ROUNDS[device]):
            for name, command in contestants(here, worker, device, precision).items():
                result = part(f"{name}_{precision}_{number + 1}", command)
                parts[f"{name}_{precision}_{number + 1}"] = result
                answer = result["json"] if isinstance(result["json"], dict) else {}
                rates.setdefault(name, []).append(answer.get("median_users_per_second"))
                if name == "ours":
                    rates.setdefault("ceiling", []).append(answer.get("ceiling_users_per_second"))
                    shares.append(answer.get("ceiling_share"))
        batch = int(SHAPE[device][SHAPE[device].index("--batch") + 1])
        rounds[precision] = {"batch": batch, "users_per_second": rates, "ceiling_share": shares}
        for name in ("padded", "packed"):
            over = [a / b for a, b in zip(rates["ours"], rates[name]) if a and b]
            if over:
                print(f"   {precision} over {name}: {min(over):.2f} to {max(over):.2f}, median {statistics.median(over):.2f}",
                      flush=True)
    return parts, rounds
