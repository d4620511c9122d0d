"""Runs programs in turn and says what they took: wall-clock, processor time and peak memory of a process and its children."""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile


# Linux counts in a program's peak what the process that starts it holds, so a small one starts it.
STARTER = """
import json, os, sys, time
cores, report, *command = sys.argv[1:]
os.sched_setaffinity(0, [int(core) for core in cores.split(",")])
start = time.perf_counter()
_, status, usage = os.wait4(os.posix_spawnp(command[0], command, os.environ), 0)
figures = {
    "seconds": time.perf_counter() - start,
    "processor_seconds": usage.ru_utime + usage.ru_stime,
    "peak_memory_bytes": usage.ru_maxrss * 1024,
    "code": os.waitstatus_to_exitcode(status),
}
os.write(int(report), json.dumps(figures).encode())
"""


def run(command, cores, environment=None):
    """Seconds, processor seconds and peak bytes of one run on these cores, and what it printed."""
    command = [str(word) for word in command]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, tempfile.TemporaryFile() as report:
        subprocess.run(
            [sys.executable, "-I", "-S", "-c", STARTER, ",".join(map(str, cores)), str(report.fileno()), *command],
            env={**os.environ, **(environment or {})},
            stdout=out,
            stderr=err,
            pass_fds=[report.fileno()],
        )
        texts = []
        for file in (out, err, report):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    figures = json.loads(texts[2] or '{"code": null}')
    if figures.pop("code") != 0:
        sys.exit(f"{' '.join(command)} failed:\n{texts[1]}")
    return figures, texts[0]


def spread(values):
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


def summary(runs):
    """Minimum, median and maximum of each figure of the runs."""
    return {name: spread([run[name] for run in runs]) for name in runs[0]}


def ratios(ours, theirs, name):
    """Theirs over ours, pair by pair, as they ran one after the other."""
    return spread([b[name] / a[name] for a, b in zip(ours, theirs)])


def machine():
    model = next(
        (line.split(":", 1)[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    return {"processor": model, "cores": len(os.sched_getaffinity(0)), "system": platform.platform()}
