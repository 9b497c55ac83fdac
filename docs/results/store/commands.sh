#!/bin/sh
set -e
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 1 --training.output_dir outputs/experiments/quickstart_store/ce-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 2 --training.output_dir outputs/experiments/quickstart_store/ce-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers null --losses.kv_relation null --training.seed 3 --training.output_dir outputs/experiments/quickstart_store/ce-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 1 --training.output_dir outputs/experiments/quickstart_store/live-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 2 --training.output_dir outputs/experiments/quickstart_store/live-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --training.seed 3 --training.output_dir outputs/experiments/quickstart_store/live-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --store.path outputs/store --teachers.chain.source store --teachers.letters.source store --training.seed 1 --training.output_dir outputs/experiments/quickstart_store/stored_8_bits-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --store.path outputs/store --teachers.chain.source store --teachers.letters.source store --training.seed 2 --training.output_dir outputs/experiments/quickstart_store/stored_8_bits-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --store.path outputs/store --teachers.chain.source store --teachers.letters.source store --training.seed 3 --training.output_dir outputs/experiments/quickstart_store/stored_8_bits-3-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers.chain.source store --teachers.letters.source store --store.path outputs/store4 --store.bits 4 --training.seed 1 --training.output_dir outputs/experiments/quickstart_store/stored_4_bits-1-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers.chain.source store --teachers.letters.source store --store.path outputs/store4 --store.bits 4 --training.seed 2 --training.output_dir outputs/experiments/quickstart_store/stored_4_bits-2-again
OMP_NUM_THREADS=1 kv-trainer train recipes/quickstart/two_teachers.yaml --teachers.chain.source store --teachers.letters.source store --store.path outputs/store4 --store.bits 4 --training.seed 3 --training.output_dir outputs/experiments/quickstart_store/stored_4_bits-3-again
