#!/bin/sh
set -e
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 1 --training.output_dir outputs/experiments/quickstart_settings/relation-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 2 --training.output_dir outputs/experiments/quickstart_settings/relation-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 3 --training.output_dir outputs/experiments/quickstart_settings/relation-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.weight 1.0 --training.seed 1 --training.output_dir outputs/experiments/quickstart_settings/weight_1-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.weight 1.0 --training.seed 2 --training.output_dir outputs/experiments/quickstart_settings/weight_1-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.weight 1.0 --training.seed 3 --training.output_dir outputs/experiments/quickstart_settings/weight_1-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.weight 10.0 --training.seed 1 --training.output_dir outputs/experiments/quickstart_settings/weight_10-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.weight 10.0 --training.seed 2 --training.output_dir outputs/experiments/quickstart_settings/weight_10-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.weight 10.0 --training.seed 3 --training.output_dir outputs/experiments/quickstart_settings/weight_10-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.samples 4 --training.seed 1 --training.output_dir outputs/experiments/quickstart_settings/samples_4-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.samples 4 --training.seed 2 --training.output_dir outputs/experiments/quickstart_settings/samples_4-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation.samples 4 --training.seed 3 --training.output_dir outputs/experiments/quickstart_settings/samples_4-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation null --losses.kv.weight 3.0 --training.seed 1 --training.output_dir outputs/experiments/quickstart_settings/kv-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation null --losses.kv.weight 3.0 --training.seed 2 --training.output_dir outputs/experiments/quickstart_settings/kv-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation null --losses.kv.weight 3.0 --training.seed 3 --training.output_dir outputs/experiments/quickstart_settings/kv-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation null --losses.kv.weight 3.0 --projector.learning_rate 0.01 --training.seed 1 --training.output_dir outputs/experiments/quickstart_settings/kv_rate_high-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation null --losses.kv.weight 3.0 --projector.learning_rate 0.01 --training.seed 2 --training.output_dir outputs/experiments/quickstart_settings/kv_rate_high-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --losses.kv_relation null --losses.kv.weight 3.0 --projector.learning_rate 0.01 --training.seed 3 --training.output_dir outputs/experiments/quickstart_settings/kv_rate_high-3-again
