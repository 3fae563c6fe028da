#!/usr/bin/env bash
# Runs the benchmarks behind docs/performance.md and prints tables. Run it from the repository's root.
usage() {
  cat <<'END'
usage: [NAME=VALUE ...] benchmarks/run.sh cpu|gpu|paper [SECTION ...]

  cpu sections    step tiny quickstart data loader checkpoint startup sampler attention finetune
  gpu sections    attention small128 small512 base128 base512 large512 sampler     (none named: all)
  paper sections  v5e programs largest curves h100: compiled ahead of time or by formula, on no device, nothing timed;
                  curves excepted they want libtpu, h100 JAX's plugin for CUDA and cuDNN (docs/performance.md)

  RESULTS=results.jsonl  file that lines of JSON are appended to     TEXT='text:DIR/*.txt.xz'  a data.source
  WORK=bench-work        folder for token stores and workdirs        VOCAB=vocab.txt           WordPiece vocabulary
  PEER=FILE              hf_electra_step.py; empty: ours alone       TASKS=DIR                 folder with SST-2/
  PYTHON=python          for ours                                    PRETRAINED=DIR            workdir to fine-tune
  PEER_PYTHON=$PYTHON    for peers, with torch and transformers      ROUNDS=3                  turns with a peer
  STEPS=0                repetitions, 0: as usual                    EXTRA='--config.a.b=C'    overrides for all
  BATCHES='8 16 32'      instead of a gpu section's own              ATTENTION='flash cudnn'   with dropout, without
  SMALL, QUICKSTART, FINETUNE: configs in place of configs/small.py, configs/quickstart.py, configs/finetune/glue.py:sst2
END
}

set -uo pipefail
[[ "${1:-}" == cpu || "${1:-}" == gpu || "${1:-}" == paper ]] || { usage >&2; exit 2; }
device=$1; shift
RESULTS=${RESULTS:-results.jsonl} WORK=${WORK:-bench-work} PYTHON=${PYTHON:-python} ROUNDS=${ROUNDS:-3} STEPS=${STEPS:-0}
PEER_PYTHON=${PEER_PYTHON:-$PYTHON} PEER=${PEER:-} TEXT=${TEXT:-} VOCAB=${VOCAB:-} TASKS=${TASKS:-} EXTRA=${EXTRA:-}
PRETRAINED=${PRETRAINED:-} BATCHES=${BATCHES:-} SMALL=${SMALL:-configs/small.py}
QUICKSTART=${QUICKSTART:-configs/quickstart.py} FINETUNE=${FINETUNE:-configs/finetune/glue.py:sst2}
here=$(dirname "$0") failed=0
mkdir -p "$WORK"

# need NAME...: whether these variables are set; else says so, and the section counts as failed.
need() {
  local name
  for name; do
    [[ -n "${!name}" ]] || { echo "$section: skipped, $name is not set" >&2; failed=1; return 1; }
  done
}

# bench ARGUMENTS: one call of the tool under the section's label.
bench() {
  echo "$label: bench $*" >&2
  # shellcheck disable=SC2086  # EXTRA holds several words
  ${PREFIX:-} "$PYTHON" -m electra_jax.tools.bench --label="$label" --steps="$STEPS" --rounds="$ROUNDS" "$@" $EXTRA |
    tee -a "$RESULTS" || { echo "$label: failed" >&2; failed=1; }
}

# scaling ARGUMENTS: one call of the tool that compiles ahead of time, under the section's label.
scaling() {
  echo "$label: scaling $*" >&2
  # shellcheck disable=SC2086
  "$PYTHON" -m electra_jax.tools.scaling --label="$label" "$@" $EXTRA |
    tee -a "$RESULTS" || { echo "$label: failed" >&2; failed=1; }
}

# peers ARGUMENTS: sets `against` to the flags that run the peer with these, eager and compiled.
peers() {
  against=()
  [[ -z "$PEER" ]] || against=(--against="$PEER_PYTHON $PEER $*" --against="$PEER_PYTHON $PEER $* --compile")
}

store() {   # the token store of the loader's section
  [[ -e "$WORK/tokens/manifest.json" ]] ||
    "$PYTHON" -m electra_jax.data.prepare --config="$SMALL" --config.data.source="$TEXT" \
      --config.data.tokenizer="$VOCAB" --config.data.path="$WORK/tokens" >&2
}

cpu_step() {
  peers --size small --batch 16 --seq 128
  bench --config="$SMALL" --config.data.batch_size=16 ${against[@]+"${against[@]}"}
}

