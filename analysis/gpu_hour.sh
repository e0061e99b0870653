#!/usr/bin/env bash
# What is worth measuring when a GPU is at hand for an hour or less, step by step:
#
#     OUT=runs/gpu bash analysis/gpu_hour.sh tests fixed toy kill model speed offload micro evidence
#
#   tests     the test suite, on the CPU, in the background: it ends beside the other steps
#   fixed     loss and log-probs of the same rollouts on the CPU, on CUDA in float32 and in bfloat16
#   toy       the toy's demo on the CPU, on CUDA in float32 and in bfloat16: compare the curves
#   kill      kill -9 in the middle of a run on CUDA, --resume, and the run that nobody killed
#   model     a randomly initialised Qwen3-4B with the toy's tokenizer: 8 GB, trained in about 80
#   speed     AntiSD and GRPO on it: seconds by phase, tokens/s, memory, and the share of the card's
#             bf16 peak that training reaches
#   offload   the README's run for one card of 24 GB on it: --offload, 4,096 tokens, 8 rows at once.
#             The process may allocate no more than $CAP GiB, and the run is cut to one problem
#   micro     three values of --micro_tokens on it
#   evidence  GRPO, SD and AntiSD side by side on sums that a small language model ($LM) gets wrong
#             more often than right
#   table     what all runs so far have measured, and the peak that analysis/memory.py predicts
#
# A step leaves $OUT/STEP.done and is skipped from then on; a run that was cut off goes on with
# --resume. DRY=1 does everything with tiny shapes on whatever is there, in minutes. Settings:
set -euo pipefail
cd "$(dirname "$0")/.."
DRY=${DRY:-}                            # 1: tiny
OUT=${OUT:-runs/gpu}                    # results
LM=${LM:-}                              # folder of a small chat model, for `evidence`
ANTISD=${ANTISD:-antisd.py}             # another version of the trainer, to compare
WHEELS=${WHEELS:-}                      # folder of wheels to install first, without a network
BIG=${BIG:-$OUT/qwen3-4b}               # where `model` writes
PEAK=${PEAK:-790}                       # TFLOP/s of the card in bf16, as measured with a matmul
TOKENS=${TOKENS:-2048}                  # response length of `speed` and `micro`
SMALL_TOKENS=${SMALL_TOKENS:-4096}      # of `offload`
CAP=${CAP:-22.5}                        # GiB of `offload`: what a card of 24 GB leaves
PROBLEMS=${PROBLEMS:-8} GROUP=${GROUP:-8}
ARMS=${ARMS:-antisd grpo sd} SEEDS=${SEEDS:-0} STEPS=${STEPS:-100}       # of `evidence`
LM_PROBLEMS=16 LM_TOKENS=160 TOY_STEPS=30
if [ "$DRY" ]; then
    TOKENS=16 SMALL_TOKENS=16 PROBLEMS=1 GROUP=2 STEPS=2 LM_PROBLEMS=1 LM_TOKENS=16 TOY_STEPS=2
