#!/usr/bin/env bash
# The promise over the whole matrix: every compressor x horizon x temperature x context on both models, 2,048 tokens a cell.
# usage: matrix_long.sh VERICACHE MODELS_DIR
set -euo pipefail
vericache=$1
models=$2
compressors=(none kivi:bits=2 kivi:bits=3 kivi:bits=4 kivi:bits=6 kivi:bits=8 kivi:k=8,v=4
  quarot:bits=2 quarot:bits=3 quarot:bits=4 quarot:bits=6 quarot:bits=8 quarot:k=4,v=2 plane:bits=6 plane:bits=7 plane:bits=8 plane:bits=9 fp8 int8
  kvquant:bits=2 kvquant:bits=3 kvquant:bits=4 snapkv:budget=0.2+kvquant:bits=3
  streaming-llm:window=0.2 snapkv:budget=0.2 snapkv:budget=0.2+kivi:bits=4 snapkv:budget=0.2+quarot:bits=3
  pyramidkv h2o tova knorm keydiff expected kvzip 'adakv(kvzip)+kivi:bits=4' 'adakv(snapkv)' 'adakv(h2o)+kivi:bits=4' 'knorm;layers=0-1:none' quest:budget=0.2 quest:budget=0.2+kivi:bits=4)
flags=()
for compressor in "${compressors[@]}"; do flags+=(--compressor "$compressor"); done
for horizon in 1 4 16 64; do flags+=(--horizon "$horizon"); done
for temperature in 0 0.7 1; do flags+=(--temperature "$temperature"); done
for context in 200 2000 8000; do flags+=(--context "$context"); done
for model in vericode-5m vericode-26m; do
  "$vericache" check --model "$models/$model" "${flags[@]}" --documents 2 --max-tokens 1024
done
