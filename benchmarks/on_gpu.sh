#!/bin/sh
# Every measurement that wants a GPU, in one call of about ten minutes: sh benchmarks/on_gpu.sh [FOLDER]
#
# From the repository's root, with the package or its dependencies installed. PEAK: the device's dense bfloat16 peak in
# TFLOP/s (989 of an H100 or H200). Writes one JSON a benchmark into FOLDER, default outputs/gpu. A part that fails is
# told, and the others go on.
set -u
FOLDER=${1:-outputs/gpu}
PEAK=${PEAK:-989}
mkdir -p "$FOLDER"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
failed=""
part() {
    name=$1
    shift
    echo "== $name"
    python "$@" > "$FOLDER/$name.log" 2>&1 || failed="$failed $name"
    tail -n 6 "$FOLDER/$name.log"
}
part floor benchmarks/floor.py --device cuda --size 0.5B --length 1024 --batch 4 --peak "$PEAK" --json "$FOLDER/floor.json"
part stored benchmarks/stored.py --device cuda --size 0.5B --length 1024 --batch 4 --json "$FOLDER/stored.json"
part memory benchmarks/memory.py --device cuda --json "$FOLDER/memory.json"
part attention benchmarks/attention_weighting.py --device cuda --json "$FOLDER/attention.json"
part growth benchmarks/growth.py --device cuda --json "$FOLDER/growth.json"
part train -m kv_trainer train recipes/quickstart/two_teachers.yaml --profile --training.max_steps 300 \
    --training.output_dir "$FOLDER/quickstart"
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }
