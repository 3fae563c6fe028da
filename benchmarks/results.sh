#!/bin/bash
# Reproduces docs/results.md: pretrains configs/tiny.py, its MLM baseline and tiny.py for twice the tokens, fine-tunes
# all three and random parameters.
#
#   benchmarks/results.sh 'text:corpus/*.txt.xz' TASKS OUT [SEEDS]
#
# TASKS holds CoLA, MRPC, STS-B, SST-2 and SQuAD; everything goes to OUT. Killed, it goes on where it was.
set -euo pipefail
[ $# -ge 3 ] || { sed -n '2,8s/^# \?//p' "$0"; exit 2; }
source=$1 tasks=$2 out=$3 seeds=${4:-3}

python -m electra_jax.train --config=configs/tiny.py --config.data.source="$source" \
    --config.data.path="$out/tokens" --workdir="$out/electra"
python -m electra_jax.train --config=configs/tiny.py:mlm --config.data.source="$source" \
    --config.data.path="$out/tokens" --workdir="$out/mlm"
python -m electra_jax.train --config=configs/tiny.py --config.data.source="$source" --config.optimizer.steps=16000 \
    --config.data.path="$out/tokens" --workdir="$out/twice"

tune() {    # NAME INIT_FROM [flags]: all tasks at both rates
    local name=$1 from=$2 rate
    shift 2
    for rate in 3e-4 1e-3; do
        local common=(--config.init_from="$from" --config.run.seeds="$seeds" --config.optimizer.learning_rate=$rate "$@")
        python -m electra_jax.finetune --config=configs/finetune/glue.py --config.task.data_dir="$tasks" \
            --config.run.tasks=cola,mrpc,stsb --workdir="$out/$name-$rate-glue" "${common[@]}"
        python -m electra_jax.finetune --config=configs/finetune/glue.py:sst2 --config.task.data_dir="$tasks" \
            --config.optimizer.epochs=1.0 --workdir="$out/$name-$rate-sst2" "${common[@]}"
        python -m electra_jax.finetune --config=configs/finetune/squad.py:v1.1 --config.task.data_dir="$tasks/SQuAD" \
            --config.data.seq_len=256 --workdir="$out/$name-$rate-squad" "${common[@]}"
    done
}
tune random "$out/electra" --config.init_random=True
tune mlm "$out/mlm"
tune electra "$out/electra"
tune twice "$out/twice"
tail -n +1 "$out"/*-{glue,sst2,squad}/results.md
