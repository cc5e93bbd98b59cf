#!/usr/bin/env bash
# What the compiler made of a model, step by step, from the command line. No GPU is needed.
#
#     bash examples/inspect_walkthrough.sh
set -euo pipefail
cd "$(dirname "$0")/.."
attncompiler="${ATTNCOMPILER:-.venv/bin/attncompiler}"

echo "--- 1. What was taken, what was not, and why"
"$attncompiler" explain examples/train_gpt.py:GPT

echo
echo "--- 2. The program of the first region"
"$attncompiler" inspect examples/train_gpt.py:GPT --region 0 --show ir

echo "--- 3. Its kernels for sm_90: registers, spills, shared memory"
"$attncompiler" inspect examples/train_gpt.py:GPT --region 0 --target sm_90

echo
echo "--- 4. The generated source (the first lines)"
"$attncompiler" inspect examples/train_gpt.py:GPT --region 0 --show source | head -n 40 || true

echo
echo "--- 5. A page with program, mask and source side by side"
mkdir -p build
"$attncompiler" inspect examples/train_gpt.py:GPT --region 0 --show ir --html build/gpt.html > /dev/null