cpu_tiny() {   # the peer's smallest size at quickstart's batch, and ours of the same sizes; it draws ids from 1,000 on
  peers --size tiny --batch 32 --seq 64 --vocab 2048 --dropout 0
  bench --config="$QUICKSTART" --config.model.vocab_size=2048 --config.model.embedding_size=64 \
    --config.model.num_layers=4 --config.model.num_heads=2 --config.model.generator_size=0.5 \
    --config.model.generator_layers=1.0 --config.model.positions=absolute --config.model.norm=post \
    --config.data.batch_size=32 --config.data.seq_len=64 ${against[@]+"${against[@]}"}
}

cpu_quickstart() {   # its own step, then the whole run with nothing cached
  bench --config="$QUICKSTART" --config.model.vocab_size=512
  rm -rf "$WORK/quickstart"
  local start; start=$(date +%s.%N)
  # shellcheck disable=SC2086
  "$PYTHON" -m electra_jax.train --config="$QUICKSTART" --workdir="$WORK/quickstart" \
    --config.run.compilation_cache="$WORK/quickstart/cache" $EXTRA >&2 || { failed=1; return; }
  "$PYTHON" "$here/tables.py" --run "$WORK/quickstart" --label "$label" \
    --seconds "$(echo "$(date +%s.%N) $start" | awk '{print $1 - $2}')" | tee -a "$RESULTS"
}

cpu_data() {
  need TEXT VOCAB || return
  label="$section wordpiece" bench --what=prepare --config="$SMALL" --config.data.source="$TEXT" \
    --config.data.tokenizer="$VOCAB"
  label="$section sentencepiece" bench --what=prepare --config="$SMALL" --config.data.source="$TEXT" \
    --config.data.tokenizer=train --config.data.vocab_size="${PIECES:-32000}"
}

cpu_loader() {
  need TEXT VOCAB && store || return
  local length prefix=""
  command -v taskset >/dev/null && prefix="taskset -c 0"
  for length in 128 512; do
    PREFIX=$prefix bench --what=loader --config="$SMALL" --config.data.path="$WORK/tokens" --warmup=3000 \
      --config.data.seq_len="$length"
  done
}

cpu_checkpoint() { bench --what=checkpoint --config="$SMALL" --workdir="$WORK"; }
cpu_startup() { bench --what=startup --config="$QUICKSTART" --workdir="$WORK/startup"; }
cpu_sampler() { bench --what=sampler --config="$SMALL" --config.data.batch_size=16; }
cpu_attention() { bench --what=attention --config="$SMALL" --config.data.batch_size=16; }

cpu_finetune() {
  need TASKS VOCAB PRETRAINED || return
  local sampling; against=()
  for sampling in group_by_length random; do
    against+=(--against="$PEER_PYTHON $here/hf_trainer.py --data_dir=$TASKS --vocab=$VOCAB --sampling=$sampling")
  done
  [[ -n "$PEER" ]] || against=()
  bench --what=finetune --config="$FINETUNE" --config.init_from="$PRETRAINED" --config.task.data_dir="$TASKS" \
    ${against[@]+"${against[@]}"}
}

