#!/usr/bin/env bash
# The first ten minutes on several GPUs of one machine: five parts, from the built-in model to 7B.
#
#     bash tools/first_run.sh                four GPUs; GPUS=8 for eight
#     PARTS="1 2" bash tools/first_run.sh    only these; what they print is in runs/first
#
# It stops at the first thing that is wrong, and says what. All of it also runs on a CPU, with four processes (part 5
# with another SMALL, whose attention heads are an even number):
#
#     SMALL=builtin LARGE=builtin DATA=chain LARGE_DATA=chain LEAST=0 EVAL="--benchmarks chain" \
#         MORE="--max-prompt-tokens 64 --max-response-tokens 64" bash tools/first_run.sh
set -uo pipefail
cd "$(dirname "$0")/.."
GPUS=${GPUS:-4} PARTS=${PARTS:-1 2 3 4 5} OUT=${OUT:-runs/first} MORE=${MORE:-}
SMALL=${SMALL:-deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B} LARGE=${LARGE:-deepseek-ai/DeepSeek-R1-Distill-Qwen-7B}
DATA=${DATA:-openai/gsm8k/main} LARGE_DATA=${LARGE_DATA:-BytedTsinghua-SIA/DAPO-Math-17k}
EVAL=${EVAL:---benchmarks aime24 --max-response-tokens 1024}
LEAST=${LEAST:-0.002}  # the least gap that bfloat16 leaves between engine and trainer
BIN=.venv/bin
[ -x $BIN/python ] || BIN=$(dirname "$(command -v python)")

wrong() { echo "WRONG: $*"; exit 1; }

end_of() { grep -m 1 "^error:" "$1" || grep -v "^ *$" "$1" | tail -3; }  # what a run says of why it ended

watch() {  # prints the most MiB used of each GPU and of the host while process $1 runs, and processes on each GPU
    local most=0
    while kill -0 "$1" 2>/dev/null; do
        now=$(free -m | awk '/^Mem/ {print $3}')
        [ "$now" -gt "$most" ] && most=$now && echo "host $most" > "$OUT/host"
        if command -v nvidia-smi > /dev/null; then
            nvidia-smi --query-gpu=index,memory.used --format=csv,noheader,nounits >> "$OUT/memory"
            nvidia-smi --query-compute-apps=gpu_uuid,pid --format=csv,noheader >> "$OUT/processes"
        fi
        sleep 1
    done
}

train() {  # NAME RANKS OPTIONS...: trains to the end, with all of its output in $OUT/NAME.txt
    local name=$1 ranks=$2; shift 2
    rm -rf "${OUT:?}/$name" "$OUT/memory" "$OUT/processes"
    echo "  $name: sppo.py $* $MORE"
    $BIN/torchrun --standalone --nproc-per-node "$ranks" sppo.py --output "$OUT/$name" "$@" $MORE \
        > "$OUT/$name.txt" 2>&1 &
    local pid=$!
    watch $pid
    wait $pid || wrong "$name ended with exit code $?; $OUT/$name.txt has: $(end_of "$OUT/$name.txt")"
}

check() {  # NAME CONDITION MESSAGE: `s` are the training steps' metrics, `gaps` the rollout gaps
    $BIN/python - "$OUT/$1/metrics.jsonl" "$2" <<'PYTHON' || wrong "$1: $3"
import json, sys
lines = [json.loads(line) for line in open(sys.argv[1])]
s = [line for line in lines if line["step"]]
gaps = [line["policy/rollout_gap"] for line in s]
print("    gap", " ".join(f"{gap:.1e}" for gap in gaps), "  seconds",
      {name[5:]: round(s[-1][name], 1) for name in s[-1] if name.startswith("time/")})
sys.exit(not eval(sys.argv[2]))
PYTHON
}

one() {
    train builtin "$GPUS" --steps 2 --save-every 0
    check builtin "len(s) == 2 and max(gaps) < 1e-4" \
        "engine and trainer disagree in float32: the weights do not arrive, or are read differently"
    if [ -s "$OUT/processes" ]; then
        most=$(sort -u "$OUT/processes" | cut -d, -f1 | sort | uniq -c | awk '{print $1}' | sort -n | tail -1)
        [ "$most" = 1 ] || wrong "$most processes on one GPU: each rank must have a GPU of its own (CUDA_VISIBLE_DEVICES)"
    fi
}

