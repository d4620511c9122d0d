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


def run(here, worker, device, part, seconds_left, add):
    """Adds parts by name, and after each round the rounds of its precision so far: rates of everybody, our share of the
    ceiling. A round that there is no time for is left out."""
    importable = part("torch_in_python", [sys.executable, "-c", "import torch; print(torch.__version__)"])
    if importable["rc"] != 0:
        reason = "this Python cannot import torch; run with one that can to have the scripts beside ours"
        add({"beside_pytorch": {"rc": 0, "left_out": reason}})
        return
    all_rounds = {}
    for precision in PRECISIONS[device]:
        batch = int(SHAPE[device][SHAPE[device].index("--batch") + 1])
        rates = {name: [] for name in ("ours", "ceiling", "padded", "packed")}
        rounds = all_rounds[precision] = {"batch": batch, "users_per_second": rates, "ceiling_share": []}
        took = 0
        for number in range(1, ROUNDS[device] + 1):
            left = seconds_left()
            if left < took:
                print(f"   no time for round {number}", flush=True)
                break
            for name, command in contestants(here, worker, device, precision).items():
                result = part(f"{name}_{precision}_{number}", command)
                answer = result["json"] if isinstance(result["json"], dict) else {}
                rates[name].append(answer.get("median_users_per_second"))
                if name == "padded":
                    rounds["padded_encoder"] = answer.get("encoder")
                if name == "ours":
                    rates["ceiling"].append(answer.get("ceiling_users_per_second"))
                    rounds["ceiling_share"].append(answer.get("ceiling_share"))
                add({f"{name}_{precision}_{number}": result})
            add({}, beside_pytorch=all_rounds)
            took = left - seconds_left()
        for name in ("padded", "packed"):
            over = [a / b for a, b in zip(rates["ours"], rates[name]) if a and b]
            if over:
                print(f"   {precision} over {name}: {min(over):.2f} to {max(over):.2f}, median {statistics.median(over):.2f}",
                      flush=True)
