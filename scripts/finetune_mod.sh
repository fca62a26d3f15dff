#!/usr/bin/env bash
# Router-tunes a pretrained model: the main job. With nothing set it trains SmolLM2-135M-Instruct on Alpaca, on a CPU if
# there is no GPU, and prints the output directory last.
#
#   bash scripts/finetune_mod.sh
#   FOLDER_NAME=mistral-7b-mod DATA_TYPE=mixed MAX_TRAIN_SAMPLES=5000 bash scripts/finetune_mod.sh
#
# Every field below can be set from the environment; further arguments go to finetune_mod.py, whose --help explains
# them. DRY_RUN=1 prints the command and runs nothing but what is needed to know it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# What to train, on what
FOLDER_NAME="${FOLDER_NAME:-smollm2-135m-mod}" # checkpoint under ckpt/, built here if it isn't there yet
BASE_MODEL="${BASE_MODEL:-}"                   # its dense base: local directory or hub name; default: the folder's own
DATA_TYPE="${DATA_TYPE:-alpaca}"               # a data set under data/reformatted, or `mixed`
TRAIN_FILE="${TRAIN_FILE:-}"                   # a data.jsonl of your own, instead of DATA_TYPE
MAX_TRAIN_SAMPLES="${MAX_TRAIN_SAMPLES:-5000}"

# How
RECIPE="${RECIPE:-default}" # or paper: the published method
ROUTER_ONLY="${ROUTER_ONLY:-true}"

# What is routed, and how much of it is executed; empty: as the checkpoint says
MOD_N="${MOD_N:-}"
TARGET_SKIPPED="${TARGET_SKIPPED:-}" # instead of TARGET_CAPACITY: share of the layers' parameters to skip for a token
[[ -z "$TARGET_SKIPPED" || -z "${TARGET_CAPACITY:-}" ]] ||
  die "TARGET_CAPACITY=$TARGET_CAPACITY and TARGET_SKIPPED=$TARGET_SKIPPED: both say how much to skip; set one of the two"
if [[ "$RECIPE" == paper ]]; then
  TARGET_CAPACITY="${TARGET_CAPACITY:-0.5}"
  if [[ "$FOLDER_NAME" == smollm2-135m-mod ]]; then GRANULARITY="${GRANULARITY:-attn_sequence}"; fi
fi
TARGET_CAPACITY="${TARGET_CAPACITY:-0.6}"
GRANULARITY="${GRANULARITY:-}"

# How it is learned
GRADIENT_SCALE="${GRADIENT_SCALE:-}" # of the hinge; empty: the recipe's
LEARNING_RATE="${LEARNING_RATE:-}"   # empty: the recipe's, by the model's width
WARMUP="${WARMUP:-}"                 # share of the steps in which it rises; empty: the recipe's
WEIGHT_DECAY="${WEIGHT_DECAY:-}"     # empty: 0
NUM_EPOCHS="${NUM_EPOCHS:-1}"
SEED="${SEED:-233}"

# Where. NUM_PROCESSES counts those of all machines.
NUM_MACHINES="${NUM_MACHINES:-1}"
MACHINE_RANK="${MACHINE_RANK:-0}"
MAIN_PROCESS_IP="${MAIN_PROCESS_IP:-}"
PORT="${PORT:-0}" # 0: any free one; several machines need the same one
GRANULARITIES=(attn_sequence attn_token mlp_sequence mlp_token block_sequence block_token attn_mlp_sequence attn_mlp_token expert_token)

