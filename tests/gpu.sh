#!/usr/bin/env bash
# What this code does on a GPU, within 15 minutes: tests/gpu.sh [FOLDER] writes FOLDER/gpu.md (runs/gpu),
# a Markdown table.
# FLAGS="--max-steps 8 --data DIR" adds flags to the runs; PYTHON names another interpreter.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:-runs/gpu}
python=${PYTHON:-python}
flags=${FLAGS:-}
mkdir -p "$out"

row() { sed "s/|/,/g; s/^ */| $1 | /; s/\$/ |/" >> "$out/gpu.md"; }

part() {        # NAME PATTERN COMMAND...: a row for its time and one for each line of its output that matches
    local name=$1 pattern=$2 began=$SECONDS
    shift 2
    echo "$name: $*"
    "$@" > "$out/$name.log" 2>&1
    echo "$((SECONDS - began)) s, exit status $?" | row "$name"
    tr '\r' '\n' < "$out/$name.log" | grep -aE "$pattern" | row "$name"
}

gpus=$($python -c 'import torch; print(torch.cuda.device_count())')
[ "${gpus:-0}" -gt 0 ] || { echo "error: PyTorch finds no CUDA device here" >&2; exit 2; }
name=$($python -c 'import torch; print(torch.cuda.get_device_name())')
printf '| part | %s |\n|---|---|\n' "$name" > "$out/gpu.md"

part tests '^([0-9]+ (passed|failed)|FAILED|ERROR)' $python -m pytest -m cuda
part pretrain '(clips/s overall|VTM|MLM|MVM|choice|joint|^error)' \
    $python pretrain.py --device cuda --tokenizer "$out/tokenizer" --out "$out/pretrain" $flags
for task in qa "retrieval --scoring fast"; do
    part "${task%% *}" '(clips/s overall|^  |^error)' \
        $python finetune.py $task --device cuda --init "$out/pretrain" --out "$out/${task%% *}" $flags
done
part benchmark '^ |GB|GiB|MiB|lines|times' $python tests/benchmark.py --device cuda
if [ "$gpus" -gt 1 ]; then
    part two-processes '(clips/s overall|^error)' $python -m torch.distributed.run --nproc-per-node=2 \
        pretrain.py --device cuda --max-steps 200 --tokenizer "$out/tokenizer" --out "$out/two" $flags
fi
cat "$out/gpu.md"
