#!/usr/bin/env bash
# What only a GPU can tell, into book/results/: time, memory and TFLOP/s of the loss, the training's throughput, the
# time of every chapter; and the tests that need one, two ranks over NCCL among them where there are two GPUs.
#
#     benchmarks/gpu.sh [PYTHON]
#
# Without a GPU it says so and measures nothing. IMSVD_DATA should hold CIFAR-10, and in
# imagenet-samples some photographs of original size.
set -euo pipefail
cd "$(dirname "$0")/.."
python="${1:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
results=book/results

"$python" - <<'PY' || { echo "No CUDA device here: nothing was measured." >&2; exit 1; }
import sys, torch
sys.exit(not torch.cuda.is_available())
PY
"$python" -c 'import torch; print(torch.cuda.get_device_name(), "torch", torch.__version__)'

"$python" benchmarks/loss.py --device cuda --json $results/benchmark-loss-cuda.json
"$python" benchmarks/loss.py --device cuda --dim 16320 --json $results/benchmark-loss-cuda-16320.json
"$python" benchmarks/training.py --scale full --steps 60 --json $results/benchmark-training-cuda.json
"$python" benchmarks/training.py --scale full --steps 60 --compile --json $results/benchmark-training-cuda-compiled.json
"$python" -m pytest -q -m gpu tests
if [ -d "${IMSVD_DATA:-$HOME/.cache/imsvd}/imagenet-samples" ]; then
  "$python" benchmarks/input.py --workers 8 --json $results/benchmark-input-cuda.json
fi
"$python" book/studies/chapters.py $results/chapters-cuda.json