# A wrong value is told now, before anything is installed or loaded. What depends on the model is told by finetune_mod.py.
one_of() { # FIELD ALLOWED...: empty is allowed too
  local field="$1" value="${!1:-}" allowed
  shift
  for allowed in "" "$@"; do [[ "$value" != "$allowed" ]] || return 0; done
  die "$field=$value: allowed are $*"
}
whole() { # FIELD FROM TO
  local value="${!1:-}"
  [[ -n "$value" ]] || return 0
  [[ "$value" =~ ^(0|[1-9][0-9]{0,17})$ ]] || die "$1=$value: not a whole number"
  ((value >= $2 && value <= $3)) || die "$1=$value: must lie between $2 and $3"
}
number() { # FIELD CONDITION WORDS: of x, in awk
  local value="${!1:-}"
  [[ -n "$value" ]] || return 0
  [[ "$value" =~ ^([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?$ ]] || die "$1=$value: not a number ($3)"
  awk -v x="$value" "BEGIN { exit !($2) }" || die "$1=$value: must be $3"
}
for field in FOLDER_NAME DATA_TYPE; do
  [[ "${!field}" =~ ^[^/]+$ && "${!field}" != . && "${!field}" != .. ]] ||
    die "$field=${!field}: not a plain name, of a folder"
done
one_of GRANULARITY "${GRANULARITIES[@]}"
one_of ROUTER_ONLY true false
one_of RECIPE default paper
one_of DRY_RUN 0 1
for field in MAX_TRAIN_SAMPLES MAX_SEQ_LENGTH MOD_N GLOBAL_BATCH_SIZE MICRO_BATCH_SIZE NUM_PROCESSES NUM_MACHINES; do
  whole "$field" 1 1000000000
done
whole SEED 0 4294967295
whole PORT 0 65535
whole MACHINE_RANK 0 1000000
number TARGET_CAPACITY "x > 0 && x <= 1" "a number above 0, and at most 1"
number TARGET_SKIPPED "x > 0 && x < 1" "a number between 0 and 1"
number NUM_EPOCHS "x > 0" "a number above 0"
for field in GRADIENT_SCALE LEARNING_RATE WARMUP WEIGHT_DECAY; do
  number "$field" "x < 1e300" "a number that is not negative"
done
if ((NUM_MACHINES > 1)) && [[ -z "$MAIN_PROCESS_IP" || "$PORT" == 0 || -z "${OUTPUT_DIR:-}" ]]; then
  die "NUM_MACHINES=$NUM_MACHINES needs MAIN_PROCESS_IP, PORT and OUTPUT_DIR, the same on every machine"
fi
((MACHINE_RANK < NUM_MACHINES)) || die "MACHINE_RANK=$MACHINE_RANK: the machines are numbered 0 to $((NUM_MACHINES - 1))"
[[ -z "$BASE_MODEL" || "$BASE_MODEL" != */*/* && "$BASE_MODEL" != [./~]* || -d "$BASE_MODEL" ]] ||
  die "BASE_MODEL=$BASE_MODEL: no such directory, and no name on the hub"
[[ ! -e "${OUTPUT_DIR:-/nothing}" || -d "$OUTPUT_DIR" ]] || die "OUTPUT_DIR=$OUTPUT_DIR: is a file; choose another"
[[ -z "${ACCELERATE_CONFIG:-}" || -f "$ACCELERATE_CONFIG" ]] ||
  die "ACCELERATE_CONFIG=$ACCELERATE_CONFIG: no such file; see configs/accelerate"
if [[ -n "$TRAIN_FILE" ]]; then
  [[ -f "$TRAIN_FILE" ]] || die "TRAIN_FILE=$TRAIN_FILE: no such file"
  DATA_TYPE="$(basename "$TRAIN_FILE" .jsonl)"
elif [[ "$DATA_TYPE" == mixed ]]; then
  [[ -f "$root/data/mixed/data.jsonl" ]] ||
    die "$root/data/mixed/data.jsonl: no such file; make it with \`bash scripts/data/mix.sh\`"
elif [[ "$DATA_TYPE" != alpaca && ! -f "$root/data/reformatted/$DATA_TYPE/data.jsonl" && ! -d "$root/data/raw/$DATA_TYPE" ]]; then
  die "DATA_TYPE=$DATA_TYPE: neither data/reformatted/$DATA_TYPE/data.jsonl nor data/raw/$DATA_TYPE is there; see the" \
    "README, Data"
fi
OUTPUT_DIR="${OUTPUT_DIR:-$root/outputs/$FOLDER_NAME/$DATA_TYPE-$(date +%Y%m%d-%H%M%S)-$(od -An -N3 -tx1 /dev/urandom | tr -d ' ')}"

# Hardware: a number of processes that fits
count_gpus() {
  local there
  there="$({ nvidia-smi -L 2>/dev/null || true; } | grep -c '^GPU ' || true)"
  if [[ -n "${CUDA_VISIBLE_DEVICES+set}" ]] && ((there > 0)); then
    tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c '^[0-9A-Za-z]' || true # -1 hides all
  else
    echo "$there"
  fi
}
gpus="$(count_gpus)"
NUM_PROCESSES="${NUM_PROCESSES:-$(((gpus > 0 ? gpus : 1) * NUM_MACHINES))}"
((NUM_PROCESSES >= NUM_MACHINES)) ||
  die "NUM_PROCESSES=$NUM_PROCESSES: too few for NUM_MACHINES=$NUM_MACHINES, as it counts those of all machines"
((gpus == 0 || NUM_PROCESSES <= gpus * NUM_MACHINES)) ||
  die "NUM_PROCESSES=$NUM_PROCESSES: there are $gpus GPUs on each of $NUM_MACHINES machines, one process for each"

# shellcheck source=scripts/setup_env.sh
source "$root/scripts/setup_env.sh"

# A GPU that is there is what a run is for: one that torch can't use is no reason to train on the CPU
if ((gpus > 0)) && [[ "${DRY_RUN:-0}" != 1 ]]; then
  (cd "$root" && python -c 'from utils.io.devices import choose_device as choose; from utils.io.errors import run_command; run_command(lambda: choose() and None)')
fi

# A misspelt field would be ignored. The fields are what is read here with a default; MY_FIELD and FIELD_OF_MINE are fine.
misspelt="$(compgen -e | python -c '
import difflib, re, sys
fields = set(re.findall(r"\$\{([A-Z_]{8,}):-", open(sys.argv[1]).read()))
for name in sorted(set(sys.stdin.read().split()) - fields):
    for near in difflib.get_close_matches(name, fields, n=1, cutoff=0.85):
        if f"_{near}" not in name and f"{near}_" not in name:
            sys.exit(print(f"{name} is set, which is no field: did you mean {near}?"))
' "${BASH_SOURCE[0]}")"
[[ -z "$misspelt" ]] || die "$misspelt"

# An accelerate config, and batches that fit
arguments=()
if ((gpus > 0)); then
  MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-2048}"
  GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-64}"
  MICRO_BATCH_SIZE="${MICRO_BATCH_SIZE:-1}"
  config=gpu
else # a small model and few rows: more and smaller steps
  MAX_SEQ_LENGTH="${MAX_SEQ_LENGTH:-256}"
  GLOBAL_BATCH_SIZE="${GLOBAL_BATCH_SIZE:-8}"
  if [[ -z "${MICRO_BATCH_SIZE:-}" ]]; then
    for MICRO_BATCH_SIZE in 4 2 1; do
      if ((GLOBAL_BATCH_SIZE % (NUM_PROCESSES * MICRO_BATCH_SIZE) == 0)); then break; fi
    done
  fi
  config=cpu
  arguments+=(--use_cpu true)
  unset ACCELERATE_USE_CPU
fi
if ((NUM_PROCESSES > 1)); then config=ddp; fi
if ((NUM_MACHINES > 1)); then config=ddp_multinode; fi
ACCELERATE_CONFIG="${ACCELERATE_CONFIG:-$root/configs/accelerate/$config.yaml}"

# Data
if [[ -z "$TRAIN_FILE" && "$DATA_TYPE" == mixed ]]; then
  TRAIN_FILE="$root/data/mixed/data.jsonl"
elif [[ -z "$TRAIN_FILE" ]]; then
  TRAIN_FILE="$root/data/reformatted/$DATA_TYPE/data.jsonl"
  if [[ -f "$TRAIN_FILE" ]]; then
    :
  elif [[ -d "$root/data/raw/$DATA_TYPE" ]]; then
    python "$root/entrypoints/data/reformat_datasets.py" --datasets "$DATA_TYPE"
  else
    echo "No data in data/raw/alpaca: using the embedded sample, data/sample/alpaca" >&2
    TRAIN_FILE="$root/data/sample/reformatted/alpaca/data.jsonl"
    python "$root/entrypoints/data/reformat_datasets.py" --datasets alpaca \
      --raw_data_root "$root/data/sample" --save_path "$root/data/sample/reformatted"
  fi
fi

# Model
checkpoint="$root/ckpt/$FOLDER_NAME"
if [[ "${DRY_RUN:-0}" != 1 && (-n "$BASE_MODEL" || ! -f "$checkpoint/model.safetensors.index.json") ]]; then
  build=(--folder_name "$FOLDER_NAME" --reuse)
  if [[ -n "$BASE_MODEL" ]]; then build+=(--base_model "$BASE_MODEL"); fi
  python "$root/entrypoints/checkpoint/build_mod_checkpoint.py" "${build[@]}" >&2
fi

arguments+=(
  --model_name_or_path "$checkpoint"
  --train_file "$TRAIN_FILE"
  --max_train_samples "$MAX_TRAIN_SAMPLES"
  --max_seq_length "$MAX_SEQ_LENGTH"
  --router_only "$ROUTER_ONLY"
  --recipe "$RECIPE"
  --num_train_epochs "$NUM_EPOCHS"
  --global_batch_size "$GLOBAL_BATCH_SIZE"
  --per_device_train_batch_size "$MICRO_BATCH_SIZE"
  --seed "$SEED"
  --output_dir "$OUTPUT_DIR"
)
if [[ -n "$TARGET_SKIPPED" ]]; then
  arguments+=(--target_skipped "$TARGET_SKIPPED")
else
  arguments+=(--target_capacity "$TARGET_CAPACITY")
fi
if [[ -n "$MOD_N" ]]; then arguments+=(--mod_n "$MOD_N"); fi
if [[ -n "$GRANULARITY" ]]; then arguments+=(--granularity "$GRANULARITY"); fi
if [[ -n "$GRADIENT_SCALE" ]]; then arguments+=(--gradient_scale "$GRADIENT_SCALE"); fi
if [[ -n "$WEIGHT_DECAY" ]]; then arguments+=(--weight_decay "$WEIGHT_DECAY"); fi
if [[ -n "$WARMUP" ]]; then arguments+=(--warmup_steps "$WARMUP"); fi
if [[ -n "$LEARNING_RATE" ]]; then arguments+=(--learning_rate "$LEARNING_RATE"); fi

launch=(
  python "$root/entrypoints/launch.py" --config_file "$ACCELERATE_CONFIG" --num_processes "$NUM_PROCESSES" --main_process_port "$PORT"
  --num_machines "$NUM_MACHINES" --machine_rank "$MACHINE_RANK"
)
if [[ -n "$MAIN_PROCESS_IP" ]]; then launch+=(--main_process_ip "$MAIN_PROCESS_IP"); fi
# DeepSpeed's own file is named in the accelerate config, relative to the repository
deepspeed_file="$(sed -n 's/^ *deepspeed_config_file: *//p' "$ACCELERATE_CONFIG")"
if [[ "$deepspeed_file" == configs/* ]]; then launch+=(--deepspeed_config_file "$root/$deepspeed_file"); fi
command=("${launch[@]}" "$root/entrypoints/finetune/finetune_mod.py" "${arguments[@]}" "$@")
echo "output directory: $OUTPUT_DIR" >&2
printf '+' >&2
printf ' %q' "${command[@]}" >&2
printf '\n' >&2
if [[ "${DRY_RUN:-0}" == 1 ]]; then exit 0; fi
exec "${command[@]}"
