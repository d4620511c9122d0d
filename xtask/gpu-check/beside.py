"""Our step beside the two PyTorch scripts, in turns on one device: users/s of each round, and the ratios.

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
    """Parts by name, and for each precision the ratios and our share of the ceiling."""
    parts, ratios = {}, {}
    importable = part("torch_in_python", [sys.executable, "-c", "import torch; print(torch.__version__)"])
    if importable["rc"] != 0:
        reason = "this Python cannot import torch; run with one that can to have the scripts beside ours"
        return {"beside_pytorch": {"rc": 0, "left_out": reason}}, ratios
    for precision in PRECISIONS[device]:
        rates, shares = {}, []
        for number in range(ROUNDS[device]):
            for name, command in contestants(here, worker, device, precision).items():
                result = part(f"{name}_{precision}_{number + 1}", command)
                parts[f"{name}_{precision}_{number + 1}"] = result
                rate = result["json"].get("median_users_per_second") if isinstance(result["json"], dict) else None
                rates.setdefault(name, []).append(rate)
                if name == "ours" and rate:
                    shares.append(result["json"].get("ceiling_share"))
        ratios[precision] = {"users_per_second": rates, "ceiling_share": shares}
        for name in ("padded", "packed"):
            over = [a / b for a, b in zip(rates["ours"], rates[name]) if a and b]
            if over:
                spread = {"min": min(over), "median": statistics.median(over), "max": max(over)}
                ratios[precision][f"over_{name}"] = spread
                print(f"   {precision} over {name}: {spread}", flush=True)
    return parts, ratios