fi
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
mkdir -p "$OUT"
if [ "$WHEELS" ]; then
    [ -d "$OUT/site" ] || python3 -m pip install -q --no-index --no-deps --no-compile --target \
        "$OUT/site" "$WHEELS"/*.whl
    export PYTHONPATH=$PWD/$OUT/site
fi

train() {    # NAME FLAGS...: a run in $OUT/NAME, skipped where it is whole, resumed where it is not
    local run=$OUT/$1; shift
    [ -d "$run/model" ] || "${PYTHON[@]}" "$ANTISD" --output "$run" --resume "$@" \
        > "$run.log" 2>&1 || { touch "$OUT/failed"; echo "$run:"; tail -n 5 "$run.log"; }
}
PYTHON=(python3)                        # what runs the trainer
CAPPED='import os, runpy, sys, torch    # the same, with no more than CAP GiB of the card
if torch.cuda.is_available():
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(float(os.environ["CAP"]) * 2**30 / total)
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")'

step_tests() {
    CUDA_VISIBLE_DEVICES="" python3 -m pytest -q test_antisd.py ${DRY:+-k phi} \
        > "$OUT/tests.log" 2>&1 &
}

step_fixed() {
    python3 - <<'PY' | tee "$OUT/fixed.txt"
import random
import torch
import antisd
antisd.setup()
tokenizer, *_ = antisd.load_tokenizer("toy/model", {})
problems = antisd.load_problems("toy/train.jsonl", limit=8)
for p in problems:
    p["prompt"] = antisd.render(tokenizer, antisd.student_messages(p["problem"]), {})
torch.manual_seed(0)
policy = antisd.load_policy("toy/model", torch.float32, tokenizer)
rollouts = antisd.roll_out(policy, tokenizer, problems, 8, max_tokens=64)
prompts, ids = [r.problem["prompt"] for r in rollouts], [r.ids for r in rollouts]
random.seed(0)
advantages = torch.tensor([random.choice([-1.0, 1.0]) for _ in rollouts])
reference = None
for device in ["cpu"] + ["cuda"] * torch.cuda.is_available():
    for dtype in (torch.float32, torch.bfloat16):
        policy = antisd.load_policy("toy/model", dtype, tokenizer).to(device)
        logp, entropy = policy(*antisd.pack(prompts, ids, device))
        mask = torch.arange(logp.shape[1]) < torch.tensor([len(y) for y in ids])[:, None]
        loss = antisd.policy_loss(logp, logp, advantages[:, None].to(device) - logp.detach(),
                                  mask.float().to(device), int(mask.sum()))
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1e9)
        reference = logp.detach().cpu().float() if reference is None else reference
        error = (logp.detach().cpu().float() - reference).abs()[mask]
        print(f"{device} {dtype}: loss {loss.item():.6f}, gradient {norm.item():.6f}, log-probs "
              f"off by {error.mean():.1e} on average and {error.max():.1e} at most")
PY
}

step_toy() {
    local runs=()
    for kind in cuda-float32 cuda-bfloat16; do
        train "toy-$kind" @toy/demo.args --dtype "${kind#cuda-}" --steps $TOY_STEPS & runs+=($!)
    done
    CUDA_VISIBLE_DEVICES="" train toy-cpu @toy/demo.args --dtype float32 --steps $TOY_STEPS &
    runs+=($!)
    wait "${runs[@]}"
}

step_kill() {
    local flags="@toy/demo.args --steps 6 --save_every 1 --seed 7"
    rm -rf "$OUT/killed" "$OUT/whole"
    train whole $flags
    python3 "$ANTISD" --output "$OUT/killed" $flags > "$OUT/killed.log" 2>&1 &
    local pid=$!
    until ls "$OUT"/killed/checkpoints/*/.metadata > /dev/null 2>&1; do sleep 0.1; done
    kill -9 $pid; wait $pid 2>/dev/null || true
    train killed $flags
    cmp "$OUT/killed/model/model.safetensors" "$OUT/whole/model/model.safetensors" \
        && echo "kill: resumed bit for bit" | tee "$OUT/kill.txt" \
        || echo "kill: resumed, but the weights are not the same bits" | tee "$OUT/kill.txt"
}

step_model() {
    BIG=$BIG DRY=$DRY python3 - <<'PY'
import os
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("toy/model")
size = dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36,
            num_attention_heads=32, num_key_value_heads=8, head_dim=128)
if os.environ["DRY"]:
    size = {key: max(2, value // 64) for key, value in size.items()}
config = AutoConfig.for_model("qwen3", **size, max_position_embeddings=40960, eos_token_id=size[
    "vocab_size"] - 1, tie_word_embeddings=True, dtype="bfloat16")       # it never draws that end
with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config)
model.save_pretrained(os.environ["BIG"])
tokenizer.save_pretrained(os.environ["BIG"])
print(f"{sum(p.numel() for p in model.parameters()) / 1e9:.2f} billion weights")
PY
}

big() {      # NAME FLAGS...: two steps on the big model; the second one counts
    local name=$1; shift
    train "$name" --model "$BIG" --dataset toy/train.jsonl --problems_per_step "$PROBLEMS" \
        --group_size "$GROUP" --max_tokens "$TOKENS" --max_prompt_tokens 128 --rollout_batch 64 \
        --steps 2 --save_every 0 "$@"
    rm -rf "${OUT:?}/$name/model/"*.safetensors          # 8 GB each
}

step_speed() {
    big speed-antisd
    big speed-grpo --method grpo
}

step_offload() {
    export CAP PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
    PYTHON=(python3 -c "$CAPPED")
    big offload-antisd --offload --problems_per_step 1 --group_size 8 --rollout_batch 8 \
        --max_tokens "$SMALL_TOKENS"
    PYTHON=(python3)
    unset PYTORCH_CUDA_ALLOC_CONF
}

