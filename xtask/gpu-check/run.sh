#!/usr/bin/env bash
# Checks the CUDA path: golden cases of towers and losses, the tests of kernels and of the nccl collective (two ranks on one
# GPU where NCCL takes them), encoders in three precisions, benchmarks of parts, our step beside two PyTorch scripts, trainings
# of one rank against the CPU, and what uses them.
# usage: run.sh OUT_DIR [--device cuda|cpu] [--seconds N]
# Needs bash, gzip, python3 and PyTorch 2.11 (or LIBTORCH naming its folder); writes OUT_DIR/gpu-check.json, which has what is known after each part.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
if (($# < 1)); then
  echo "usage: run.sh OUT_DIR [--device cuda|cpu]" >&2
  exit 2
fi

torch=${LIBTORCH:-$(python3 -c 'import torch; print(torch.__path__[0])')}
libraries=$torch/lib
for folder in "$torch"/../nvidia/*/lib; do
  [[ -d $folder ]] && libraries+=:$folder
done
export LD_LIBRARY_PATH=$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
# neither here, which stays as small as it came, nor in OUT_DIR, which comes back
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir "$scratch/bin"
for packed in "$here"/bin/*.gz; do
  program=$scratch/bin/$(basename "$packed" .gz)
  gunzip --stdout "$packed" >"$program"
  chmod +x "$program"
done
python3 "$here/check.py" --torch "$torch" --scratch "$scratch" "$@"