two() {
    common="--model $SMALL --dataset $DATA --lr 1e-5 --eval-every 0 --save-every 0"
    train small "$GPUS" $common --max-response-tokens 1024 --prompts-per-step 32 --minibatch 16 --steps 3
    check small "$LEAST <= gaps[0] < 0.05 and gaps[-1] < 1.5 * gaps[0] + 0.005" \
        "the gap between engine and trainer should be 0.01 to 0.02 in bfloat16, and not grow"
    train few "$GPUS" $common --max-response-tokens 1024 --prompts-per-step 6 --minibatch 3 --steps 1
    check few "len(s) == 1" "six prompts leave ranks without work, and these must not be waited for"
}

three() {
    common="--model $SMALL --dataset $DATA --max-response-tokens 256 --prompts-per-step 8 --minibatch 8 --steps 6
            --save-every 1 --eval-every 0 --resume"
    rm -rf "${OUT:?}/resumed"
    echo "  resumed: killed with kill -9 after two steps, then continued by half of the ranks"
    $BIN/torchrun --standalone --nproc-per-node "$GPUS" sppo.py --output "$OUT/resumed" $common $MORE \
        > "$OUT/killed.txt" 2>&1 &
    local pid=$!
    until compgen -G "$OUT/resumed/checkpoints/step-0000000[2-9]" > /dev/null; do
        kill -0 $pid 2>/dev/null || wrong "it ended before two steps: $(end_of "$OUT/killed.txt")"
        sleep 1
    done
    kill -9 $(pgrep -P $pid) $pid  # torchrun's ranks too, which would go on without it
    wait $pid 2> /dev/null
    ! grep -q "^Trained" "$OUT/killed.txt" || wrong "it had ended before it was killed: $OUT/killed.txt"
    $BIN/torchrun --standalone --nproc-per-node $((GPUS / 2)) sppo.py --output "$OUT/resumed" $common $MORE \
        > "$OUT/resumed.txt" 2>&1 || wrong "it does not resume: $(end_of "$OUT/resumed.txt")"
    grep -q "Resuming after step" "$OUT/resumed.txt" || wrong "it started at the beginning: $OUT/resumed.txt"
    check resumed "[line['step'] for line in s] == [1, 2, 3, 4, 5, 6]" "steps are missing or written twice"
}

four() {
    train large "$GPUS" --model "$LARGE" --dataset "$LARGE_DATA" --steps 1 --prompts-per-step 32 \
        --minibatch 32 --critic-lr 1e-5 --weight-decay 0.1 --loss-mean sequence --max-prompt-tokens 2048 \
        --micro-batch-tokens 32768 --offload between --eval-every 0 --save-every 0
    check large "$LEAST <= gaps[0] < 0.05" "the gap between engine and trainer should be 0.01 to 0.02"
    grep -h "vLLM takes" "$OUT/large.txt"
    [ -s "$OUT/memory" ] && echo "    at most, MiB: $(sort "$OUT/memory" | awk -F, '$2 > m[$1] {m[$1] = $2} END {for (i in m) printf "GPU %s%s  ", i, m[i]}')"
    echo "    the same of the $(cat "$OUT/host")"
}

five() {
    common="--model $SMALL --dataset $DATA --max-response-tokens 1024 --prompts-per-step 32 --minibatch 16 --steps 3
            --eval-every 0 --save-every 0"
    train tensor_parallel "$GPUS" $common --tensor-parallel 2
    check tensor_parallel "$LEAST <= gaps[0] < 0.05" "two ranks that share an engine should have the same gap"
    train oversample "$GPUS" $common --oversample 1 --old-logprobs rollout --offload between
    check oversample "len(s) == 3 and all('rollout/age' in line for line in s)" "nothing was continued"
    echo "  eval: eval.py $EVAL"
    $BIN/torchrun --standalone --nproc-per-node "$GPUS" eval.py --model "$SMALL" --samples 2 $EVAL --output "$OUT/eval.jsonl" > "$OUT/eval.txt" 2>&1 ||
        wrong "eval.py ended with exit code $?: $(end_of "$OUT/eval.txt")"
}

mkdir -p "$OUT"
names=(zero one two three four five)
for part in $PARTS; do
    begun=$SECONDS
    echo "Part $part"
    ${names[$part]}
    echo "  right, after $((SECONDS - begun)) s"
done
echo "All of it is right."