# gpu_row SIZE LENGTH BATCHES: with dropout as published and without, each program at its best batch.
gpu_row() {
  local size=$1 length=$2 dropout attention batches=${BATCHES:-$3}
  for dropout in 0.1 0; do
    attention=${ATTENTION:-flash cudnn}
    [[ $dropout != 0 ]] && attention=${attention% *} || attention=${attention#* }
    peers --size "$size" --seq "$length" --device cuda --bf16 --dropout "$dropout" --batch "{batch}"
    label="$section dropout $dropout" bench --config="${CONFIG:-configs/$size.py}" --batches="${batches// /,}" \
      --config.data.seq_len="$length" --config.model.dtype=bfloat16 --config.model.attention="$attention" \
      --config.model.hidden_dropout="$dropout" --config.model.attention_dropout="$dropout" \
      --config.model.scan_layers=True --config.model.scan_unroll=24 \
      ${against[@]+"${against[@]}"}
  done
}

gpu_small128() { gpu_row small 128 "128 256 512 1024 2048"; }
gpu_small512() { gpu_row small 512 "32 64 128 256 512"; }
gpu_base128() { gpu_row base 128 "64 128 256 512 1024"; }
gpu_base512() { gpu_row base 512 "16 32 64 128 256"; }
gpu_large512() { gpu_row large 512 "8 16 32 64 128"; }

gpu_sampler() {
  bench --what=sampler --config="$SMALL" --config.data.batch_size=512
  bench --what=sampler --config="${CONFIG:-configs/base.py}" --config.data.batch_size=64
}

gpu_attention() {
  local dropout
  for dropout in 0.1 0; do
    label="$section dropout $dropout" bench --what=attention --config="${CONFIG:-configs/base.py}" \
      --config.data.batch_size="${BATCH:-64}" --config.model.attention_dropout="$dropout"
  done
}

# on_v5e CONFIG ARGUMENTS: configs/CONFIG.py with a loop over its layers, at 16 rows a chip if nothing else is said.
on_v5e() {
  scaling --config="configs/$1.py" --rows-per-chip=16 --config.model.dtype=bfloat16 --config.model.scan_layers=True \
    "${@:2}"
}

paper_v5e() { on_v5e base --topology=v5e:1x1,v5e:2x2,v5e:4x4,v5e:8x8,v5e:16x16; }

paper_programs() {   # on 16 chips, to be read beside v5e's program for as many
  local chips=--topology=v5e:4x4
  on_v5e base $chips --config.mesh.fsdp=16
  on_v5e base $chips --config.model.attention=splash --config.model.attention_dropout=0
  on_v5e base $chips --config.mesh.tensor=4
  on_v5e base $chips --rows-per-chip=64 --config.optimizer.accumulation_steps=4
  on_v5e small $chips --rows-per-chip=128
  on_v5e large $chips
  on_v5e base --topology=v5p:2x2x4 --rows-per-chip=64
}

# sized LAYERS WIDTH REMAT MICROBATCHES FSDP ARGUMENTS: a model of ELECTRA's proportions, 1,024 rows a step.
sized() {
  on_v5e base --rows-per-chip=0 --config.data.batch_size=1024 --config.model.num_layers="$1" \
    --config.model.hidden_size="$2" --config.model.embedding_size="$2" --config.model.intermediate_size=$((4 * $2)) \
    --config.model.num_heads=$(($2 / 64)) --config.model.generator_size=0.25 --config.model.remat="$3" \
    --config.optimizer.accumulation_steps="$4" --config.mesh.fsdp="$5" "${@:6}"
}

paper_largest() {   # by formula; then what it found for 1 and 16 chips, and the next larger, compiled
  scaling --what=largest --config=configs/base.py --config.data.batch_size=1024 \
    --topology=v5e:1x1,v5e:2x2,v5e:4x4,v5e:16x16,h100:8
  sized 24 1024 dots 64 1 --topology=v5e:1x1
  sized 24 1536 full 1024 1 --topology=v5e:1x1
  sized 36 3072 full 4 16 --topology=v5e:4x4
  sized 48 4096 full 8 16 --topology=v5e:4x4
}

paper_curves() { scaling --what=curves --config=configs/base.py --topology=v5e,h100; }

# on_h100 SIZE ROWS LENGTH ARGUMENTS: one program for one GPU, its layers unrolled if nothing else is said.
on_h100() {
  scaling --config="configs/$1.py" --topology=h100:1 --rows-per-chip="$2" --config.data.seq_len="$3" \
    --config.model.dtype=bfloat16 --config.model.scan_layers=False --config.model.remat=none "${@:4}"
}

paper_h100() {
  # Without the plugin the tool gives the formula's figures: not what this section is for.
  "$PYTHON" -c "import sys; from electra_jax.tools import targets; sys.exit(not targets.has_cuda())" ||
    { echo "$section: skipped, JAX's plugin for CUDA is not installed" >&2; failed=1; return; }
  local fused=(--config.model.attention=cudnn --config.model.attention_dropout=0 --config.model.hidden_dropout=0)
  local stacked=(--config.model.scan_layers=True --config.model.scan_unroll=12) size
  for size in "small 128 128" "small 32 512" "base 128 128" "base 32 512" "large 16 512"; do
    # shellcheck disable=SC2086  # three words
    for attention in "" "--config.model.attention=flash" "${fused[*]}"; do on_h100 $size $attention; done
  done
  for size in "small 128 128" "base 32 512"; do
    # shellcheck disable=SC2086
    on_h100 $size --config.model.attention=flash "${stacked[@]}"
  done
  on_h100 base 32 512 --config.model.attention=flash --config.model.scan_layers=True
}

all_cpu="step tiny quickstart data loader checkpoint startup sampler attention finetune"
all_gpu="attention small128 small512 base128 base512 large512 sampler"
all_paper="v5e programs largest curves h100"
all=all_$device
sections=${*:-${!all}}
for section in $sections; do
  declare -F "${device}_$section" >/dev/null || { echo "no section $section for $device" >&2; usage >&2; exit 2; }
done
for section in $sections; do
  label="$device $section"
  section=$label
  "${device}_${label#* }"
done
"$PYTHON" "$here/tables.py" "$RESULTS"
exit $failed
