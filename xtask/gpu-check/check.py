"""Runs the parts of the GPU check one after the other and writes gpu-check.json; see run.sh.

Each training runs on the device and again on the CPU: losses and gradient norms of all steps must be the same but for
rounding. Exit code 0 if every part succeeded. Needs nothing but the standard library, and for the comparison with PyTorch
(beside.py) a Python that imports torch.
"""

import argparse
import json
import math
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

import beside

HERE = pathlib.Path(__file__).resolve().parent
TAIL_CHARACTERS = 6000
# When all parts must have ended; what is cut off or left out then has failed.
DEADLINE = math.inf
# What is trained: settings, and how far the losses may lie from those of the CPU, as a share.
TRAININGS = {
    "train": ([], 1e-4),
    # a GPU rounds scores to bf16, which their sums even out and the gradient's norm does not
    "train_bf16": (["training.precision=bf16"], 0.05),
    "train_full_softmax": (["objective.kind=full_softmax", "objective.pairs=next", "objective.catalogue_batch=40",
                            "model.learn_logit_scale=true"], 1e-4),
    "train_next_item": (["objective.kind=next_item", "objective.history_negatives=3", "training.micro_batch=24"], 1e-4),
    "train_ids": (["model.item_input=id", "optimizer.clip_norm=0.5"], 1e-4),
    "train_content_ids": (["model.item_input=content_id", "model.id_dropout=0.3", "training.micro_batch=24"], 1e-4),
    "train_softmax_ids": (["model.item_input=content_id", "objective.kind=full_softmax"], 1e-4),
    "train_uniform": (["objective.uniform_negatives=50", "objective.logq_correction=true"], 1e-4),
    "train_time_gaps": (["model.time_embedding=gap", "model.position_embedding=learned", "model.item_tower=causal"], 1e-4),
    "train_history_code": (["model.history_code=64", "model.residual=content", "model.centring=true",
                            "model.residual_trained=true"], 1e-4),
    "train_cvr": (["objective.cvr_weight=0.5", "objective.cvr_hidden=16"], 1e-4),
    # some of the rows stay on the device, and others take their place
    "train_device_cache": (["cluster.device_row_cache=2KiB", "training.micro_batch=24"], 1e-4),
}
# These runs are judged, exported and asked for recommendations on the device too.
USED = ["train_time_gaps", "train_history_code", "train_ids"]
# Our parts alone: the published layers and widths in both precisions, twelve layers, the loss, checkpoints.
STEP = ["step", "--batch", "64", "--repetitions", "10"]
DEEP = ["step", "--layers", "12", "--batch", "1024", "--repetitions", "10", "--precision", "bf16", *beside.OFFICIAL]
BENCH_RUNS = {
    "bench_f32": STEP,
    "bench_bf16": [*STEP, "--precision", "bf16"],
    "bench_12_layers_bf16": DEEP,
    "bench_loss": ["loss"],
    "bench_checkpoint": ["checkpoint", "--precision", "bf16", "--batch", "1024"],
}
# Small ones, for a try without a GPU.
SMALL = ["--layers", "1", "--hidden", "64", "--heads", "2", "--input-dim", "32", "--output-dim", "16", "--batch", "8",
         "--items", "200", "--repetitions", "2"]
BENCH_CPU = {
    "bench_f32": ["step", *SMALL],
    "bench_loss": ["loss", "--users", "64", "--repetitions", "1"],
    "bench_checkpoint": ["checkpoint", *SMALL],
}

def part(name, command, seconds, cwd, **environment):
    """Runs one command; its exit code, seconds, JSON lines of its output, and its last words."""
    print(f"== {name}: {' '.join(map(str, command))}", flush=True)
    started = time.monotonic()
    seconds = min(seconds, max(DEADLINE - started, 0.1))
    try:
        done = subprocess.run([str(word) for word in command], cwd=cwd, timeout=seconds, text=True, errors="replace",
                              env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        rc, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        text = [s.decode(errors="replace") if isinstance(s, bytes) else s or "" for s in (late.stdout, late.stderr)]
        rc, out, err = 124, text[0], text[1] + f"\nended after {seconds:.0f} s"
    except OSError as error:
        rc, out, err = 127, "", str(error)
    took = time.monotonic() - started
    print(f"   exit code {rc} after {took:.1f} s", flush=True)
    result = {"rc": rc, "seconds": round(took, 2), "json": json_lines(out)}
    if rc != 0:
        result["stdout_tail"] = out[-TAIL_CHARACTERS:]
        result["stderr_tail"] = err[-TAIL_CHARACTERS:]
        print(out[-1500:], err[-1500:], flush=True)
    return result


def json_lines(text):
    """The JSON in a program's output: all from the first line that begins an object, or each line that is an object."""
    begin = re.search(r"^\s*\{", text, re.MULTILINE)
    try:
        return json.loads(text[begin.start():]) if begin else []
    except ValueError:
        pass
    found = []
    for line in text.splitlines():
        if line.lstrip().startswith("{"):
            try:
                found.append(json.loads(line))
            except ValueError:
                continue
    return found


def two_ranks(bin_, work):
    """The collective with two ranks on one GPU, where NCCL lets two ranks share one."""
    name = "two_ranks_on_one_gpu"
    # NCCL says why it refuses, and a communicator that was refused may take its time to end
    result = part("nccl_two_ranks", [bin_ / "nccl", "--ignored", "--exact", name, "--nocapture"], 30, work, NCCL_DEBUG="WARN")
    said = result.get("stdout_tail", "") + result.get("stderr_tail", "")
    if result["rc"] != 0 and "Duplicate GPU" in said:
        result |= {"rc": 0, "left_out": "NCCL takes no two ranks on one GPU"}
    return result


def asked_of_gpus(field):
    """What nvidia-smi says of each GPU; nothing without it."""
    if not shutil.which("nvidia-smi"):
        return []
    done = subprocess.run(["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader"], capture_output=True, text=True)
    return done.stdout.split("\n")[:-1] if done.returncode == 0 else []


def machine():
    """As bench/results tells of a machine: no names of hosts, no paths."""
    def field(path, name):
        lines = pathlib.Path(path).read_text().splitlines()
        return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")

    return {
        "processor": field("/proc/cpuinfo", "model name"),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": math.ceil(int(field("/proc/meminfo", "MemTotal").split()[0]) / 2**20),
        "gpus": asked_of_gpus("name"),
        "system": f"Linux {platform.release().split('-')[0]}",
        "revision": (HERE / "revision").read_text().strip(),
    }


def torch_version(torch):
    for name in ("build-version", "version.py"):
        path = torch / name
        if path.is_file():
            found = re.search(r"\d+\.\d+\.\d+[+\w]*", path.read_text())
            if found:
                return found.group()
    return None


def read_json(path):
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        return {"error": str(error)}


def relative_gap(value, wanted):
    """Infinite for what is no number."""
    gap = abs(value - wanted) / max(abs(wanted), 1e-6) if value is not None else math.inf
    return math.inf if math.isnan(gap) else gap


def compared(run, reference, tolerance):
    """Whether two runs had the same steps; the largest relative gap of each number."""
    if not (run and reference) or len(run) != len(reference):
        return {"rc": 1, "reason": f"{len(run)} steps and {len(reference)} of the reference"}
    names = [name for name in ("loss", "gradient_norm", "cvr_loss") if reference[0].get(name) is not None]
    gaps = {name: max(relative_gap(a.get(name), b[name]) for a, b in zip(run, reference)) for name in names}
    within = all(gap <= tolerance for gap in gaps.values())
    print(f"   largest relative gaps: {gaps}", flush=True)
    return {"rc": 0 if within else 1, "gaps": gaps, "tolerance": tolerance}


class Report:
    """What is known, in a file that is whole after each part."""

    def __init__(self, path, facts):
        self.path, self.content = path, facts | {"parts": {}, "beside_pytorch": {}}

    def add(self, parts, **more):
        self.content["parts"] |= parts
        self.content |= more | {"failed": self.failed()}
        aside = self.path.with_suffix(".tmp")
        aside.write_text(json.dumps(self.content, indent=1))
        aside.replace(self.path)

    def failed(self):
        return [name for name, result in self.content["parts"].items() if result["rc"] != 0]


class Trainings:
    """Runs of learn-launch in one folder."""

    def __init__(self, launch, config, work):
        self.launch, self.config, self.work = launch, config, work

    def run(self, name, settings, device):
        command = [self.launch, "train", self.config, "--name", name, "--device", device]
        result = part(name, command + [word for one in settings for word in ("--set", one)], 120, self.work)
        run = self.work / "runs" / name
        metrics = run / "metrics.jsonl"
        result["summary"] = read_json(run / "summary.json")
        result["steps"] = json_lines(metrics.read_text()) if metrics.is_file() else []
        if result["rc"] != 0:
            result["logs"] = {log.name: log.read_text(errors="replace")[-TAIL_CHARACTERS:]
                              for log in sorted((run / "logs").glob("*.log"))}
        return result

    def check(self, name, settings, device, tolerance):
        """The parts of one training: on the device, on the CPU, and what lies between them."""
        here = self.run(name, settings, device)
        reference = self.run(f"{name}_on_cpu", settings, "cpu")
        gap = compared(here["steps"], reference["steps"], tolerance)
        return {name: here, f"{name}_on_cpu": reference, f"{name}_gap": gap}

    def use(self, name):
        """The parts that use a run: evaluation, export and recommendation, on the device that it was trained on."""
        run = f"runs/{name}"
        commands = {
            "eval": ["eval", run, "--json"],
            "export": ["export", run, "--out", f"{name}-exported", "--json"],
            "recommend": ["recommend", run, "--users", "u3", "--json"],
        }
        return {f"{name}_{verb}": part(f"{name}_{verb}", [self.launch, *words], 60, self.work)
                for verb, words in commands.items()}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--seconds", type=float, default=540, help="for all parts; the default fits into ten minutes")
    parser.add_argument("--torch", type=pathlib.Path, required=True)
    parser.add_argument("--scratch", type=pathlib.Path, required=True, help="a folder with the programs in bin/")
    options = parser.parse_args()
    global DEADLINE
    DEADLINE = time.monotonic() + options.seconds
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    work, bin_ = options.scratch / "work", options.scratch / "bin"
    work.mkdir()
    golden = sorted((HERE / "golden").glob("*.safetensors"))
    launch = bin_ / "learn-launch"
    config = shutil.copy(HERE / "gpu-check.toml", work)
    cuda = options.device == "cuda"
    encoders = sorted(folder for folder in (HERE / "encoders").iterdir() if folder.is_dir())

    report = Report(out / "gpu-check.json", {
        "version": 2,
        "device": options.device,
        "machine": machine(),
        "torch": torch_version(options.torch),
        "driver": asked_of_gpus("driver_version"),
    })

    def run(name, command, seconds):
        report.add({name: part(name, command, seconds, work)})

    run("doctor", [bin_ / "learn-worker", "doctor", "--json"], 120)
    run("golden", [bin_ / "golden", "--device", options.device, *golden], 300)
    # on a GPU the attention of f32 has kernels of its own
    run("golden_f32", [bin_ / "golden", "--kind", "f32", "--device", options.device, *golden], 300)
    # one after the other, because some count the GPU's memory; without a GPU those that need none, so that a try has run
    # these programs
    wanted = ["--ignored", "--test-threads=1", "--skip", "two_ranks"] if cuda else []
    for program in ("nccl", "collective", "torch"):
        run(f"tests_{program}", [bin_ / program, *wanted], 240)
    if cuda:
        report.add({"nccl_two_ranks": two_ranks(bin_, work)})
    run("encoders", [bin_ / "encoders", "--device", options.device, *encoders], 120)
    for name, flags in (BENCH_RUNS if cuda else BENCH_CPU).items():
        run(name, [bin_ / "learn-worker", "bench", *flags, "--device", options.device, "--json"], 300)
    beside.run(HERE, bin_ / "learn-worker", options.device, lambda name, command: part(name, command, 300, work),
               lambda: DEADLINE - time.monotonic(), report.add)
    run("data", [sys.executable, HERE / "make_data.py", work], 60)
    run("prepare", [launch, "prepare", config], 120)
    run("embed", [launch, "embed", config], 120)
    trainings = Trainings(launch, config, work)
    for name, (settings, tolerance) in TRAININGS.items():
        report.add(trainings.check(name, settings, options.device, tolerance))
    for name in USED:
        report.add(trainings.use(name))
    run("bench_cache", [bin_ / "learn-coordinator", "bench", "wire", "--json"], 120)

    failed, count = report.failed(), len(report.content["parts"])
    print(f"{report.path}: {count - len(failed)} parts passed, {len(failed)} failed {failed or ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