step_micro() {
    for tokens in 4096 32768 65536; do
        big "micro-$tokens" --micro_tokens $tokens
    done
}

step_evidence() {
    [ "$LM" ] || { echo "evidence: LM names no model"; return 1; }
    python3 - "$OUT" <<'PY'
import json
import random
import sys
for name, count, seed in ("train", 4000, 1), ("test", 200, 2):
    rng, rows = random.Random(seed), []
    for _ in range(count):
        a, b, c = (rng.randint(2, 40) for _ in range(3))
        rows.append({"problem": f"Compute {a} + {b} + {c}.", "answer": str(a + b + c), "solution":
                     f"{a} + {b} = {a + b}. Then {a + b} + {c} = {a + b + c}. The answer is "
                     f"\\boxed{{{a + b + c}}}."})
    with open(f"{sys.argv[1]}/sums-{name}.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
PY
    local runs=()
    for seed in $SEEDS; do
        for arm in $ARMS; do                             # they share the card
            train "evidence-$arm-$seed" --model "$LM" --dataset "$OUT/sums-train.jsonl" \
                --eval_dataset "$OUT/sums-test.jsonl" --eval_every 10 --method "$arm" \
                --seed "$seed" --lr 5e-6 --steps "$STEPS" --problems_per_step "$LM_PROBLEMS" \
                --group_size "$GROUP" --max_tokens "$LM_TOKENS" & runs+=($!)
        done
    done
    wait "${runs[@]}"
}

step_table() {
    OUT=$OUT PEAK=$PEAK BIG=$BIG python3 - <<'PY' | tee "$OUT/table.md"
import dataclasses
import glob
import json
import os
import sys
sys.path.insert(0, "analysis")
import memory
print("| run | step, s | rollout, s | scoring, s | training, s | tokens/s | peak, GiB | predicted "
      "| bf16 peak | reward, first and last | held-out by step |\n|---|" + "---:|" * 10)
counts = {}
for file in sorted(glob.glob(os.environ["OUT"] + "/*/metrics.jsonl")):
    rows = [json.loads(line) for line in open(file)]
    steps = [row for row in rows if "reward" in row]
    if not steps:
        continue
    last, name = steps[-1], file.split("/")[-2]
    flags = json.load(open(file.replace("metrics.jsonl", "config.json")))["flags"]
    seconds = [last[f"seconds/{phase}"] for phase in ("rollout", "score", "train")]
    tokens = last["length"] * flags["problems_per_step"] * flags["group_size"]
    share = predicted = ""
    if flags["model"] == os.environ["BIG"]:              # what fills the card
        config = memory.load_config(flags["model"])
        weights = counts.setdefault(flags["model"], memory.count_parameters(config))
        # 6 FLOP a weight and token, and 2 more where the layers are computed again
        work = (8 if flags["gradient_checkpointing"] else 6) * weights * tokens
        share = f"{work / seconds[2] / (float(os.environ['PEAK']) * 1e12):.0%}"
        plan = memory.Plan(gpus=[1], **{
            field.name: flags[field.name] for field in dataclasses.fields(memory.Plan)
            if field.name in flags and field.name not in ("model", "dtype")})
        predicted = f"{memory.estimate(config, weights, 1, plan)['peak']:.1f}"
    held_out = ", ".join(f"{row['eval_accuracy']:.2f}" for row in rows if "eval_accuracy" in row)
    print(f"| {name} | {sum(seconds):.1f} | " + " | ".join(f"{s:.1f}" for s in seconds)
          + f" | {last['tokens_per_s']:.0f} | {last['peak_memory_gib'] or 0:.1f} | {predicted} | "
          + f"{share} | {steps[0]['reward']:.2f}, {last['reward']:.2f} | {held_out} |")
PY
}

for step in "$@"; do
    if [ -e "$OUT/$step.done" ] && [ "$step" != table ]; then continue; fi
    begun=$SECONDS
    rm -f "$OUT/failed"
    "step_$step" || touch "$OUT/failed"
    [ -e "$OUT/failed" ] || touch "$OUT/$step.done"
    echo "== $step: $((SECONDS - begun)) s"
done
wait
if [ -e "$OUT/tests.log" ]; then tail -n 3 "$OUT/tests.log"; fi
