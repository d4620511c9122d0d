"""Runs the parts of the GPU check one after the other and writes gpu-check.json; see run.sh.

Exit code 0 if every part succeeded. Needs nothing but the standard library.
"""

import argparse
import json
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
TAIL_CHARACTERS = 6000
# The step that the benchmark times: the published layers and widths, in both precisions.
BENCH = ["--layers", "4", "--hidden", "768", "--heads", "12", "--input-dim", "4096", "--output-dim", "64"]
BENCH_RUNS = {
    "bench_f32": [*BENCH, "--batch", "64", "--repetitions", "10"],
    "bench_bf16": [*BENCH, "--batch", "64", "--repetitions", "10", "--bf16"],
}
# A small one, for a try without a GPU.
BENCH_CPU = {
    "bench_f32": ["--layers", "1", "--hidden", "64", "--heads", "2", "--input-dim", "32", "--output-dim", "16",
                  "--batch", "8", "--items", "200", "--repetitions", "2"],
}


def part(name, command, seconds, cwd):
    """Runs one command; its exit code, seconds, JSON lines of its output, and its last words."""
    print(f"== {name}: {' '.join(map(str, command))}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run([str(word) for word in command], cwd=cwd, timeout=seconds, text=True, errors="replace",
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        rc, out, err = done.returncode, done.stdout, done.stderr
    except subprocess.TimeoutExpired as late:
        text = [s.decode(errors="replace") if isinstance(s, bytes) else s or "" for s in (late.stdout, late.stderr)]
        rc, out, err = 124, text[0], text[1] + f"\nended after {seconds} s"
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
    """The JSON in a program's output: the whole of it, or each line that is an object."""
    try:
        return json.loads(text)
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


def gpus():
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total,compute_cap", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True)
    return done.stdout.strip().splitlines() if done.returncode == 0 else done.stderr.strip()


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


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--torch", type=pathlib.Path, required=True)
    options = parser.parse_args()
    out = options.out.resolve()
    work = out / "work"
    if work.exists():
        shutil.rmtree(work)
    work.mkdir(parents=True)
    bin_ = HERE / "bin"
    golden = sorted((HERE / "golden").glob("*.safetensors"))
    launch = bin_ / "learn-launch"
    config = shutil.copy(HERE / "gpu-check.toml", work)
    cuda = options.device == "cuda"
    train = ["--set", f"cluster.device={options.device}"]

    report = {
        "version": 1,
        "device": options.device,
        "machine": {"host": platform.node(), "system": platform.platform(), "cpu": platform.machine(), "gpus": gpus()},
        "torch": {"path": str(options.torch), "version": torch_version(options.torch)},
        "parts": {},
    }
    parts = report["parts"]
    parts["doctor"] = part("doctor", [bin_ / "learn-worker", "doctor", "--json"], 120, work)
    parts["golden"] = part("golden", [bin_ / "golden", "--device", options.device, *golden], 300, work)
    parts["data"] = part("data", [sys.executable, HERE / "make_data.py", work], 60, work)
    parts["prepare"] = part("prepare", [launch, "prepare", config], 120, work)
    parts["embed"] = part("embed", [launch, "embed", config], 120, work)
    parts["train"] = part("train", [launch, "train", config, *train], 300, work)
    run = work / "runs" / "gpu-check"
    parts["train"]["summary"] = read_json(run / "summary.json")
    metrics = run / "metrics.jsonl"
    parts["train"]["steps"] = json_lines(metrics.read_text()) if metrics.is_file() else []
    parts["train"]["logs"] = {log.name: log.read_text(errors="replace")[-TAIL_CHARACTERS:]
                              for log in sorted((run / "logs").glob("*.log"))}
    for name, flags in (BENCH_RUNS if cuda else BENCH_CPU).items():
        bench = [bin_ / "learn-worker", "bench-step", "--device", options.device, "--json", *flags]
        parts[name] = part(name, bench, 300, work)

    failed = [name for name, result in parts.items() if result["rc"] != 0]
    report["failed"] = failed
    (out / "gpu-check.json").write_text(json.dumps(report, indent=1))
    shutil.rmtree(work)
    print(f"{out / 'gpu-check.json'}: {len(parts) - len(failed)} parts passed, {len(failed)} failed {failed or ''}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
