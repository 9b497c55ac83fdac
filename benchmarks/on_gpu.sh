#!/bin/sh
# Everything that wants a GPU, in one call: sh benchmarks/on_gpu.sh [FOLDER]. Prints as it goes; files land in FOLDER.
# The tests run on the CPU by design; here the same parts run where torch finds a GPU.
set -eu
out=${1:-outputs/gpu}
mkdir -p "$out"
python -c "import torch; assert torch.cuda.is_available(), 'no GPU'; print(torch.cuda.get_device_name(), torch.__version__)"
train() { python -m kv_trainer train recipes/quickstart/two_teachers.yaml --training.disable_tqdm true "$@"; }
# Each loss and fusion for a few steps, in bfloat16 too: what breaks on a GPU breaks here.
for setting in losses.kv.weight losses.cka.weight losses.codi.weight losses.attention_kl.weight; do
  train --quick "--$setting" 0.1 --training.bf16 true --training.output_dir "$out/$setting"
done
for fusion in uniform entropy task_wise similarity router govern min_norm; do
  train --quick --fusion.method $fusion --training.output_dir "$out/$fusion"
done
train --quick --alignment.layers.method cka --training.output_dir "$out/cka"
train --quick --teachers.chain.placement offloaded --training.output_dir "$out/offloaded"
python -m kv_trainer precompute recipes/quickstart/two_teachers.yaml --store.path "$out/store"
train --store.path "$out/store" --teachers.chain.source store --teachers.letters.source store --training.output_dir "$out/stored"
train --training.output_dir "$out/two_teachers"
mkdir -p "$out/benchmarks"
python -c 'import trl' 2>/dev/null || pip install --quiet --no-index --find-links wheels trl
python benchmarks/all.py --device cuda --output "$out/benchmarks"
# PEAK: the device's dense bfloat16 peak in TFLOP/s, that of an H100 or H200 by default.
python benchmarks/floor.py --device cuda --size 0.5B --length 1024 --peak "${PEAK:-989}" --json "$out/benchmarks/floor_0.5B.json"
# DeepSpeed: installed, or from ./wheels (pip wheel --wheel-dir wheels deepspeed==0.19.8, where there is a network).
python -c 'import deepspeed' 2>/dev/null || pip install --quiet --no-index --find-links wheels deepspeed
for stage in zero2 zero3; do
  engine="accelerate launch --num_processes 1 --use_deepspeed --deepspeed_config_file deepspeed_configs/$stage.json"
  $engine -m kv_trainer train recipes/quickstart/two_teachers.yaml --training.disable_tqdm true \
    --training.output_dir "$out/quickstart_$stage"
  PYTHONPATH=. $engine benchmarks/scale.py
done
PYTHONPATH=. python benchmarks/scale.py
PYTHONPATH=. python benchmarks/scale.py --placement offloaded
