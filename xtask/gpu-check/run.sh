#!/usr/bin/env bash
# Checks the CUDA path: golden cases of towers and losses, the tests of kernels and of the nccl collective (two ranks on one
# GPU where NCCL takes them), encoders in three precisions, trainings of one rank against the CPU, what uses them, benchmarks
# of parts, and our step beside two PyTorch scripts.
# usage: run.sh OUT_DIR [--device cuda|cpu] [--seconds N]
# Needs bash, gzip, python3 and PyTorch 2.11 (or LIBTORCH naming its folder); writes OUT_DIR/gpu-check.json.
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
gunzip --keep --force "$here"/bin/*.gz
chmod +x "$here"/bin/*
exec python3 "$here/check.py" --torch "$torch" "$@"
