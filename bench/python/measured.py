"""Runs programs in turn and says what they took: wall-clock, processor time and peak memory of a process and its children."""

import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time


def run(command, cores, environment=None):
    """Seconds, processor seconds and peak bytes of one run on these cores."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            command,
            env={**os.environ, **(environment or {})},
            stdout=out,
            stderr=err,
            preexec_fn=lambda: os.sched_setaffinity(0, cores),
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    if process.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{texts[1]}")
    return {
        "seconds": seconds,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_bytes": usage.ru_maxrss * 1024,
    }, texts[0]


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
