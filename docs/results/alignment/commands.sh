#!/bin/sh
set -e
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 1 --training.output_dir outputs/experiments/quickstart_alignment/spans-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 2 --training.output_dir outputs/experiments/quickstart_alignment/spans-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 3 --training.output_dir outputs/experiments/quickstart_alignment/spans-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.time.method linear --training.seed 1 --training.output_dir outputs/experiments/quickstart_alignment/linear-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.time.method linear --training.seed 2 --training.output_dir outputs/experiments/quickstart_alignment/linear-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.time.method linear --training.seed 3 --training.output_dir outputs/experiments/quickstart_alignment/linear-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.time.method truncate --training.seed 1 --training.output_dir outputs/experiments/quickstart_alignment/truncate-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.time.method truncate --training.seed 2 --training.output_dir outputs/experiments/quickstart_alignment/truncate-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.time.method truncate --training.seed 3 --training.output_dir outputs/experiments/quickstart_alignment/truncate-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.layers.method nearest --training.seed 1 --training.output_dir outputs/experiments/quickstart_alignment/layers_nearest-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.layers.method nearest --training.seed 2 --training.output_dir outputs/experiments/quickstart_alignment/layers_nearest-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.layers.method nearest --training.seed 3 --training.output_dir outputs/experiments/quickstart_alignment/layers_nearest-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.layers.method cka --training.seed 1 --training.output_dir outputs/experiments/quickstart_alignment/layers_cka-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.layers.method cka --training.seed 2 --training.output_dir outputs/experiments/quickstart_alignment/layers_cka-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.layers.method cka --training.seed 3 --training.output_dir outputs/experiments/quickstart_alignment/layers_cka-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.rope.keys after --training.seed 1 --training.output_dir outputs/experiments/quickstart_alignment/keys_after_rope-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.rope.keys after --training.seed 2 --training.output_dir outputs/experiments/quickstart_alignment/keys_after_rope-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --alignment.rope.keys after --training.seed 3 --training.output_dir outputs/experiments/quickstart_alignment/keys_after_rope-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 1 --training.output_dir outputs/experiments/quickstart_alignment/ce-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 2 --training.output_dir outputs/experiments/quickstart_alignment/ce-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 3 --training.output_dir outputs/experiments/quickstart_alignment/ce-3-again
