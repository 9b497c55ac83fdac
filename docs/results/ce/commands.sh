#!/bin/sh
set -e
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 1 --training.output_dir outputs/experiments/quickstart_ce/ce-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 2 --training.output_dir outputs/experiments/quickstart_ce/ce-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 3 --training.output_dir outputs/experiments/quickstart_ce/ce-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.001 --training.seed 1 --training.output_dir outputs/experiments/quickstart_ce/ce_fifth_rate-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.001 --training.seed 2 --training.output_dir outputs/experiments/quickstart_ce/ce_fifth_rate-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.001 --training.seed 3 --training.output_dir outputs/experiments/quickstart_ce/ce_fifth_rate-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.0025 --training.seed 1 --training.output_dir outputs/experiments/quickstart_ce/ce_half_rate-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.0025 --training.seed 2 --training.output_dir outputs/experiments/quickstart_ce/ce_half_rate-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.0025 --training.seed 3 --training.output_dir outputs/experiments/quickstart_ce/ce_half_rate-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.01 --training.seed 1 --training.output_dir outputs/experiments/quickstart_ce/ce_twice_rate-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.01 --training.seed 2 --training.output_dir outputs/experiments/quickstart_ce/ce_twice_rate-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.learning_rate 0.01 --training.seed 3 --training.output_dir outputs/experiments/quickstart_ce/ce_twice_rate-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 1 --training.output_dir outputs/experiments/quickstart_ce/two_routed-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 2 --training.output_dir outputs/experiments/quickstart_ce/two_routed-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 3 --training.output_dir outputs/experiments/quickstart_ce/two_routed-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.learning_rate 0.0025 --training.seed 1 --training.output_dir outputs/experiments/quickstart_ce/two_half_rate-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.learning_rate 0.0025 --training.seed 2 --training.output_dir outputs/experiments/quickstart_ce/two_half_rate-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.learning_rate 0.0025 --training.seed 3 --training.output_dir outputs/experiments/quickstart_ce/two_half_rate-3-again
